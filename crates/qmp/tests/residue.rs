// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What clients leave behind in the process: its memory and descriptors are measured, so these tests have a
//! process of their own and run one at a time.

#[allow(dead_code)]
mod toy;
#[allow(dead_code)]
mod wire;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebbtide_qmp::client::Client;
use ebbtide_qmp::commands::QUERY_STATUS;
use ebbtide_qmp::schema::Empty;
use toy::server::{Setup, ToyServer};
use wire::Wire;

static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_hundred_mebibytes_without_a_newline_cost_one_mebibyte_and_one_error() {
    let _alone = ALONE.lock();
    let server = ToyServer::start(Setup::default());
    let mut wire = Wire::negotiated(&server.path());
    let before = resident_kib();
    let mut writer = wire.socket.try_clone().unwrap();
    let served = Arc::new(AtomicU32::new(0));
    let others = Arc::clone(&served);
    let flood = std::thread::spawn(move || {
        let block = vec![b'x'; 1 << 20];
        writer.write_all(b"{\"execute\": \"").unwrap();
        // It goes on for as long as others are not served.
        let mut blocks = 0;
        while blocks < 100 || others.load(Ordering::Relaxed) < 20 {
            writer.write_all(&block).unwrap();
            blocks += 1;
        }
        writer.write_all(b"\"}").unwrap();
    });
    assert_eq!(
        wire.line()["error"]["desc"],
        "JSON parse error, size limit exceeded (1048576 bytes)"
    );
    // Others are served while it goes on.
    let mut other = Client::connect(&server.path()).unwrap();
    while !flood.is_finished() {
        other.call(&QUERY_STATUS, Empty {}).unwrap();
        served.fetch_add(1, Ordering::Relaxed);
    }
    flood.join().unwrap();
    wire.assert_usable();
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 20 << 10, "grew by {grown} KiB");
}

/// What the killed client was to send; its presence makes this program that client.
const CLIENT_SENDS: &str = "EBBTIDE_TEST_CLIENT_SENDS";
const CLIENT_PATH: &str = "EBBTIDE_TEST_CLIENT_PATH";

/// In the child: sends, says so, and waits for its end.
fn be_the_client(sends: &str) {
    let path = std::env::var(CLIENT_PATH).unwrap();
    let mut wire = Wire::negotiated(path.as_ref());
    wire.send(sends);
    println!("sent");
    std::thread::sleep(wire::PATIENCE);
}

#[test]
fn a_killed_client_leaves_nothing() {
    if let Ok(sends) = std::env::var(CLIENT_SENDS) {
        return be_the_client(&sends);
    }
    let _alone = ALONE.lock();
    let server = ToyServer::start(Setup::default());
    let mut watcher = Client::connect(&server.path()).unwrap();
    watcher.call(&QUERY_STATUS, Empty {}).unwrap();
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = fds();
    for sends in [
        "",
        "{\"execute\": ",
        "{\"execute\": \"x-toy-sleep\", \"arguments\": {\"value\": 200}}",
        "{\"execute\": \"x-toy-text\", \"arguments\": {\"value\": 5000000}}{\"execute\": \"query-status\"}",
    ] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_client_leaves_nothing", "--nocapture"])
            .env(CLIENT_SENDS, sends)
            .env(CLIENT_PATH, server.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Behind the name of the test, where one at a time is run.
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(
            lines
                .map_while(Result::ok)
                .any(|line| line.ends_with("sent")),
            "the client ended early"
        );
        server.wait_clients(2);
        child.kill().unwrap();
        child.wait().unwrap();
        drop(child);
        server.wait_clients(1);
        watcher.call(&QUERY_STATUS, Empty {}).unwrap();
    }
    // The last client's is closed when it is not counted any more, or soon after.
    let begun = Instant::now();
    while fds() != before {
        assert!(begun.elapsed() < wire::PATIENCE, "{} of {before}", fds());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
