// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a well-behaved client sees: greeting, negotiation, answers, events, introspection.

#[allow(dead_code)]
mod toy;
#[allow(dead_code)]
mod wire;

use std::net::Shutdown;
use std::time::Duration;

use ebbtide_iothread::{Config, ManualClock};
use ebbtide_qmp::client::Client;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::monitor::HumanMonitorCommand;
use ebbtide_qmp::types::qom::{QomGet, QomSet};
use ebbtide_qmp::types::run_state::RunState;
use ebbtide_qmp::{Error, ErrorClass, commands};
use serde_json::{Value, json};
use toy::server::{Setup, ToyServer};
use toy::{TOY_EVENTS, TOY_SIZE, TOY_SLEEP, TOY_WAITING, ToyNumber};
use wire::Wire;

/// Long enough for a server to say what it should not.
const QUIET: Duration = Duration::from_millis(50);

/// A clock that is turned, and an executor that goes by it.
fn turned() -> (ManualClock, Config) {
    let clock = ManualClock::new();
    let executor = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    (clock, executor)
}

#[test]
fn the_conversation_begins_as_with_qemu() {
    let server = ToyServer::start(Setup::default());
    let (mut wire, greeting) = Wire::connect(&server.path());
    let package = format!("ebbtide {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        greeting,
        json!({"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": package}, "capabilities": []}})
    );
    let early = json!({"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}, "id": 1});
    assert_eq!(wire.ask(r#"{"execute": "query-status", "id": 1}"#), early);
    assert_eq!(wire.ask(r#"{"execute": "nope", "id": 1}"#), early);
    let enable = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#;
    assert_eq!(wire.refused(enable), "QMP capability 'oob' not available");
    let enable = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["foo"]}}"#;
    assert_eq!(
        wire.refused(enable),
        "Parameter 'enable[0]' does not accept value 'foo'"
    );
    assert_eq!(
        wire.ask(r#"{"execute": "qmp_capabilities", "arguments": {"enable": []}}"#),
        json!({"return": {}})
    );
    assert_eq!(
        wire.ask(r#"{"execute": "qmp_capabilities"}"#)["error"],
        json!({"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"})
    );
    assert_eq!(
        wire.ask(r#"{"execute": "query-status"}"#),
        json!({"return": {"running": true, "status": "running"}})
    );
}

#[test]
fn an_id_of_any_type_comes_back() {
    let server = ToyServer::start(Setup::default());
    let mut wire = Wire::negotiated(&server.path());
    for id in [
        json!(null),
        json!(true),
        json!(-7),
        json!(12345678901234567890u64),
        json!(1.5),
        json!("a\u{0}b \u{1F980}"),
        json!([1, [2]]),
        json!({"execute": "quit", "id": {}}),
    ] {
        let answer = wire.ask(json!({"execute": "stop", "id": id}).to_string());
        let answer = if answer.get("event").is_some() {
            wire.line()
        } else {
            answer
        };
        assert_eq!(answer, json!({"return": {}, "id": id}));
        let answer = wire.ask(json!({"id": id, "execute": "nope"}).to_string());
        assert_eq!(
            (&answer["id"], &answer["error"]["class"]),
            (&id, &json!("CommandNotFound"))
        );
    }
}

#[test]
fn pipelined_commands_are_answered_in_order_one_at_a_time() {
    let server = ToyServer::start(Setup::default());
    let mut wire = Wire::negotiated(&server.path());
    let sleeps = [30, 0, 20, 10, 0];
    let requests: String = sleeps
        .iter()
        .enumerate()
        .map(|(id, ms)| {
            format!(r#"{{"execute":"x-toy-sleep","arguments":{{"value":{ms}}},"id":{id}}}"#)
        })
        .collect();
    // No newline anywhere, and cut in the middle of words.
    for piece in requests.as_bytes().chunks(7) {
        wire.send(piece);
    }
    for (id, ms) in sleeps.iter().enumerate() {
        assert_eq!(wire.line(), json!({"return": ms, "id": id}));
    }
    let many: String = (0..2000)
        .map(|id| format!("{{\"execute\":\"query-status\",\"id\":{id}}}\n"))
        .collect();
    let mut writer = wire.socket.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || std::io::Write::write_all(&mut writer, many.as_bytes()).unwrap());
        for id in 0..2000 {
            assert_eq!(wire.line()["id"], id);
        }
    });
}

#[test]
fn a_slow_command_does_not_hold_up_other_clients() {
    // In a time that stands still.
    let (clock, executor) = turned();
    let server = ToyServer::start(Setup {
        more_sockets: 1,
        executor,
        ..Setup::default()
    });
    let mut slow = Wire::negotiated(&server.path());
    slow.send(r#"{"execute": "x-toy-wait", "arguments": {"value": 1500}}"#);
    let mut other = Client::connect(&server.path_of(1)).unwrap();
    while other.call(&TOY_WAITING, Empty {}).unwrap() == 0 {}
    for _ in 0..10 {
        other.call(&commands::QUERY_STATUS, Empty {}).unwrap();
    }
    assert_eq!(other.call(&TOY_WAITING, Empty {}).unwrap(), 1);
    clock.advance(Duration::from_millis(1500));
    assert_eq!(slow.line(), json!({"return": 1500}));
}

#[test]
fn events_go_to_negotiated_clients_only() {
    let server = ToyServer::start(Setup {
        more_sockets: 1,
        ..Setup::default()
    });
    let mut first = Client::connect(&server.path()).unwrap();
    let mut second = Client::connect(&server.path_of(1)).unwrap();
    let (mut silent, _) = Wire::connect(&server.path());
    server.wait_clients(3);
    first.call(&commands::STOP, Empty {}).unwrap();
    first.call(&commands::CONT, Empty {}).unwrap();
    for client in [&mut first, &mut second] {
        for name in ["STOP", "RESUME"] {
            let event = client
                .next_event(wire::PATIENCE)
                .unwrap()
                .expect("an event");
            assert_eq!((event.name.as_str(), event.data.len()), (name, 0));
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_secs() as i64;
            assert!(
                (now - 30..=now).contains(&event.timestamp.seconds),
                "{:?}",
                event.timestamp
            );
        }
    }
    // The next thing the third gets is the answer to its first command.
    assert_eq!(
        silent.ask(r#"{"execute": "qmp_capabilities"}"#),
        json!({"return": {}})
    );
    first.call(&commands::SYSTEM_RESET, Empty {}).unwrap();
    assert_eq!(
        silent.line()["data"],
        json!({"guest": false, "reason": "host-qmp-system-reset"})
    );
    assert!(
        first
            .next_event(wire::PATIENCE)
            .unwrap()
            .is_some_and(|event| event.name == "RESET")
    );
    assert!(
        first
            .next_event(Duration::from_millis(20))
            .unwrap()
            .is_none()
    );
}

#[test]
fn size_changes_come_once_a_second_and_the_last_always() {
    let (clock, executor) = turned();
    let server = ToyServer::start(Setup {
        executor,
        ..Setup::default()
    });
    let mut client = Client::connect(&server.path()).unwrap();
    let size = |client: &mut Client, limit| {
        client
            .next_event(limit)
            .unwrap()
            .map(|event| event.data["size"].as_u64().unwrap())
    };
    let change = |client: &mut Client, value| client.call(&TOY_SIZE, ToyNumber { value }).unwrap();
    for value in 1..=5 {
        change(&mut client, value);
    }
    assert_eq!(size(&mut client, wire::PATIENCE), Some(1));
    assert_eq!(size(&mut client, QUIET), None);
    clock.advance(Duration::from_millis(999));
    assert_eq!(size(&mut client, QUIET), None);
    clock.advance(Duration::from_millis(1));
    assert_eq!(size(&mut client, wire::PATIENCE), Some(5));
    change(&mut client, 6);
    assert_eq!(size(&mut client, QUIET), None);
    clock.advance(Duration::from_secs(1));
    assert_eq!(size(&mut client, wire::PATIENCE), Some(6));
    // Nothing for a while: the next goes out at once again.
    clock.advance(Duration::from_secs(1));
    assert_eq!(size(&mut client, QUIET), None);
    change(&mut client, 7);
    assert_eq!(size(&mut client, wire::PATIENCE), Some(7));
    // Other events are not held back meanwhile.
    client.call(&TOY_EVENTS, ToyNumber { value: 3 }).unwrap();
    for _ in 0..3 {
        assert_eq!(
            client.next_event(wire::PATIENCE).unwrap().unwrap().name,
            "RESUME"
        );
    }
}

#[test]
fn arguments_are_checked_before_the_machine_sees_them() {
    let server = ToyServer::start(Setup::default());
    let mut wire = Wire::negotiated(&server.path());
    for (request, desc) in [
        (
            r#"{"execute": "query-status", "arguments": {"x": 1}}"#,
            "Parameter 'x' is unexpected",
        ),
        (
            r#"{"execute": "qom-get", "arguments": {"path": "vmem0"}}"#,
            "Parameter 'property' is missing",
        ),
        (
            r#"{"execute": "qom-get", "arguments": {"path": 1, "property": "size"}}"#,
            "Invalid parameter type for 'path', expected: string",
        ),
        (
            r#"{"execute": "query-status", "arguments": []}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute": 1}"#,
            "QMP input member 'execute' must be a string",
        ),
        (
            r#"{"execute": "query-status", "foo": 1}"#,
            "QMP input member 'foo' is unexpected",
        ),
        (
            r#"{"exec-oob": "query-status"}"#,
            "QMP input member 'exec-oob' is unexpected",
        ),
        (r#"{"id": 5}"#, "QMP input lacks member 'execute'"),
        ("[]", "QMP input must be a JSON object"),
    ] {
        assert_eq!(wire.refused(request), desc);
    }
}

#[test]
fn the_machine_can_be_looked_at_and_resized() {
    let server = ToyServer::start(Setup::default());
    let mut client = Client::connect(&server.path()).unwrap();
    let get = |client: &mut Client, property: &str| {
        client.call(
            &commands::QOM_GET,
            QomGet {
                path: "/machine/peripheral/vmem0".into(),
                property: property.into(),
            },
        )
    };
    assert_eq!(get(&mut client, "size").unwrap(), 0);
    let set = QomSet {
        path: "/machine/peripheral/vmem0".into(),
        property: "requested-size".into(),
        value: json!(128u64 << 20),
    };
    client.call(&commands::QOM_SET, set).unwrap();
    let event = client
        .wait_event("MEMORY_DEVICE_SIZE_CHANGE", wire::PATIENCE)
        .unwrap();
    assert_eq!(event.data["qom-path"], "/machine/peripheral/vmem0");
    while get(&mut client, "size").unwrap() != 128u64 << 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    match get(&mut client, "nope") {
        Err(Error::Command { command, error }) => {
            assert_eq!(
                (command.as_str(), error.class),
                ("qom-get", ErrorClass::GenericError)
            );
            assert_eq!(error.desc, "Property 'virtio-mem-pci.nope' not found");
        }
        other => panic!("{other:?}"),
    }
    let line = |text: &str| HumanMonitorCommand {
        command_line: text.into(),
        cpu_index: None,
    };
    let mut human = |text: &str| {
        client
            .call(&commands::HUMAN_MONITOR_COMMAND, line(text))
            .unwrap()
    };
    assert_eq!(human("qom-set vmem0 requested-size 300M"), "");
    assert_eq!(human("qom-get vmem0 requested-size"), "314572800\r\n");
    assert!(
        human("qom-set vmem0 requested-size 300Q")
            .starts_with("Error: requested-size: '300Q' is not a size")
    );
    assert_eq!(human("info nope"), "unknown command: 'info nope'\r\n");
    assert_eq!(human("qom-list nope"), "Error: Device 'nope' not found\r\n");
}

#[test]
fn commands_and_schema_tell_the_same() {
    let server = ToyServer::start(Setup::default());
    let mut client = Client::connect(&server.path()).unwrap();
    let names: Vec<String> = client
        .call(&commands::QUERY_COMMANDS, Empty {})
        .unwrap()
        .into_iter()
        .map(|command| command.name)
        .collect();
    let schema = client.call(&commands::QUERY_QMP_SCHEMA, Empty {}).unwrap();
    let of_kind = |kind: &str| -> Vec<String> {
        let of_kind = schema.iter().filter(|entity| entity.0["meta-type"] == kind);
        of_kind
            .map(|entity| entity.0["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(of_kind("command"), names);
    assert!(
        [
            "qmp_capabilities",
            "query-qmp-schema",
            "qom-set",
            "x-ebbtide-query-resize"
        ]
        .iter()
        .all(|name| names.contains(&(*name).to_owned()))
    );
    assert!(of_kind("event").contains(&"MEMORY_DEVICE_SIZE_CHANGE".to_owned()));
    // Every command that is listed is known, whatever it says to missing arguments.
    for name in names
        .iter()
        .filter(|name| !["qmp_capabilities", "quit"].contains(&name.as_str()))
    {
        if let Err(Error::Command { error, .. }) = client.execute(name, Value::Null) {
            assert_ne!(error.class, ErrorClass::CommandNotFound, "{name}");
        }
    }
}

#[test]
fn a_half_closed_client_gets_its_answers() {
    let server = ToyServer::start(Setup::default());
    let (mut wire, _) = Wire::connect(&server.path());
    wire.send(r#"{"execute": "qmp_capabilities"}{"execute": "x-toy-sleep", "arguments": {"value": 50}} nonsense"#);
    wire.socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(wire.line(), json!({"return": {}}));
    assert_eq!(wire.line(), json!({"return": 50}));
    assert_eq!(
        wire.line()["error"]["desc"],
        "JSON parse error, invalid keyword 'nonsense'"
    );
    assert_eq!(wire.rest(), b"");
    server.wait_clients(0);
}

#[test]
fn quit_is_answered_before_the_connection_ends() {
    let mut server = ToyServer::start(Setup::default());
    let mut client = Client::connect(&server.path()).unwrap();
    let mut other = Client::connect(&server.path()).unwrap();
    client.call(&commands::QUIT, Empty {}).unwrap();
    for client in [&mut client, &mut other] {
        let event = client.next_event(wire::PATIENCE).unwrap().unwrap();
        assert_eq!(
            (event.name.as_str(), &event.data["reason"]),
            ("SHUTDOWN", &json!("host-qmp-quit"))
        );
        assert!(matches!(
            client.next_event(wire::PATIENCE),
            Err(Error::Closed { .. })
        ));
    }
    server.join();
    assert!(matches!(
        Client::connect(&server.path()),
        Err(Error::Connect { .. })
    ));
}

#[test]
fn the_client_times_out_and_goes_on() {
    let (clock, executor) = turned();
    let server = ToyServer::start(Setup {
        executor,
        ..Setup::default()
    });
    let mut client = Client::connect(&server.path()).unwrap();
    client.set_answer_timeout(Duration::from_millis(50));
    let error = client
        .call(&TOY_SLEEP, ToyNumber { value: 300 })
        .unwrap_err();
    assert!(
        matches!(error, Error::TimedOut { .. }) && error.to_string().contains("x-toy-sleep"),
        "{error}"
    );
    client.set_answer_timeout(wire::PATIENCE);
    clock.advance(Duration::from_millis(300));
    // The late answer is not taken for this one's.
    assert_eq!(
        client
            .call(&commands::QUERY_STATUS, Empty {})
            .unwrap()
            .status,
        RunState::Running
    );
}
