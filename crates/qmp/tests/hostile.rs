// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients that send garbage, never stop or never read: each harms itself only.

#[allow(dead_code)]
mod toy;
#[allow(dead_code)]
mod wire;

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ebbtide_iothread::{Config, ManualClock};
use ebbtide_qmp::ServerLimits;
use ebbtide_qmp::client::Client;
use ebbtide_qmp::commands::QUERY_STATUS;
use ebbtide_qmp::schema::Empty;
use proptest::prelude::*;
use serde_json::json;
use toy::server::{Setup, ToyServer};
use toy::{TOY_EVENTS, TOY_WAITING, ToyNumber};
use wire::Wire;

#[test]
fn garbage_is_answered_and_forgotten() {
    let server = ToyServer::start(Setup::default());
    let mut wire = Wire::negotiated(&server.path());
    for (garbage, desc) in [
        (&b"nope\n"[..], "JSON parse error, invalid keyword 'nope'"),
        (
            b"GET / HTTP/1.1\r\n",
            "JSON parse error, stray 'GET / HTTP/1.1'",
        ),
        (b"\x00", "JSON parse error, stray '\0'"),
        (b"\xff", "JSON parse error, stray '\u{fffd}'"),
        (
            b"{\"execute\": \"st\xffop",
            "JSON parse error, stray '\u{fffd}'",
        ),
        (
            b"{\"execute\": \"st\nop",
            "JSON parse error, stray '\"st\n'",
        ),
        (
            b"{\"execute\": \"\xc3\x28\"}",
            "JSON parse error, invalid unicode code point at column 13",
        ),
        (
            b"{\"execute\": \"stop\"]",
            "JSON parse error, expected separator in dict at column 19",
        ),
        (
            b"{\"execute\": \"stop\", \"execute\": \"quit\"}",
            "JSON parse error, duplicate key 'execute' at column 31",
        ),
    ] {
        assert_eq!(wire.refused(garbage), desc);
        // The rest of a line that broke off is garbage too.
        if garbage.ends_with(b"op") {
            assert_eq!(
                wire.refused(
                    "
"
                ),
                "JSON parse error, invalid keyword 'op'"
            );
        }
        wire.assert_usable();
    }
}

#[test]
fn deep_nesting_is_refused() {
    let server = ToyServer::start(Setup::default());
    let mut wire = Wire::negotiated(&server.path());
    let refused = "JSON parse error, nesting depth limit exceeded (1024 levels)";
    let deep = |open: &str, close: &str, levels| {
        format!("{}{}", open.repeat(levels), close.repeat(levels))
    };
    assert_eq!(
        wire.refused(deep("[", "]", 1024)),
        "QMP input must be a JSON object"
    );
    assert_eq!(wire.refused(deep("[", "]", 1025)), refused);
    wire.assert_usable();
    assert_eq!(
        wire.refused(format!(
            "{{\"execute\": \"stop\", \"id\": {}}}",
            deep("{\"a\":[", "1]}", 100_000)
        )),
        refused
    );
    wire.assert_usable();
    assert_eq!(wire.refused(format!("{}\n", "[".repeat(900_000))), refused);
    wire.assert_usable();
    // As deep as may be, echoed.
    let id = deep("[", "]", 1022);
    let answer = wire.ask(format!(
        "{{\"execute\": \"x-toy-sleep\", \"arguments\": {{\"value\": 0}}, \"id\": {id}}}"
    ));
    assert_eq!(answer["return"], 0);
    // Arguments are read level by level, on the control thread's stack.
    let arguments = |levels| {
        format!(
            "{{\"execute\": \"device_add\", \"arguments\": {{\"driver\": \"pc-dimm\", \"id\": \"d\", \"memdev\": {}}}}}",
            deep("[", "]", levels)
        )
    };
    assert_eq!(
        wire.refused(arguments(128)),
        "Invalid parameter type for 'memdev', expected: string"
    );
    assert_eq!(
        wire.refused(arguments(1022)),
        "Parameter 'memdev' is nested too deeply, 128 levels are accepted"
    );
    wire.assert_usable();
}

#[test]
fn a_client_that_does_not_read_waits_for_itself() {
    let server = ToyServer::start(Setup::default());
    let mut greedy = Wire::negotiated(&server.path());
    let request = r#"{"execute": "x-toy-text", "arguments": {"value": 100000}}"#;
    greedy
        .socket
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // 100 MB of answers are asked for: the server stops reading long before.
    let mut asked = 0;
    while asked < 100_000 && greedy.socket.write_all(request.as_bytes()).is_ok() {
        asked += 1;
    }
    assert!(asked < 100_000, "never pushed back");
    let mut other = Client::connect(&server.path()).unwrap();
    other.call(&QUERY_STATUS, Empty {}).unwrap();
    // It is still a client, and gets all it asked for once it reads.
    for _ in 0..50 {
        assert_eq!(greedy.line()["return"].as_str().unwrap().len(), 100_000);
    }
}

#[test]
fn a_client_that_leaves_events_unread_is_dropped() {
    let limits = ServerLimits {
        output_bytes: 200 << 10,
        ..ServerLimits::default()
    };
    let server = ToyServer::start(Setup {
        limits,
        ..Setup::default()
    });
    let sleeper = Wire::negotiated(&server.path());
    let mut reader = Client::connect(&server.path()).unwrap();
    server.wait_clients(2);
    let mut seen = 0;
    for _ in 0..100 {
        reader.call(&TOY_EVENTS, ToyNumber { value: 200 }).unwrap();
        while reader.next_event(Duration::ZERO).unwrap().is_some() {
            seen += 1;
        }
    }
    server.wait_clients(1);
    while seen < 20_000 {
        seen += u32::from(reader.next_event(wire::PATIENCE).unwrap().is_some());
    }
    let rest = sleeper.rest();
    assert!(
        rest.starts_with(b"{\"timestamp\""),
        "what was sent before can still be read"
    );
    assert!(rest.len() < 2 << 20, "{} bytes", rest.len());
}

#[test]
fn too_many_clients_are_told_so() {
    let limits = ServerLimits {
        clients: 3,
        ..ServerLimits::default()
    };
    let server = ToyServer::start(Setup {
        limits,
        ..Setup::default()
    });
    let mut clients: Vec<Client> = (0..3)
        .map(|_| Client::connect(&server.path()).unwrap())
        .collect();
    let error = Client::connect(&server.path()).unwrap_err().to_string();
    assert!(
        error.contains("too many connections, the limit is 3"),
        "{error}"
    );
    clients.pop();
    server.wait_clients(2);
    Client::connect(&server.path()).unwrap();
}

/// A client that was told to stop asking, or has crashed, takes nobody's place, whatever is still done for it.
#[test]
fn clients_that_go_while_their_commands_take_long_make_room() {
    let limits = ServerLimits {
        clients: 2,
        ..ServerLimits::default()
    };
    let server = ToyServer::start(Setup {
        limits,
        ..Setup::default()
    });
    for _ in 0..3 {
        let mut gone = Wire::negotiated(&server.path());
        // Half closed, as by a script that has said all it has to say: it still gets its answer.
        let mut finished = Wire::negotiated(&server.path());
        gone.send(r#"{"execute": "x-toy-sleep", "arguments": {"value": 1000000}}"#);
        finished.send(r#"{"execute": "x-toy-sleep", "arguments": {"value": 2500}}"#);
        finished.socket.shutdown(Shutdown::Write).unwrap();
        drop(gone);
        assert_eq!(finished.line()["return"], 2500);
        drop(finished);
        server.wait_clients(0);
    }
    // What is done for nobody but its client ends with that.
    let mut gone = Wire::negotiated(&server.path());
    gone.send(r#"{"execute": "x-toy-wait", "arguments": {"value": 1000000}}"#);
    let mut other = Client::connect(&server.path()).unwrap();
    let mut waiting = || other.call(&TOY_WAITING, Empty {}).unwrap();
    wait_until(|| waiting() > 0);
    drop(gone);
    wait_until(|| waiting() == 0);
}

#[test]
fn the_server_ends_with_clients_in_every_state() {
    let server = ToyServer::start(Setup::default());
    let mut wires: Vec<Wire> = (0..5).map(|_| Wire::negotiated(&server.path())).collect();
    wires[1].send("{\"execute\": ");
    wires[2].send(r#"{"execute": "x-toy-sleep", "arguments": {"value": 100}}"#);
    wires[3].send(r#"{"execute": "x-toy-text", "arguments": {"value": 3000000}}"#);
    wires[4].send("[".repeat(5000));
    let _greeted = UnixStream::connect(server.path()).unwrap();
    server.wait_clients(6);
    let (told, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(server);
        told.send(()).unwrap();
    });
    hear.recv_timeout(wire::PATIENCE).expect("it does not end");
}

#[test]
fn a_command_that_was_begun_is_finished_at_the_end() {
    let clock = ManualClock::new();
    let executor = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    let server = ToyServer::start(Setup {
        executor,
        ..Setup::default()
    });
    let mut wire = Wire::negotiated(&server.path());
    wire.send(r#"{"execute": "x-toy-wait", "arguments": {"value": 100}}"#);
    let mut other = Client::connect(&server.path()).unwrap();
    wait_until(|| other.call(&TOY_WAITING, Empty {}).unwrap() == 1);
    drop(other);
    std::thread::scope(|scope| {
        let ends = scope.spawn(|| drop(server));
        // Before the time for the end is over.
        std::thread::sleep(Duration::from_millis(50));
        assert!(!ends.is_finished());
        clock.advance(Duration::from_millis(100));
        assert_eq!(wire.line(), json!({"return": 100}));
    });
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < wire::PATIENCE, "it does not come to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_sent_a_control_character_brings_the_server_back(
        input in proptest::collection::vec(
            prop_oneof![
                Just(&b"{\"execute\":\"query-status\"}"[..]), Just(&b"{"[..]), Just(&b"["[..]), Just(&b"}"[..]), Just(&b"\""[..]), Just(&b"\\"[..]),
                Just(&b"\n"[..]), Just(&b"'"[..]), Just(&b"1"[..]), Just(&b"\xe9"[..]), Just(&b"\"execute\":"[..]), Just(&b"null"[..]),
            ],
            0..40,
        ),
    ) {
        let server = ToyServer::start(Setup::default());
        let mut wire = Wire::negotiated(&server.path());
        wire.send(input.concat());
        wire.send(b"\x01{\"execute\":\"query-status\",\"id\":\"after\"}");
        loop {
            let answer = wire.line();
            if answer["id"] == "after" {
                prop_assert_eq!(&answer["return"]["running"], &json!(true));
                break;
            }
        }
    }
}
