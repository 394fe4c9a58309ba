// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that come and go.

use std::time::Duration;

use ebbtide_iothread::{Config, ManualClock};

use super::toy::plug::Guest;
use super::*;

fn guest(guest: Guest) -> ToyServer {
    let toy = ToyConfig {
        guest,
        ..ToyConfig::default()
    };
    ToyServer::start(Setup {
        toy,
        ..Setup::default()
    })
}

/// A machine whose guest lets go when its time is turned.
fn turned(without_removals: bool) -> (ToyServer, ManualClock) {
    let clock = ManualClock::new();
    let executor = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    let toy = ToyConfig {
        without_removals,
        guest: Guest::default(),
        ..ToyConfig::default()
    };
    let server = ToyServer::start(Setup {
        toy,
        executor,
        ..Setup::default()
    });
    (server, clock)
}

fn fail(server: &ToyServer, words: &[&str]) -> String {
    run(server, words).unwrap_err().to_string()
}

/// A QMP command, whose answer or refusal is returned.
fn qmp(server: &ToyServer, command: &str, arguments: Value) -> Result<Value, String> {
    let request = json!({"execute": command, "arguments": arguments}).to_string();
    match run(server, &["qmp", &request, "--json"]) {
        Ok((_, text)) => Ok(serde_json::from_str(&text).unwrap()),
        Err(failure) => Err(failure.to_string()),
    }
}

fn memory_devices(server: &ToyServer) -> Value {
    qmp(server, "query-memory-devices", json!({})).unwrap()
}

/// Turns the clock until the device is gone, as seen by somebody else.
fn wait_gone(server: &ToyServer, clock: &ManualClock, id: &str) {
    let path = format!("/machine/peripheral/{id}");
    wait_until(|| {
        clock.advance(Duration::from_millis(10));
        qmp(server, "qom-list", json!({ "path": path })).is_err()
    });
}

#[test]
fn a_dimm_comes_and_goes_with_its_memory() {
    let server = guest(Guest::default());
    let (outcome, report) = run_json(&server, &["plug-dimm", "1G"]);
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(
        report,
        json!({"id": "dimm0", "driver": "pc-dimm", "backend": "mem-dimm0"})
    );
    let dimm = &memory_devices(&server)[1];
    assert_eq!(
        (
            &dimm["type"],
            &dimm["data"]["size"],
            &dimm["data"]["memdev"]
        ),
        (&json!("dimm"), &json!(G), &json!("/objects/mem-dimm0"))
    );
    let (_, text) = run(&server, &["plug-dimm", "512M", "--backend", "memfd"]).unwrap();
    assert_eq!(text, "dimm1: a DIMM of 512 MiB\n", "the next free id");
    let (outcome, report) = run_json(&server, &["unplug", "dimm0", "--wait", "--timeout", "20"]);
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(
        keys(&report),
        ["id", "result", "phase", "ms", "backend", "reason"]
    );
    assert_eq!(
        json!([
            report["result"],
            report["phase"],
            report["backend"],
            report["reason"]
        ]),
        json!(["deleted", null, "mem-dimm0", null])
    );
    assert_eq!(report["ms"].as_u64().map(|ms| ms >= 40), Some(true));
    let (_, text) = run(&server, &["unplug", "dimm1", "--wait"]).unwrap();
    assert!(
        text.starts_with("dimm1 is gone after ") && text.ends_with(" s, and memory mem-dimm1\n"),
        "{text}"
    );
    assert_eq!(memory_devices(&server).as_array().map(Vec::len), Some(1));
    run(&server, &["plug-dimm", "1G", "--id", "dimm0"]).unwrap();
}

#[test]
fn what_is_refused_half_way_is_undone() {
    let server = guest(Guest::default());
    assert_eq!(
        fail(&server, &["plug-dimm", "1G", "--node", "3"]),
        "device_add: GenericError: this machine has node 0 only"
    );
    assert_eq!(
        qmp(&server, "object-del", json!({"id": "mem-dimm0"})),
        Err("object-del: GenericError: object 'mem-dimm0' not found".into())
    );
    assert_eq!(
        fail(&server, &["disk", "add", "/a", "--id", "vmem0"]),
        "device_add: GenericError: Duplicate device ID 'vmem0'"
    );
    let node = json!({"node-name": "node-vmem0"});
    assert!(qmp(&server, "blockdev-del", node).is_err());
    assert_eq!(
        fail(&server, &["net", "add", "user"]),
        "netdev_add: GenericError: Parameter 'type' does not accept value 'user'"
    );
    run(&server, &["net", "add", "tap,ifname=t0", "--id", "n"]).unwrap();
    assert_eq!(
        fail(&server, &["net", "add", "tap", "--id", "n"]),
        "netdev_add: GenericError: Duplicate ID 'net-n'"
    );
    // What was there before stays.
    run(&server, &["net", "remove", "n", "--wait"]).unwrap();
}

#[test]
fn a_disk_and_a_network_come_and_go() {
    let server = guest(Guest::default());
    let (_, text) = run(&server, &["disk", "add", "a.img", "--readonly", "--direct"]).unwrap();
    let absolute = std::env::current_dir().unwrap().join("a.img");
    assert_eq!(text, format!("disk0: {}, read-only\n", absolute.display()));
    let (_, report) = run_json(&server, &["disk", "add", "/b", "--serial", "s"]);
    assert_eq!(
        report,
        json!({"id": "disk1", "driver": "virtio-blk-pci", "backend": "node-disk1"})
    );
    let (outcome, report) = run_json(&server, &["disk", "remove", "disk1", "--wait"]);
    assert_eq!(
        (outcome, &report["result"], &report["backend"]),
        (Outcome::Done, &json!("deleted"), &json!("node-disk1"))
    );
    let (_, report) = run_json(
        &server,
        &["net", "add", "tap", "--mac", "52:54:00:12:34:56"],
    );
    assert_eq!(
        report,
        json!({"id": "nic0", "driver": "virtio-net-pci", "backend": "net-nic0"})
    );
    let (_, text) = run(&server, &["net", "remove", "nic0", "--wait"]).unwrap();
    assert!(text.ends_with("and network backend net-nic0\n"), "{text}");
    assert_eq!(
        fail(&server, &["disk", "remove", "nope", "--wait"]),
        "device_del: DeviceNotFound: Device 'nope' not found"
    );
}

#[test]
fn a_backend_with_another_name_is_the_devices_too_and_memory_is_not() {
    let server = guest(Guest::default());
    qmp(
        &server,
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "mine"}),
    )
    .unwrap();
    qmp(
        &server,
        "device_add",
        json!({"driver": "virtio-blk-pci", "id": "d", "drive": "mine"}),
    )
    .unwrap();
    let (_, report) = run_json(&server, &["disk", "remove", "d", "--wait"]);
    assert_eq!(report["backend"], "mine");
    qmp(
        &server,
        "object-add",
        json!({"qom-type": "memory-backend-ram", "id": "mine", "size": 1}),
    )
    .unwrap();
    qmp(
        &server,
        "device_add",
        json!({"driver": "pc-dimm", "id": "d", "memdev": "mine"}),
    )
    .unwrap();
    let (_, report) = run_json(&server, &["unplug", "d", "--wait"]);
    assert_eq!(
        (&report["result"], &report["backend"]),
        (&json!("deleted"), &json!(null))
    );
    assert!(qmp(&server, "object-del", json!({"id": "mine"})).is_ok());
}

#[test]
fn a_guest_that_refuses_is_exit_code_3_and_its_reason_is_told() {
    let server = guest(Guest::Refuses { status: 0x82 });
    run(&server, &["plug-dimm", "1G"]).unwrap();
    let (outcome, report) = run_json(&server, &["unplug", "dimm0", "--wait"]);
    assert_eq!(
        (outcome, &report["result"], &report["reason"]),
        (
            Outcome::PartialOrStalled,
            &json!("refused"),
            &json!("the device is busy (_OST 0x82)")
        )
    );
    let (outcome, text) = run(&server, &["unplug", "dimm0", "--wait"]).unwrap();
    assert_eq!(outcome, Outcome::PartialOrStalled, "it can be asked again");
    assert_eq!(
        text,
        "dimm0 stays, the guest refuses: the device is busy (_OST 0x82)\n"
    );
    assert_eq!(memory_devices(&server).as_array().map(Vec::len), Some(2));
}

#[test]
fn a_wait_can_time_out_be_repeated_and_be_forced() {
    let server = guest(Guest::Silent);
    run(&server, &["disk", "add", "/a", "--id", "d"]).unwrap();
    for _ in 0..2 {
        let words = ["disk", "remove", "d", "--wait", "--timeout", "0.2"];
        let (outcome, report) = run_json(&server, &words);
        assert_eq!(
            (outcome, &report["result"], &report["phase"]),
            (Outcome::TimedOut, &json!("timeout"), &json!("requested"))
        );
        let reason = report["reason"].as_str().unwrap();
        assert!(reason.ends_with("the guest has not answered"), "{reason}");
    }
    let (outcome, report) = run_json(&server, &["disk", "remove", "d", "--wait", "--force"]);
    assert_eq!(
        (outcome, &report["result"], &report["backend"]),
        (Outcome::Done, &json!("deleted"), &json!("node-d"))
    );
}

#[test]
fn what_holds_a_removal_is_named() {
    let server = guest(Guest::LetsGo {
        after: Duration::ZERO,
        drain: Duration::from_secs(60),
    });
    run(&server, &["disk", "add", "/a", "--id", "d"]).unwrap();
    run(&server, &["disk", "remove", "d"]).unwrap();
    wait_until(|| {
        let removals = qmp(&server, "x-ebbtide-query-removals", json!({})).unwrap();
        removals[0]["phase"] == "draining"
    });
    let words = ["disk", "remove", "d", "--wait", "--timeout", "0.3"];
    let (outcome, text) = run(&server, &words).unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    assert!(
        text.contains("the removal of d goes on: draining for ")
            && text.contains(" s, held by 1 request ("),
        "{text}"
    );
}

#[test]
fn without_a_wait_the_backend_is_closed_by_the_next_call() {
    let (server, clock) = turned(false);
    run(&server, &["disk", "add", "/a", "--id", "d"]).unwrap();
    let (outcome, report) = run_json(&server, &["disk", "remove", "d"]);
    assert_eq!(
        (outcome, &report["result"], &report["phase"]),
        (Outcome::Done, &json!(null), &json!("requested"))
    );
    wait_gone(&server, &clock, "d");
    let (outcome, text) = run(&server, &["disk", "remove", "d", "--wait"]).unwrap();
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(text, "d was gone already; block node node-d is closed\n");
    assert!(fail(&server, &["disk", "remove", "d"]).contains("Device 'd' not found"));
}

#[test]
fn a_removal_somebody_withdraws_is_exit_code_3() {
    let server = guest(Guest::Silent);
    run(&server, &["plug-dimm", "1G"]).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&server, &["unplug", "dimm0", "--wait"]));
        wait_until(|| qmp(&server, "x-ebbtide-query-removals", json!({})) != Ok(json!([])));
        qmp(&server, "x-ebbtide-device-cancel", json!({"id": "dimm0"})).unwrap();
        let (outcome, text) = waiting.join().unwrap().unwrap();
        assert_eq!(outcome, Outcome::PartialOrStalled);
        assert_eq!(text, "dimm0 stays: the removal was withdrawn\n");
    });
}

#[test]
fn a_machine_that_ends_meanwhile_is_an_error() {
    let server = guest(Guest::Silent);
    run(&server, &["plug-dimm", "1G"]).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&server, &["unplug", "dimm0", "--wait"]));
        wait_until(|| qmp(&server, "x-ebbtide-query-removals", json!({})) != Ok(json!([])));
        run(&server, &["qmp", "quit"]).unwrap();
        let error = waiting.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("before the device was gone"), "{error}");
    });
}

#[test]
fn a_server_without_a_list_of_removals_will_do() {
    let (server, clock) = turned(true);
    run(&server, &["plug-dimm", "1G"]).unwrap();
    let (outcome, text) = run(&server, &["unplug", "dimm0"]).unwrap();
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(
        text,
        "removal of dimm0 requested; memory mem-dimm0 stays until somebody waits for it (--wait)\n"
    );
    let words = ["unplug", "dimm0", "--wait", "--timeout", "60"];
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| run_json(&server, &words));
        // Time goes on when it waits, or is about to.
        server.wait_clients(1);
        wait_until(|| {
            clock.advance(Duration::from_millis(10));
            waiting.is_finished()
        });
        let (outcome, report) = waiting.join().unwrap();
        assert_eq!(
            (outcome, &report["result"], &report["backend"]),
            (Outcome::Done, &json!("deleted"), &json!("mem-dimm0"))
        );
    });
}

/// A removal nobody has waited for leaves the backend, and with it a name.
#[test]
fn an_id_that_is_chosen_is_free_for_the_backend_too() {
    let (server, clock) = turned(false);
    for (add, remove, prefix) in [
        (&["disk", "add", "/a"], &["disk", "remove"], "disk"),
        (&["net", "add", "tap"], &["net", "remove"], "nic"),
    ] {
        let first = format!("{prefix}0");
        run(&server, add).unwrap();
        run(&server, &[remove[0], remove[1], &first]).unwrap();
        wait_gone(&server, &clock, &first);
        let (_, report) = run_json(&server, add);
        assert_eq!(report["id"], json!(format!("{prefix}1")));
        // Not so one that was asked for.
        let asked = [add[0], add[1], add[2], "--id", &first];
        assert!(fail(&server, &asked).contains("uplicate"), "{prefix}");
    }
}

#[test]
fn what_is_no_disk_is_not_removed_as_one() {
    let server = guest(Guest::default());
    run(&server, &["plug-dimm", "1G", "--id", "dimm0"]).unwrap();
    run(&server, &["disk", "add", "/a", "--id", "d"]).unwrap();
    run(&server, &["net", "add", "tap", "--id", "n"]).unwrap();
    for (words, refusal) in [
        (
            ["disk", "remove", "n", "--wait"],
            "n is no disk: it is a virtio-net-pci; `unplug n` removes whatever it is",
        ),
        (
            ["disk", "remove", "dimm0", "--force"],
            "dimm0 is no disk: it is a pc-dimm; `unplug dimm0` removes whatever it is",
        ),
        (
            ["net", "remove", "d", "--wait"],
            "d is no network device: it is a virtio-blk-pci; `unplug d` removes whatever it is",
        ),
    ] {
        assert_eq!(fail(&server, &words), refusal);
    }
    std::thread::sleep(Duration::from_millis(300));
    for id in ["dimm0", "d", "n"] {
        let path = format!("/machine/peripheral/{id}");
        assert!(qmp(&server, "qom-list", json!({ "path": path })).is_ok());
    }
    for words in [
        ["disk", "remove", "d", "--wait"],
        ["net", "remove", "n", "--wait"],
    ] {
        assert_eq!(run(&server, &words).unwrap().0, Outcome::Done);
    }
}

#[test]
fn usage_errors_of_devices() {
    for (words, parts) in [
        (&["plug-dimm", "1x"][..], &["<SIZE>", "512M"][..]),
        (&["plug-dimm", "1G", "--backend", "file"], &["--path"]),
        (
            &["plug-dimm", "1G", "--backend", "tape"],
            &["ram, memfd, file"],
        ),
        (&["unplug"], &["<ID>"]),
        (&["unplug", "d", "--timeout", "3"], &["--wait"]),
        (&["disk"], &["add", "remove"]),
        (&["disk", "add"], &["<PATH>"]),
        (&["net", "add", "tap,id=x"], &["<NETWORK>", "--id"]),
        (&["net", "add", ""], &["<NETWORK>"]),
    ] {
        let error = parse(words).err().unwrap();
        assert_eq!(error.exit_code(), 2, "{words:?}");
        assert!(
            parts.iter().all(|part| error.to_string().contains(part)),
            "{words:?}: {error}"
        );
    }
    let server = guest(Guest::Silent);
    assert_eq!(
        fail(&server, &["plug-dimm", "1G", "--path", "/x"]),
        "--path /x goes with --backend file, not memory-backend-ram"
    );
}
