// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands against a toy machine, over a real socket.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use clap::error::ErrorKind;
use serde_json::{Value, json};

use super::*;

#[path = "../../../qmp/tests/toy/mod.rs"]
#[allow(missing_docs, dead_code)]
mod toy;

mod plug;

use toy::server::{Setup, ToyServer};
use toy::{ToyConfig, ToyDevice};

const G: u64 = 1 << 30;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: CtlArgs,
}

fn parse(words: &[&str]) -> Result<CtlArgs, clap::Error> {
    Cli::try_parse_from(std::iter::once(&"ctl").chain(words)).map(|cli| cli.args)
}

fn run(server: &ToyServer, words: &[&str]) -> Result<(Outcome, String), Failure> {
    let mut out = Vec::new();
    let outcome = carry_out(&parse(words).unwrap(), &server.path(), &mut out)?;
    Ok((outcome, String::from_utf8(out).unwrap()))
}

fn run_json(server: &ToyServer, words: &[&str]) -> (Outcome, Value) {
    let words: Vec<&str> = words.iter().chain(&["--json"]).copied().collect();
    let (outcome, text) = run(server, &words).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    (outcome, serde_json::from_str(&text).unwrap())
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

fn machine(devices: &[(&str, u64, u64)]) -> ToyServer {
    let device = |&(id, max, follows): &(&str, u64, u64)| ToyDevice {
        id: id.into(),
        max_bytes: max,
        follows_up_to: follows,
    };
    let toy = ToyConfig {
        boot_bytes: G,
        devices: devices.iter().map(device).collect(),
        step_bytes: G,
        ..ToyConfig::default()
    };
    ToyServer::start(Setup {
        toy,
        ..Setup::default()
    })
}

#[test]
fn status_and_memory_have_the_documented_shape() {
    let server = machine(&[("vmem0", 7 * G, u64::MAX)]);
    let (outcome, status) = run_json(&server, &["status"]);
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(keys(&status), ["status", "vcpus", "pid", "version"]);
    let (_, memory) = run_json(&server, &["memory"]);
    assert_eq!(
        keys(&memory),
        ["boot", "plugged", "total", "max", "rss", "devices"]
    );
    assert_eq!(
        keys(&memory["devices"][0]),
        [
            "id",
            "type",
            "node",
            "memaddr",
            "block_size",
            "requested",
            "size",
            "max"
        ]
    );
    assert_eq!(
        (&memory["boot"], &memory["max"]),
        (&json!(G), &json!(8 * G))
    );
    let (_, text) = run(&server, &["status"]).unwrap();
    assert!(text.contains("status   running"), "{text}");
    let (_, text) = run(&server, &["memory"]).unwrap();
    assert!(text.contains("total     1 GiB of at most 8 GiB"), "{text}");
}

#[test]
fn resize_waits_until_the_guest_has_it() {
    let server = machine(&[("vmem0", 7 * G, u64::MAX)]);
    let (outcome, report) = run_json(&server, &["resize", "4G", "--wait"]);
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(
        keys(&report),
        ["from", "target", "reached", "ms", "result", "reason"]
    );
    assert_eq!(report["ms"].as_u64().map(|ms| ms > 0), Some(true));
    assert_eq!(
        json!([
            report["from"],
            report["target"],
            report["reached"],
            report["result"],
            report["reason"]
        ]),
        json!([G, 4 * G, 4 * G, "reached", null])
    );
    let (outcome, text) = run(&server, &["resize", "1G", "--wait", "--timeout", "20"]).unwrap();
    assert_eq!(outcome, Outcome::Done);
    assert!(text.starts_with("reached 1 GiB in "), "{text}");
}

#[test]
fn resize_without_wait_does_not_pretend() {
    let server = machine(&[("vmem0", 7 * G, 0)]);
    let (outcome, report) = run_json(&server, &["resize", "4G"]);
    assert_eq!(
        (outcome, &report["result"], &report["reached"]),
        (Outcome::Done, &json!(null), &json!(G))
    );
    let (_, text) = run(&server, &["resize", "5G"]).unwrap();
    assert_eq!(text, "requested 5 GiB, the guest has 1 GiB now\n");
    let (_, report) = run_json(&server, &["resize", "1G"]);
    assert_eq!(report["result"], "reached");
}

#[test]
fn several_devices_are_filled_in_the_order_of_their_ids() {
    let server = machine(&[("b", 2 * G, u64::MAX), ("a", 2 * G, u64::MAX)]);
    let sizes = || {
        let (_, memory) = run_json(&server, &["memory"]);
        json!([memory["devices"][0]["size"], memory["devices"][1]["size"]])
    };
    run_json(&server, &["resize", "4G", "--wait"]);
    assert_eq!(sizes(), json!([G, 2 * G]));
    run_json(&server, &["resize", "2G", "--wait"]);
    assert_eq!(sizes(), json!([0, G]));
}

#[test]
fn a_guest_that_stops_half_way_is_exit_code_3() {
    let server = machine(&[("vmem0", 7 * G, 2 * G)]);
    let (outcome, report) = run_json(&server, &["resize", "8G", "--wait"]);
    assert_eq!(
        (outcome, &report["result"], &report["reached"]),
        (Outcome::PartialOrStalled, &json!("partial"), &json!(3 * G))
    );
    assert_eq!(report["reason"], "the guest has no room for more");
    let silent = machine(&[("vmem0", 7 * G, 0)]);
    let (outcome, text) = run(&silent, &["resize", "8G", "--wait"]).unwrap();
    assert_eq!(outcome, Outcome::PartialOrStalled);
    assert!(
        text.starts_with("stalled at 1 GiB of 8 GiB") && text.ends_with("no driver in the guest\n"),
        "{text}"
    );
}

#[test]
fn a_time_out_is_exit_code_4_and_leaves_the_target() {
    let mut setup = Setup::default();
    setup.toy.step_bytes = 2 << 20;
    let server = ToyServer::start(setup);
    let (outcome, report) = run_json(&server, &["resize", "8G", "--wait", "--timeout", "0.2"]);
    assert_eq!(
        (outcome, &report["result"]),
        (Outcome::TimedOut, &json!("timeout"))
    );
    assert!(
        report["ms"].as_u64().is_some_and(|ms| ms >= 200),
        "{report}"
    );
    let (_, memory) = run_json(&server, &["memory"]);
    assert_eq!(memory["devices"][0]["requested"], json!(7680u64 << 20));
}

/// What was printed up to now.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<u8>>>);

impl Seen {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Seen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never is so");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until somebody has asked the first device for 7.5 GiB.
fn wait_requested(server: &ToyServer) {
    wait_until(|| {
        let (_, memory) = run_json(server, &["memory"]);
        memory["devices"][0]["requested"] == json!(7680u64 << 20)
    });
}

#[test]
fn a_target_somebody_else_changes_is_an_error() {
    let mut setup = Setup::default();
    setup.toy.step_bytes = 2 << 20;
    let server = ToyServer::start(setup);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&server, &["resize", "8G", "--wait", "--timeout", "20"]));
        wait_requested(&server);
        run(&server, &["resize", "1G"]).unwrap();
        let error = waiting.join().unwrap().unwrap_err().to_string();
        assert_eq!(
            error,
            "vmem0: somebody else has requested 512 MiB instead of 7.5 GiB"
        );
    });
}

#[test]
fn sizes_that_cannot_be_had_change_nothing() {
    let server = machine(&[("vmem0", 7 * G, u64::MAX)]);
    for (size, message) in [
        ("512M", "too little"),
        ("9G", "too much"),
        ("1025M", "blocks of 2 MiB"),
    ] {
        let error = run(&server, &["resize", size, "--wait"])
            .unwrap_err()
            .to_string();
        assert!(error.contains(message), "{error}");
    }
    let (_, memory) = run_json(&server, &["memory"]);
    assert_eq!(memory["devices"][0]["requested"], 0);
}

#[test]
fn a_machine_that_ends_in_the_middle_is_an_error() {
    let mut setup = Setup::default();
    setup.toy.step_bytes = 2 << 20;
    let server = ToyServer::start(setup);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&server, &["resize", "8G", "--wait"]));
        wait_requested(&server);
        run(&server, &["qmp", "quit"]).unwrap();
        let error = waiting.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("before the guest had the size"), "{error}");
    });
}

#[test]
fn watch_tells_each_change_until_the_machine_ends() {
    let server = machine(&[("vmem0", 7 * G, u64::MAX)]);
    std::thread::scope(|scope| {
        let seen = Seen::default();
        let mut out = seen.clone();
        let path = server.path();
        let watching = scope.spawn(move || carry_out(&parse(&["watch"]).unwrap(), &path, &mut out));
        wait_until(|| seen.text().contains("total 1 GiB  plugged 0"));
        run(&server, &["resize", "3G", "--wait"]).unwrap();
        let all = "total 3 GiB  plugged 2 GiB  requested 2 GiB";
        wait_until(|| seen.text().contains(all));
        run(&server, &["qmp", "quit"]).unwrap();
        assert_eq!(watching.join().unwrap().unwrap(), Outcome::Done);
    });
}

#[test]
fn map_and_qmp_print_what_the_machine_says() {
    let server = machine(&[("vmem0", 7 * G, u64::MAX)]);
    let (_, text) = run(&server, &["map"]).unwrap();
    assert!(
        text.starts_with("address-space: memory") && text.contains("max-size: 7516192768\n"),
        "{text}"
    );
    let (_, map) = run_json(&server, &["map"]);
    assert_eq!(keys(&map), ["mtree", "memory_devices"]);
    let (_, value) = run_json(
        &server,
        &[
            "qmp",
            "{'execute': 'qom-get', 'arguments': {'path': 'vmem0', 'property': 'size'}}",
        ],
    );
    assert_eq!(value, 0);
    let error = run(&server, &["qmp", "x-nope"]).unwrap_err().to_string();
    assert_eq!(
        error,
        "x-nope: CommandNotFound: The command x-nope has not been found"
    );
}

#[test]
fn usage_errors_name_the_option_and_what_is_accepted() {
    for (words, parts) in [
        (&["resize", "5x"][..], &["'5x'", "<SIZE>", "512M"][..]),
        (&["resize"], &["<SIZE>"]),
        (&["resize", "1G", "--timeout", "3"], &["--wait"]),
        (
            &["resize", "1G", "--wait", "--timeout", "0"],
            &["--timeout", "such as 30"],
        ),
        (
            &["--qmp", "unix:/x,wait=on", "status"],
            &["--qmp", "does not wait"],
        ),
        (&["--qmp", "", "status"], &["--qmp"]),
        (&["qmp", "{"], &["<JSON>", "no end"]),
        (&["resise"], &["resize"]),
    ] {
        let error = parse(words).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        assert!(
            parts.iter().all(|part| error.to_string().contains(part)),
            "{words:?}: {error}"
        );
    }
    let help = parse(&["--help"]).err().unwrap();
    assert_eq!(help.kind(), ErrorKind::DisplayHelp);
    assert!(
        parse(&["status"]).unwrap().qmp.is_none(),
        "main() asks for it"
    );
    assert_eq!(
        parse(&["status", "--qmp", "unix:/x,server=on"])
            .unwrap()
            .qmp,
        Some("/x".into())
    );
}

#[test]
fn connection_errors_are_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("q");
    let fail = || {
        carry_out(&parse(&["status"]).unwrap(), &path, &mut Vec::new())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(fail(), format!("{}: no such socket", path.display()));
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(listener);
    assert_eq!(
        fail(),
        format!("{}: nothing listens on this socket", path.display())
    );
    std::fs::remove_file(&path).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.write_all(b"SSH-2.0-OpenSSH\r\n").unwrap();
        let (client, _) = listener.accept().unwrap();
        drop(client);
    });
    assert_eq!(
        fail(),
        format!(
            "{}: this is not a QMP server: JSON parse error, stray 'SSH-2.0-OpenSSH'",
            path.display()
        )
    );
    assert_eq!(
        fail(),
        format!(
            "{}: this is not a QMP server: it closed the connection",
            path.display()
        )
    );
    other.join().unwrap();
}
