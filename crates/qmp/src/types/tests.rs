// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes over the wire for devices that come and go is what QEMU's clients know.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::acpi::{AcpiDeviceOst, AcpiOstInfo, AcpiSlotType};
use super::block::*;
use super::blockdev::*;
use super::chardev::{ChardevAdd, VserportChange};
use super::device::{CpuInfoFast, DeviceAdd, DevicePath, SysEmuTarget};
use super::ebbtide::*;
use super::events;
use super::memory::*;
use super::net::NetdevId;
use super::pci::*;
use super::qom::ObjectAdd;
use super::run_state::{Watchdog, WatchdogAction};
use crate::Properties;
use crate::commands::*;
use crate::error::QmpError;
use crate::schema::{Command, CommandInfo, Event, Qapi};

/// Every command about devices, objects and backends.
pub(crate) fn plug_commands() -> Vec<CommandInfo> {
    vec![
        DEVICE_ADD.info(),
        DEVICE_DEL.info(),
        DEVICE_LIST_PROPERTIES.info(),
        OBJECT_ADD.info(),
        OBJECT_DEL.info(),
        QOM_LIST_TYPES.info(),
        QOM_LIST_PROPERTIES.info(),
        BLOCKDEV_ADD.info(),
        BLOCKDEV_DEL.info(),
        QUERY_BLOCK.info(),
        QUERY_NAMED_BLOCK_NODES.info(),
        NETDEV_ADD.info(),
        NETDEV_DEL.info(),
        SET_LINK.info(),
        CHARDEV_ADD.info(),
        CHARDEV_REMOVE.info(),
        QUERY_CHARDEV.info(),
        QUERY_PCI.info(),
        QUERY_ACPI_OSPM_STATUS.info(),
        QUERY_IOTHREADS.info(),
        QUERY_HOTPLUGGABLE_CPUS.info(),
        WATCHDOG_SET_ACTION.info(),
        QUERY_MEMDEV.info(),
        QUERY_BALLOON.info(),
        BALLOON.info(),
        EBBTIDE_QUERY_VCPUS.info(),
        EBBTIDE_QUERY_REMOVALS.info(),
        EBBTIDE_WAIT.info(),
        EBBTIDE_DEVICE_FORCE.info(),
        EBBTIDE_DEVICE_CANCEL.info(),
        EBBTIDE_DEVICE_ANNOUNCE.info(),
    ]
}

fn members(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        other => panic!("{other} is no object"),
    }
}

/// The arguments as their command gets them, after the check of their shape.
fn arguments<A: Qapi, R: Qapi>(command: &Command<A, R>, value: Value) -> Result<A, QmpError> {
    let members = members(value);
    command.info().check_arguments(&members)?;
    let read: A = serde_json::from_value(Value::Object(members.clone())).unwrap();
    let written = serde_json::to_value(&read).unwrap();
    assert_eq!(written, Value::Object(members), "what is read is kept");
    Ok(read)
}

/// What an answer looks like; it fits its declaration and can be read back.
fn answer<A: Qapi, R: Qapi + PartialEq + std::fmt::Debug>(
    command: &Command<A, R>,
    answer: R,
) -> Value {
    let value = serde_json::to_value(&answer).unwrap();
    assert_eq!(command.info().check_answer(&value), Ok(()), "{value}");
    assert_eq!(serde_json::from_value::<R>(value.clone()).unwrap(), answer);
    value
}

#[test]
fn device_add_takes_any_property_and_checks_its_own() {
    let DeviceAdd {
        driver,
        bus,
        id,
        mut properties,
    } = arguments(
        &DEVICE_ADD,
        json!({"driver": "virtio-blk-pci", "id": "d0", "addr": "5", "drive": "n0", "num-queues": 4}),
    )
    .unwrap();
    assert_eq!(
        (driver.as_str(), bus, id.as_deref()),
        ("virtio-blk-pci", None, Some("d0"))
    );
    assert_eq!(
        properties.take_pci_address("addr").unwrap().unwrap().slot,
        5
    );
    assert_eq!(properties.need_string("drive").unwrap(), "n0");
    assert_eq!(
        properties.finish_device(&driver).unwrap_err().desc,
        "Property 'virtio-blk-pci.num-queues' not found"
    );
    for (value, desc) in [
        (json!({"id": "x"}), "Parameter 'driver' is missing"),
        (
            json!({"driver": 1}),
            "Invalid parameter type for 'driver', expected: string",
        ),
        (
            json!({"driver": "x", "id": null}),
            "Invalid parameter type for 'id', expected: string",
        ),
    ] {
        assert_eq!(arguments(&DEVICE_ADD, value).unwrap_err().desc, desc);
    }
    // The others are as closed as before.
    assert_eq!(
        arguments(&DEVICE_DEL, json!({"id": "x", "force": true}))
            .unwrap_err()
            .desc,
        "Parameter 'force' is unexpected"
    );
}

#[test]
fn large_numbers_reach_open_properties() {
    let ObjectAdd { mut properties, .. } = arguments(
        &OBJECT_ADD,
        json!({"qom-type": "memory-backend-ram", "id": "m0", "size": u64::MAX, "x": -1, "y": 1.5}),
    )
    .unwrap();
    assert_eq!(properties.need_size("size"), Ok(u64::MAX));
    assert_eq!(properties.take_int("x"), Ok(Some(-1)));
    assert_eq!(properties.take_value("y"), Some(json!(1.5)));
}

fn source(value: Value) -> Result<BlockdevSource, QmpError> {
    arguments(&BLOCKDEV_ADD, value)?.take_source()
}

#[test]
fn block_nodes_come_alike_from_qmp_and_from_a_command_line() {
    let mut typed = BlockdevOptions::from_properties(
        Properties::parse(
            "raw,node-name=d0,file.driver=file,file.filename=/a,,b,file.locking=off,cache.direct=on,read-only=on,size=1M",
            "driver",
        )
        .and_then(Properties::nested)
        .unwrap(),
    )
    .unwrap();
    let mut sent = arguments(
        &BLOCKDEV_ADD,
        json!({"driver": "raw", "node-name": "d0", "file": {"driver": "file", "filename": "/a,b", "locking": "off"},
            "cache": {"direct": true}, "read-only": true, "size": 1 << 20}),
    )
    .unwrap();
    let (a, b) = (typed.take_source().unwrap(), sent.take_source().unwrap());
    assert_eq!(typed, sent);
    for source in [a, b] {
        let BlockdevSource::Raw {
            file: BlockdevRef::Inline(mut file),
            offset: 0,
            size: Some(0x10_0000),
        } = source
        else {
            panic!("{source:?}");
        };
        assert_eq!(file.node_name, None);
        assert_eq!(
            file.take_source(),
            Ok(BlockdevSource::File(HostFile {
                filename: "/a,b".into(),
                locking: OnOffAuto::Off
            }))
        );
    }
}

#[test]
fn each_driver_takes_its_own() {
    assert_eq!(
        source(json!({"driver": "null-co", "node-name": "n"})),
        Ok(BlockdevSource::NullCo {
            size: 1 << 30,
            latency_ns: 0,
            read_zeroes: false
        })
    );
    assert_eq!(
        source(json!({"driver": "x-ebbtide-fault", "file": "n", "rules": ["fault=hold"]})),
        Ok(BlockdevSource::Fault {
            file: BlockdevRef::Node("n".into()),
            rules: vec!["fault=hold".into()]
        })
    );
    for (value, desc) in [
        (json!({"driver": "file"}), "Parameter 'filename' is missing"),
        (json!({"driver": "raw"}), "Parameter 'file' is missing"),
        (
            json!({"driver": "raw", "file": {"driver": "qcow2"}}),
            "Parameter 'file.driver' does not accept value 'qcow2'",
        ),
        (
            json!({"driver": "qcow2"}),
            "Parameter 'driver' does not accept value 'qcow2'",
        ),
        (
            json!({"driver": "host_device", "filename": "/dev/sda", "aio": "native"}),
            "Parameter 'aio' does not accept value 'native'",
        ),
        (
            json!({"driver": "null-co", "filename": "x"}),
            "Parameter 'filename' is unexpected",
        ),
        (
            json!({"driver": "null-co", "cache": {"writeback": true}}),
            "Parameter 'cache.writeback' is unexpected",
        ),
        (
            json!({"driver": "null-co", "discard": "on"}),
            "Parameter 'discard' does not accept value 'on'",
        ),
        (
            json!({"driver": "null-co", "size": "1G"}),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            json!({"driver": "raw", "file": 1}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "raw", "file": {"driver": "file"}}}),
            "Parameter 'file.file.filename' is missing",
        ),
    ] {
        assert_eq!(source(value.clone()).unwrap_err().desc, desc, "{value}");
    }
}

#[test]
fn a_tower_of_nodes_is_read_to_its_top_and_has_one() {
    let tower = |levels: usize| {
        (0..levels).fold(json!("ground"), |node, _| {
            let raw = [("driver", json!("raw")), ("file", node)];
            Value::Object(
                raw.map(|(name, value)| (name.to_owned(), value))
                    .into_iter()
                    .collect(),
            )
        })
    };
    let mut options = arguments(&BLOCKDEV_ADD, tower(128)).unwrap();
    let mut levels = 1;
    while let BlockdevSource::Raw {
        file: BlockdevRef::Inline(below),
        ..
    } = options.take_source().unwrap()
    {
        options = *below;
        levels += 1;
    }
    assert_eq!(levels, 128);
    // As many levels as a request may have, in what is read by its declaration and in what is not.
    for (command, value) in [
        (BLOCKDEV_ADD.info(), tower(1022)),
        (
            DEVICE_ADD.info(),
            json!({"driver": "x", "file": tower(1021)}),
        ),
        (
            QOM_SET.info(),
            json!({"path": "/", "property": "file", "value": 1, "file": tower(1021)}),
        ),
    ] {
        assert_eq!(
            command.check_arguments(&members(value)).unwrap_err().desc,
            "Parameter 'file' is nested too deeply, 128 levels are accepted"
        );
    }
}

#[test]
fn a_flat_chardev_option_becomes_what_qmp_nests() {
    let add = |text| ChardevAdd::from_option(Properties::parse(text, "backend").unwrap()).unwrap();
    let json_of = |value: &ChardevAdd| serde_json::to_value(value).unwrap();
    assert_eq!(
        json_of(&add("socket,id=c0,path=/s,server=on,wait=off")),
        json!({"id": "c0", "backend": {"type": "socket", "data": {
            "server": "on", "wait": "off", "addr": {"type": "unix", "data": {"path": "/s"}}}}})
    );
    assert_eq!(
        json_of(&add("file,id=c0,path=/log")),
        json!({"id": "c0", "backend": {"type": "file", "data": {"out": "/log"}}})
    );
    let without_id = Properties::parse("null", "backend").unwrap();
    assert_eq!(
        ChardevAdd::from_option(without_id).unwrap_err().desc,
        "Parameter 'id' is missing"
    );
    assert!(
        arguments(
            &CHARDEV_ADD,
            json!({"id": "c0", "backend": {"type": "null", "data": {}}})
        )
        .is_ok()
    );
}

fn bridge(behind: Option<Vec<PciDeviceInfo>>) -> PciDeviceInfo {
    let range = PciMemoryRange { base: 0, limit: 1 };
    PciDeviceInfo {
        bus: 0,
        slot: 1,
        function: 0,
        class_info: PciDeviceClass {
            desc: None,
            class: 0x604,
        },
        id: PciDeviceId {
            device: 1,
            vendor: 2,
            subsystem: None,
            subsystem_vendor: Some(3),
        },
        irq: None,
        irq_pin: 0,
        qdev_id: "rp0".into(),
        pci_bridge: Some(PciBridgeInfo {
            bus: PciBusInfo {
                number: 0,
                secondary: 1,
                subordinate: 1,
                io_range: range,
                memory_range: range,
                prefetchable_range: range,
            },
            devices: behind,
        }),
        regions: vec![PciMemoryRegion {
            bar: 0,
            kind: "memory".into(),
            address: -1,
            size: 4096,
            prefetch: Some(false),
            mem_type_64: Some(true),
        }],
    }
}

#[test]
fn answers_have_qemus_shape() {
    let devices = vec![bridge(Some(vec![bridge(None)])), bridge(Some(Vec::new()))];
    let pci = answer(&QUERY_PCI, vec![PciInfo { bus: 0, devices }]);
    let inner = &pci[0]["devices"][0]["pci_bridge"]["devices"][0];
    assert_eq!(
        inner["id"],
        json!({"device": 1, "vendor": 2, "subsystem-vendor": 3})
    );
    assert_eq!(inner["pci_bridge"].get("devices"), None);

    let image = ImageInfo {
        filename: "/a".into(),
        format: "raw".into(),
        actual_size: None,
        virtual_size: 512,
    };
    let cache = BlockdevCacheInfo {
        writeback: true,
        direct: false,
        no_flush: false,
    };
    let node = BlockDeviceInfo::new(
        Some("n0".into()),
        image,
        true,
        cache,
        BlockdevDetectZeroes::Off,
    );
    let nodes = answer(&QUERY_NAMED_BLOCK_NODES, vec![node.clone()]);
    assert_eq!(nodes[0]["drv"], "raw");
    let disks = answer(
        &QUERY_BLOCK,
        vec![BlockInfo::fixed("/machine/peripheral/d0", node)],
    );
    assert_eq!(disks[0]["inserted"]["node-name"], "n0");

    let cpu = CpuInfoFast {
        cpu_index: 1,
        qom_path: "/machine/unattached/device[1]".into(),
        thread_id: 7,
        props: None,
        target: SysEmuTarget::X86_64,
    };
    assert_eq!(
        answer(&QUERY_CPUS_FAST, vec![cpu])[0],
        json!({"cpu-index": 1, "qom-path": "/machine/unattached/device[1]", "thread-id": 7, "target": "x86_64"})
    );

    let dimm = MemoryDeviceInfo::Dimm(PcDimmDeviceInfo {
        id: Some("dimm0".into()),
        addr: 1 << 32,
        size: 1 << 30,
        slot: 0,
        node: 0,
        memdev: "/objects/m0".into(),
        hotplugged: true,
        hotpluggable: true,
    });
    let devices = answer(&QUERY_MEMORY_DEVICES, vec![dimm]);
    assert_eq!(devices[0]["type"], "dimm");
    let memdev = Memdev {
        id: None,
        size: 1,
        merge: false,
        dump: true,
        prealloc: false,
        share: false,
        reserve: None,
        host_nodes: vec![0],
        policy: HostMemPolicy::Bind,
    };
    assert_eq!(
        answer(&QUERY_MEMDEV, vec![memdev])[0],
        json!({"size": 1, "merge": false, "dump": true, "prealloc": false, "share": false, "host-nodes": [0], "policy": "bind"})
    );
}

#[test]
fn a_removal_tells_how_far_it_is_and_what_holds_it() {
    let removal = Removal {
        id: None,
        path: "/machine/peripheral/d0".into(),
        phase: RemovalPhase::Draining,
        age_ms: 20,
        holders: vec![RemovalHolder {
            what: "1 request".into(),
            age_ms: None,
        }],
        history: vec![RemovalStep {
            phase: RemovalPhase::Requested,
            ms: 0,
        }],
    };
    assert_eq!(
        answer(&EBBTIDE_QUERY_REMOVALS, vec![removal]),
        json!([{"path": "/machine/peripheral/d0", "phase": "draining", "age-ms": 20,
            "holders": [{"what": "1 request"}], "history": [{"phase": "requested", "ms": 0}]}])
    );
    let wait = arguments(
        &EBBTIDE_WAIT,
        json!({"id": "d0", "phase": "drained", "timeout": 0.5}),
    );
    assert_eq!(wait.unwrap().timeout, Some(0.5));
    let waited = Waited {
        phase: WaitPhase::Deleted,
        elapsed_ms: 3,
    };
    assert_eq!(
        answer(&EBBTIDE_WAIT, waited),
        json!({"phase": "deleted", "elapsed-ms": 3})
    );
}

fn event(event: Event) -> Value {
    assert_eq!(event.info.check_data(&event.data), Ok(()));
    json!({ event.name(): event.data })
}

#[test]
fn events_have_qemus_shape() {
    fn text(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }
    let gone = DevicePath {
        device: None,
        path: "/machine/peripheral/d0/virtio-backend".into(),
    };
    assert_eq!(
        text(&event(events::DEVICE_DELETED.with(gone.clone()))),
        r#"{"DEVICE_DELETED":{"path":"/machine/peripheral/d0/virtio-backend"}}"#
    );
    event(events::DEVICE_UNPLUG_GUEST_ERROR.with(gone));
    let info = AcpiOstInfo {
        device: Some("d1".into()),
        slot: "0".into(),
        slot_type: AcpiSlotType::Dimm,
        source: 3,
        status: 0x82,
    };
    assert_eq!(
        text(&event(events::ACPI_DEVICE_OST.with(AcpiDeviceOst { info }))),
        r#"{"ACPI_DEVICE_OST":{"info":{"device":"d1","slot":"0","slot-type":"DIMM","source":3,"status":130}}}"#
    );
    let failed = BlockIoError {
        qom_path: "/machine/peripheral/d0".into(),
        device: String::new(),
        node_name: Some("n0".into()),
        operation: IoOperationType::Write,
        action: BlockErrorAction::Report,
        nospace: None,
        reason: "Input/output error".into(),
    };
    assert_eq!(
        event(events::BLOCK_IO_ERROR.with(failed))["BLOCK_IO_ERROR"]["action"],
        "report"
    );
    let action = WatchdogAction::InjectNmi;
    assert_eq!(
        event(events::WATCHDOG.with(Watchdog { action })),
        json!({"WATCHDOG": {"action": "inject-nmi"}})
    );
    event(events::BALLOON_CHANGE.with(BalloonInfo { actual: 1 }));
    let (id, open) = ("port0".into(), true);
    assert_eq!(
        event(events::VSERPORT_CHANGE.with(VserportChange { id, open })),
        json!({"VSERPORT_CHANGE": {"id": "port0", "open": true}})
    );
    let netdev_id = "n0".into();
    assert_eq!(
        event(events::NETDEV_STREAM_DISCONNECTED.with(NetdevId { netdev_id })),
        json!({"NETDEV_STREAM_DISCONNECTED": {"netdev-id": "n0"}})
    );
}

#[test]
fn what_a_guest_can_repeat_is_limited() {
    let limited: Vec<(&str, Option<&str>)> = events::ALL
        .iter()
        .filter_map(|info| Some((info.name, info.limit?.per_member)))
        .collect();
    assert_eq!(
        limited,
        [
            ("MEMORY_DEVICE_SIZE_CHANGE", Some("qom-path")),
            ("BLOCK_IO_ERROR", Some("qom-path")),
            ("BALLOON_CHANGE", None),
            ("VSERPORT_CHANGE", Some("id")),
            ("WATCHDOG", None)
        ]
    );
}
