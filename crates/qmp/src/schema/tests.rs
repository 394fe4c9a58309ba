// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::*;
use crate::commands;
use crate::types::ebbtide;
use crate::types::events;
use crate::types::memory::{MemoryDeviceInfo, MemorySizeSummary, VirtioMemDeviceInfo};
use crate::types::monitor::VersionInfo;
use crate::types::qom::ObjectPropertyInfo;
use crate::types::run_state::{RunState, ShutdownCause, StatusInfo};

fn refusal(command: CommandInfo, arguments: Value) -> String {
    let Value::Object(arguments) = arguments else {
        panic!("arguments are an object")
    };
    command.check_arguments(&arguments).unwrap_err().desc
}

#[test]
fn arguments_are_checked_in_qemus_words() {
    let (get, set, hmp) = (
        commands::QOM_GET.info(),
        commands::QOM_SET.info(),
        commands::HUMAN_MONITOR_COMMAND.info(),
    );
    for (command, arguments, desc) in [
        (get, json!({}), "Parameter 'path' is missing"),
        (get, json!({"path": "/"}), "Parameter 'property' is missing"),
        (
            get,
            json!({"path": 1, "property": "x"}),
            "Invalid parameter type for 'path', expected: string",
        ),
        (
            get,
            json!({"path": null, "property": "x"}),
            "Invalid parameter type for 'path', expected: string",
        ),
        (
            get,
            json!({"path": "/", "property": "x", "zz": 1}),
            "Parameter 'zz' is unexpected",
        ),
        (
            set,
            json!({"path": "/", "property": "x"}),
            "Parameter 'value' is missing",
        ),
        (
            hmp,
            json!({"command-line": "x", "cpu-index": "0"}),
            "Invalid parameter type for 'cpu-index', expected: integer",
        ),
        (
            hmp,
            json!({"command-line": "x", "cpu-index": 1.0}),
            "Invalid parameter type for 'cpu-index', expected: integer",
        ),
        (
            commands::STOP.info(),
            json!({"x": 1}),
            "Parameter 'x' is unexpected",
        ),
        (
            commands::QMP_CAPABILITIES.info(),
            json!({"enable": "oob"}),
            "Invalid parameter type for 'enable', expected: array",
        ),
        (
            commands::QMP_CAPABILITIES.info(),
            json!({"enable": [1]}),
            "Invalid parameter type for 'enable[0]', expected: string",
        ),
        (
            commands::QMP_CAPABILITIES.info(),
            json!({"enable": ["oob", "foo"]}),
            "Parameter 'enable[1]' does not accept value 'foo'",
        ),
    ] {
        assert_eq!(refusal(command, arguments), desc);
    }
    for (command, arguments) in [
        (set, json!({"path": "/", "property": "x", "value": null})),
        (
            set,
            json!({"path": "/", "property": "x", "value": {"any": ["thing"]}}),
        ),
        (hmp, json!({"command-line": "x"})),
        (hmp, json!({"command-line": "x", "cpu-index": u64::MAX})),
    ] {
        assert_eq!(
            command.check_arguments(arguments.as_object().unwrap()),
            Ok(()),
            "{arguments}"
        );
    }
}

/// One value of each type that goes over the wire, with every optional member present and absent.
fn samples() -> Vec<(CommandInfo, Value)> {
    let mut virtio_mem = VirtioMemDeviceInfo {
        id: Some("vmem0".into()),
        memaddr: 1 << 32,
        requested_size: 0,
        size: 0,
        max_size: 1 << 30,
        block_size: 2 << 20,
        node: 0,
        memdev: "/objects/mem0".into(),
    };
    let named = MemoryDeviceInfo::VirtioMem(virtio_mem.clone());
    virtio_mem.id = None;
    let devices = vec![named, MemoryDeviceInfo::VirtioMem(virtio_mem)];
    let resize = |reason| ebbtide::Resize {
        id: "vmem0".into(),
        target: 1,
        plugged: 0,
        state: ebbtide::ResizeState::Stalled,
        reason,
        since_ms: 9,
    };
    let memory = ebbtide::Memory {
        boot: 1,
        plugged: 2,
        total: 3,
        max: 4,
        rss: 5,
        devices: vec![ebbtide::MemoryDevice {
            id: "vmem0".into(),
            kind: "virtio-mem".into(),
            node: 0,
            memaddr: 6,
            block_size: 7,
            requested: 8,
            size: 9,
            max: 10,
        }],
    };
    let status = ebbtide::Status {
        status: RunState::Running,
        reset: Some(ebbtide::Reset {
            cause: ShutdownCause::GuestReset,
            step: ebbtide::ResetStep::Memory,
            age_ms: 3,
            memory: vec!["ram".into()],
        }),
        vcpus: 1,
        pid: 2,
        version: "x".into(),
    };
    let value = |sample: &dyn erased::Sample| sample.value();
    vec![
        (
            commands::QUERY_VERSION.info(),
            value(&VersionInfo::ebbtide()),
        ),
        (
            commands::QUERY_STATUS.info(),
            value(&StatusInfo::new(RunState::Running)),
        ),
        (commands::QUERY_MEMORY_DEVICES.info(), value(&devices)),
        (
            commands::QUERY_MEMORY_SIZE_SUMMARY.info(),
            value(&MemorySizeSummary {
                base_memory: 1,
                plugged_memory: Some(2),
            }),
        ),
        (
            commands::QUERY_MEMORY_SIZE_SUMMARY.info(),
            value(&MemorySizeSummary {
                base_memory: 1,
                plugged_memory: None,
            }),
        ),
        (
            commands::QOM_LIST.info(),
            value(&vec![ObjectPropertyInfo::new("type", "string")]),
        ),
        (commands::STOP.info(), value(&Empty {})),
        (commands::EBBTIDE_QUERY_STATUS.info(), value(&status)),
        (commands::EBBTIDE_QUERY_MEMORY.info(), value(&memory)),
        (commands::EBBTIDE_QUERY_RESIZE.info(), value(&resize(None))),
        (
            commands::EBBTIDE_QUERY_RESIZE.info(),
            value(&resize(Some("no driver".into()))),
        ),
    ]
}

mod erased {
    pub(super) trait Sample {
        fn value(&self) -> serde_json::Value;
    }

    impl<T: crate::schema::Qapi + PartialEq + std::fmt::Debug> Sample for T {
        /// What serde writes; it must read it back too.
        fn value(&self) -> serde_json::Value {
            let value = serde_json::to_value(self).unwrap();
            assert_eq!(&serde_json::from_value::<T>(value.clone()).unwrap(), self);
            value
        }
    }
}

#[test]
fn what_serde_writes_is_what_is_declared() {
    for (command, answer) in samples() {
        assert_eq!(
            command.check_answer(&answer),
            Ok(()),
            "{}: {answer}",
            command.name
        );
    }
    let wrong = json!([{"type": "virtio-mem", "data": {"id": "x"}}]);
    let error = commands::QUERY_MEMORY_DEVICES
        .info()
        .check_answer(&wrong)
        .unwrap_err();
    assert_eq!(error.desc, "Parameter 'return[0].data.memaddr' is missing");
}

#[test]
fn names_on_the_wire_are_qemus() {
    let text = |value: &dyn erased::Sample| value.value().to_string();
    assert_eq!(
        text(&StatusInfo::new(RunState::PreLaunch)),
        r#"{"running":false,"status":"prelaunch"}"#
    );
    assert_eq!(
        text(&MemorySizeSummary {
            base_memory: 1,
            plugged_memory: None
        }),
        r#"{"base-memory":1}"#
    );
    assert_eq!(text(&Empty {}), "{}");
    let reset = events::RESET.with(events::Cause::new(ShutdownCause::HostQmpSystemReset));
    assert_eq!(
        Value::Object(reset.data),
        json!({"guest": false, "reason": "host-qmp-system-reset"})
    );
    assert!(events::Cause::new(ShutdownCause::GuestShutdown).guest);
    let change = events::MEMORY_DEVICE_SIZE_CHANGE.with(events::MemoryDeviceSizeChange {
        id: Some("vmem0".into()),
        size: 1,
        qom_path: "/machine/peripheral/vmem0".into(),
    });
    assert_eq!(
        Value::Object(change.data),
        json!({"id": "vmem0", "size": 1, "qom-path": "/machine/peripheral/vmem0"})
    );
    let device = &samples()[2].1[0];
    assert_eq!(device["type"], "virtio-mem");
    assert_eq!(device["data"]["requested-size"], 0);
}

/// Entities by name, of a schema with everything in it.
fn introspected() -> BTreeMap<String, Value> {
    let commands = samples().into_iter().map(|(command, _)| command).chain([
        commands::QMP_CAPABILITIES.info(),
        commands::QUERY_QMP_SCHEMA.info(),
        commands::QOM_GET.info(),
        commands::QOM_SET.info(),
    ]);
    let commands = commands.chain(crate::types::tests::plug_commands());
    let array = Schema::new(commands, events::ALL.iter().copied()).introspect();
    let answer = commands::QUERY_QMP_SCHEMA.info().check_answer(&array);
    assert_eq!(answer, Ok(()), "the schema describes its own description");
    let entities = array.as_array().unwrap();
    let by_name: BTreeMap<_, _> = entities
        .iter()
        .map(|entity| (entity["name"].as_str().unwrap().to_owned(), entity.clone()))
        .collect();
    assert_eq!(by_name.len(), entities.len(), "names are unique");
    by_name
}

#[test]
fn introspection_refers_to_nothing_unknown_and_leaves_nothing_over() {
    let entities = introspected();
    let mut used = BTreeSet::new();
    for entity in entities.values() {
        let types = ["arg-type", "ret-type", "element-type"]
            .iter()
            .filter_map(|key| entity[key].as_str());
        let list = |key: &str| entity[key].as_array().cloned().unwrap_or_default();
        let members: Vec<Value> = list("members")
            .into_iter()
            .chain(list("variants"))
            .collect();
        let types: Vec<String> = types
            .map(str::to_owned)
            .chain(
                members
                    .iter()
                    .filter_map(|m| m["type"].as_str().map(str::to_owned)),
            )
            .collect();
        for name in types {
            assert!(entities.contains_key(&name), "{name} in {entity}");
            used.insert(name);
        }
    }
    for (name, entity) in &entities {
        let meta = entity["meta-type"].as_str().unwrap();
        assert_eq!(
            used.contains(name),
            !matches!(meta, "command" | "event"),
            "{entity}"
        );
    }
}

#[test]
fn introspection_has_qemus_form() {
    let entities = introspected();
    let of = |name: &str| entities[name].clone();
    let follow = |entity: &Value, key: &str| of(entity[key].as_str().unwrap());
    // The shapes QEMU 7.2 shows for the same commands, numbers aside.
    let get = of("qom-get");
    assert_eq!(get["ret-type"], "any");
    assert_eq!(
        follow(&get, "arg-type")["members"],
        json!([{"name": "path", "type": "str"}, {"name": "property", "type": "str"}])
    );
    let summary = follow(&of("query-memory-size-summary"), "ret-type");
    assert_eq!(
        summary["members"],
        json!([{"name": "base-memory", "type": "int"}, {"name": "plugged-memory", "type": "int", "default": null}])
    );
    let devices = follow(&of("query-memory-devices"), "ret-type");
    assert_eq!(devices["meta-type"], "array");
    assert_eq!(
        devices["name"],
        format!("[{}]", devices["element-type"].as_str().unwrap())
    );
    let device = follow(&devices, "element-type");
    assert_eq!(device["tag"], "type");
    assert_eq!(device["variants"][1]["case"], "virtio-mem");
    assert_eq!(
        follow(&device["variants"][1], "type")["members"][0]["name"],
        "data"
    );
    let kind = follow(&device["members"][0], "type");
    assert_eq!(
        (&kind["members"], &kind["values"]),
        (
            &json!([{"name": "dimm"}, {"name": "virtio-mem"}]),
            &json!(["dimm", "virtio-mem"])
        )
    );
    // As QEMU shows a command whose further arguments depend on the driver.
    assert_eq!(
        follow(&of("device_add"), "arg-type")["members"],
        json!([{"name": "driver", "type": "str"}, {"name": "bus", "type": "str", "default": null},
            {"name": "id", "type": "str", "default": null}])
    );
    let raw = follow(&of("blockdev-add"), "arg-type")["variants"][2].clone();
    assert_eq!(raw["case"], "raw");
    let file = follow(&follow(&raw, "type")["members"][0], "type");
    assert_eq!(
        (&file["meta-type"], &file["members"]),
        (
            &json!("alternate"),
            &json!([{"type": of("blockdev-add")["arg-type"]}, {"type": "str"}])
        )
    );
    // A type that is a part of itself.
    let bus = of(follow(&of("query-pci"), "ret-type")["element-type"]
        .as_str()
        .unwrap());
    let devices = follow(&bus["members"][1], "type");
    let function = follow(&devices, "element-type");
    let bridge = follow(&function["members"][8], "type");
    assert_eq!(bridge["members"][1]["type"], devices["name"]);
    assert_eq!(
        of("int"),
        json!({"name": "int", "meta-type": "builtin", "json-type": "int"})
    );
    let stop = of("stop");
    assert_eq!(stop["arg-type"], stop["ret-type"]);
    assert_eq!(follow(&stop, "arg-type")["members"], json!([]));
    assert_eq!(of("SHUTDOWN")["arg-type"], of("RESET")["arg-type"]);
}
