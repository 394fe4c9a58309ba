// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::types::memory::{
    MemoryDeviceInfo, MemorySizeSummary, PcDimmDeviceInfo, VirtioMemDeviceInfo,
};
use crate::types::qom::ObjectPropertyInfo;
use crate::types::run_state::{RunState, StatusInfo};

fn try_help(what: &str) -> String {
    format!("Try \"help {what}\" for more information\r\n")
}

#[test]
fn errors_to_inject() {
    let error = |line: &str| match parse(&format!("pcie_aer_inject_error {line}")) {
        Ok(Command::InjectError { id, error }) => {
            Ok((id, error.correctable, error.bit, error.header))
        }
        Ok(other) => panic!("{other:?}"),
        Err(answer) => Err(answer),
    };
    let of = |correctable, bit, header| Ok(("rp1".to_owned(), correctable, bit, header));
    assert_eq!(error("rp1 DLP"), of(false, 4, [0; 4]));
    assert_eq!(error("rp1 RCVR"), of(true, 0, [0; 4]));
    assert_eq!(error("-c rp1 0x1000"), of(true, 12, [0; 4]));
    assert_eq!(error("rp1 4096 1 0x2 3"), of(false, 12, [1, 2, 3, 0]));
    for (line, why) in [
        ("rp1", "string expected"),
        (
            "rp1 NOPE",
            "invalid error status value 'NOPE': one of DLP, SDN",
        ),
        ("rp1 0", "invalid error status value '0'"),
        ("rp1 0x30", "or a number with one bit"),
        ("-c rp1 DLP", "DLP is no correctable error"),
        ("rp1 DLP 1 2 3 4 5", "four words at most"),
        ("rp1 DLP x", "invalid header word 'x'"),
        ("-a rp1 DLP", "unsupported option -a"),
    ] {
        let answer = error(line).unwrap_err();
        assert!(
            answer.contains(why) && answer.ends_with("\r\n"),
            "{line}: {answer}"
        );
    }
}

#[test]
fn commands_are_understood() {
    for (line, command) in [
        ("", Command::Text(String::new())),
        ("  ", Command::Text(String::new())),
        ("stop", Command::Stop),
        (" s ", Command::Stop),
        ("c", Command::Cont),
        ("system_reset", Command::SystemReset),
        ("system_powerdown", Command::SystemPowerdown),
        ("q", Command::Quit),
        ("info\tstatus", Command::Info(Info::Status)),
        (
            "  info   memory-devices  ",
            Command::Info(Info::MemoryDevices),
        ),
        (
            "info memory_size_summary",
            Command::Info(Info::MemorySizeSummary),
        ),
        ("info mtree", Command::Info(Info::Mtree { flat: false })),
        ("info mtree -f", Command::Info(Info::Mtree { flat: true })),
        ("info ramblock", Command::Info(Info::RamBlock)),
        ("info cpus", Command::Info(Info::Cpus)),
        ("info version", Command::Info(Info::Version)),
        ("qom-list", Command::QomList { path: None }),
        (
            "qom-list /machine",
            Command::QomList {
                path: Some("/machine".into()),
            },
        ),
        (
            "qom-get \"vmem0\" size",
            Command::QomGet {
                path: "vmem0".into(),
                property: "size".into(),
            },
        ),
        (
            "qom-set vmem0 requested-size 300M",
            Command::QomSet {
                path: "vmem0".into(),
                property: "requested-size".into(),
                value: QomValue::Text("300M".into()),
            },
        ),
        (
            "qom-set -j a b {\"c\": 1}",
            Command::QomSet {
                path: "a".into(),
                property: "b".into(),
                value: QomValue::Json(json!({"c": 1})),
            },
        ),
        (
            r#"qom-set "a \"b\" \\" c d  e "#,
            Command::QomSet {
                path: "a \"b\" \\".into(),
                property: "c".into(),
                value: QomValue::Text("d  e".into()),
            },
        ),
    ] {
        assert_eq!(parse(line), Ok(command), "{line:?}");
    }
}

#[test]
fn errors_are_worded_as_users_know_them() {
    for (line, text) in [
        ("nope", "unknown command: 'nope'\r\n".to_owned()),
        (
            "stop;info status",
            "unknown command: 'stop;info'\r\n".to_owned(),
        ),
        ("info nope", "unknown command: 'info nope'\r\n".to_owned()),
        (
            "info \"status\"",
            "unknown command: 'info \"status\"'\r\n".to_owned(),
        ),
        (
            "stop foo",
            format!(
                "stop|s: extraneous characters at the end of line\r\n{}",
                try_help("stop")
            ),
        ),
        (
            "info status foo",
            format!(
                "status: extraneous characters at the end of line\r\n{}",
                try_help("info status")
            ),
        ),
        (
            "info mtree -z",
            format!("mtree: unsupported option -z\r\n{}", try_help("info mtree")),
        ),
        (
            "qom-get vmem0",
            format!("qom-get: string expected\r\n{}", try_help("qom-get")),
        ),
        (
            "qom-set vmem0 requested-size",
            format!("qom-set: string expected\r\n{}", try_help("qom-set")),
        ),
        (
            "qom-get \"vmem0 size",
            format!("qom-get: unterminated string\r\n{}", try_help("qom-get")),
        ),
        (
            "qom-get \"a\\q\" size",
            format!(
                "qom-get: unsupported escape code\r\n{}",
                try_help("qom-get")
            ),
        ),
        ("help nope", "unknown command: 'nope'\r\n".to_owned()),
        (
            "help info nope",
            "unknown command: 'info nope'\r\n".to_owned(),
        ),
    ] {
        assert_eq!(parse(line), Err(text), "{line:?}");
    }
    assert!(
        parse("qom-set -j a b {")
            .unwrap_err()
            .starts_with("Error: JSON parse error")
    );
}

#[test]
fn help_lists_what_there_is() {
    let text = |line: &str| match parse(line) {
        Ok(Command::Text(text)) => text,
        other => panic!("{line}: {other:?}"),
    };
    assert!(text("help").contains("qom-set [-j] path property value  -- change a property"));
    assert_eq!(text("help info"), text("info"));
    assert_eq!(text("info").lines().count(), INFOS.len());
    assert_eq!(text("help stop"), "stop|s  -- stop the vCPUs\r\n");
    assert_eq!(
        text("help info mtree"),
        "info mtree [-f]  -- show the memory map (-f: as ranges without overlap)\r\n"
    );
    // Every command in the tables is one that parse() knows.
    for spec in COMMANDS
        .iter()
        .filter(|spec| matches!(spec.words, Words::Exactly([])))
    {
        assert!(parse(spec.names[0]).is_ok());
    }
    for spec in INFOS {
        assert!(matches!(
            parse(&format!("info {}", spec.names[0])),
            Ok(Command::Info(_))
        ));
    }
}

#[test]
fn sizes_may_have_a_suffix() {
    let text = |text: &str| QomValue::Text(text.into()).to_size("requested-size");
    assert_eq!(text("300M"), Ok(300 << 20));
    assert_eq!(text("1.5g"), Ok(1536 << 20));
    let error = text("300Q").unwrap_err().desc;
    assert!(
        error.starts_with("requested-size: '300Q' is not a size"),
        "{error}"
    );
    assert_eq!(QomValue::Json(json!(4096)).to_size("x"), Ok(4096));
    assert_eq!(
        QomValue::Json(json!("4096")).to_size("x").unwrap_err().desc,
        "Parameter 'x' expects uint64"
    );
}

#[test]
fn answers_look_like_qemus() {
    assert_eq!(
        status(&StatusInfo::new(RunState::Running)),
        "VM status: running\r\n"
    );
    assert_eq!(
        status(&StatusInfo::new(RunState::Paused)),
        "VM status: paused\r\n"
    );
    assert_eq!(
        status(&StatusInfo::new(RunState::PreLaunch)),
        "VM status: paused (prelaunch)\r\n"
    );
    let summary = MemorySizeSummary {
        base_memory: 512,
        plugged_memory: Some(7),
    };
    assert_eq!(
        memory_size_summary(&summary),
        "base memory: 512\r\nplugged memory: 7\r\n"
    );
    let device = MemoryDeviceInfo::VirtioMem(VirtioMemDeviceInfo {
        id: Some("vmem0".into()),
        memaddr: 1 << 32,
        requested_size: 314572800,
        size: 0,
        max_size: 2147483648,
        block_size: 2097152,
        node: 0,
        memdev: "/objects/mem0".into(),
    });
    // Observed on QEMU 7.2 with these sizes.
    assert_eq!(
        memory_devices(&[device]),
        "Memory device [virtio-mem]: \"vmem0\"\r\n  memaddr: 0x100000000\r\n  node: 0\r\n  requested-size: 314572800\r\n  size: 0\r\n  \
         max-size: 2147483648\r\n  block-size: 2097152\r\n  memdev: /objects/mem0\r\n"
    );
    let dimm = MemoryDeviceInfo::Dimm(PcDimmDeviceInfo {
        id: Some("dimm0".into()),
        addr: 1 << 32,
        size: 134217728,
        slot: 0,
        node: 0,
        memdev: "/objects/mem-dimm0".into(),
        hotplugged: true,
        hotpluggable: true,
    });
    assert_eq!(
        memory_devices(&[dimm]),
        "Memory device [dimm]: \"dimm0\"\r\n  addr: 0x100000000\r\n  slot: 0\r\n  node: 0\r\n  size: 134217728\r\n  \
         memdev: /objects/mem-dimm0\r\n  hotplugged: true\r\n  hotpluggable: true\r\n"
    );
    assert_eq!(
        properties(&[ObjectPropertyInfo::new("type", "string")]),
        "type (string)\r\n"
    );
    assert_eq!(error(&QmpError::generic("no")), "Error: no\r\n");
}

proptest! {
    #[test]
    fn any_line_gets_an_answer(line in "(info |help |qom-set |-[a-z]|\"|\\\\|.){0,12}") {
        if let Err(text) = parse(&line) {
            prop_assert!(text.ends_with("\r\n"));
        }
    }
}

#[test]
fn vcpus_are_shown_with_their_threads() {
    use crate::types::device::{CpuInfoFast, SysEmuTarget};
    let cpu = |cpu_index| CpuInfoFast {
        cpu_index,
        qom_path: String::new(),
        thread_id: 100 + cpu_index,
        props: None,
        target: SysEmuTarget::X86_64,
    };
    assert_eq!(
        cpus(&[cpu(0), cpu(1)]),
        "* CPU #0: thread_id=100\r\n  CPU #1: thread_id=101\r\n"
    );
}
