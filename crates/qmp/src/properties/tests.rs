// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::types::block::OnOffAuto;

fn parse(text: &str) -> Properties {
    Properties::parse(text, "driver").unwrap()
}

fn object(value: Value) -> Properties {
    match value {
        Value::Object(members) => members.into(),
        other => panic!("{other} is no object"),
    }
}

fn desc<T: std::fmt::Debug>(result: Result<T, QmpError>) -> String {
    result.unwrap_err().desc
}

#[test]
fn an_option_is_read_as_qemu_reads_it() {
    let mut disk = parse("virtio-blk-pci,id=d0,serial=a,,b=c,write-cache,");
    assert_eq!(disk.need_string("driver").unwrap(), "virtio-blk-pci");
    assert_eq!(disk.need_string("id").unwrap(), "d0");
    assert_eq!(
        disk.take_string("serial").unwrap().as_deref(),
        Some("a,b=c")
    );
    assert_eq!(disk.take_bool("write-cache").unwrap(), Some(true));
    assert_eq!(disk.finish_device("virtio-blk-pci"), Ok(()));
    assert_eq!(
        parse("driver=x,id=y").get("driver"),
        Some(&json!("x")),
        "the first part may have its name"
    );
    assert!(parse("").is_empty());
    assert_eq!(
        parse(r#" {"driver": "x", "n": 1}"#),
        object(json!({"driver": "x", "n": 1}))
    );
    for (text, words) in [
        ("x,id=a,id=b", "'id' is given twice"),
        ("x,driver=y", "'driver' is given twice"),
        ("x,=y", "has no name"),
        ("{", "no end"),
    ] {
        assert!(
            desc(Properties::parse(text, "driver")).contains(words),
            "{text}"
        );
    }
}

#[test]
fn numbers_come_as_json_and_as_text() {
    for (value, bytes) in [
        (json!(4096), 4096),
        (json!("4096"), 4096),
        (json!("1G"), 1 << 30),
        (json!("0x10"), 16),
        (json!(u64::MAX), u64::MAX),
    ] {
        let mut properties = object(json!({ "size": value }));
        assert_eq!(properties.take_size("size"), Ok(Some(bytes)));
        assert_eq!(properties.take_size("size"), Ok(None), "it is taken");
    }
    for (value, text) in [
        (
            json!(-1),
            "Parameter 'n' expects a whole number from 0 to 18446744073709551615, not -1",
        ),
        (
            json!(1.5),
            "Parameter 'n' expects a whole number from 0 to 18446744073709551615, not 1.5",
        ),
        (
            json!(true),
            "Invalid parameter type for 'n', expected: integer",
        ),
        (
            json!(null),
            "Invalid parameter type for 'n', expected: integer",
        ),
        (
            json!(65536),
            "Parameter 'n' expects a whole number from 0 to 65535, not 65536",
        ),
    ] {
        let got = object(json!({ "n": value })).take_uint::<u16>("n");
        assert_eq!(desc(got), text);
    }
    let got = object(json!({"n": "many"})).take_uint::<u16>("n");
    assert!(desc(got).starts_with("Parameter 'n': 'many' is not a size"));
    assert_eq!(
        object(json!({"n": "-3"})).take_int("n"),
        Ok(Some(-3)),
        "a text may be negative too"
    );
    assert!(object(json!({"n": "x"})).take_int("n").is_err());
}

#[test]
fn switches_and_sets_of_words() {
    for (value, expected) in [
        (json!(true), true),
        (json!("on"), true),
        (json!("no"), false),
    ] {
        assert_eq!(
            object(json!({ "x": value })).take_bool("x"),
            Ok(Some(expected))
        );
    }
    assert_eq!(
        desc(object(json!({"x": "maybe"})).take_bool("x")),
        "Parameter 'x' expects 'on' or 'off', not 'maybe'"
    );
    assert!(object(json!({"x": 1})).take_bool("x").is_err());
    for (value, expected) in [
        (json!("auto"), OnOffAuto::Auto),
        (json!("on"), OnOffAuto::On),
        (json!(false), OnOffAuto::Off),
    ] {
        assert_eq!(
            object(json!({ "x": value })).take_enum("x"),
            Ok(Some(expected))
        );
    }
    assert_eq!(
        desc(object(json!({"x": "onn"})).take_enum::<OnOffAuto>("x")),
        "Parameter 'x' does not accept value 'onn'"
    );
    assert_eq!(
        object(json!({"x": ["a", "b"]})).take_strings("x"),
        Ok(Some(vec!["a".into(), "b".into()]))
    );
    assert!(object(json!({"x": ["a", 1]})).take_strings("x").is_err());
    assert_eq!(
        object(json!({"x": 7})).take_string("x"),
        Ok(Some("7".into()))
    );
    assert!(object(json!({"x": [7]})).take_string("x").is_err());
}

#[test]
fn what_nobody_takes_is_an_error() {
    assert_eq!(
        desc(parse("d,x=1").finish_device("d")),
        "Property 'd.driver' not found"
    );
    assert_eq!(
        desc(object(json!({"x": 1})).finish()),
        "Parameter 'x' is unexpected"
    );
    assert_eq!(
        desc(object(json!({})).need_string("driver")),
        "Parameter 'driver' is missing"
    );
    assert_eq!(
        desc(object(json!({})).need_size("size")),
        "Parameter 'size' is missing"
    );
}

#[test]
fn parts_are_named_in_errors() {
    let mut node = parse("raw,file.driver=file,file.filename=/x,file.cache.direct=on")
        .nested()
        .unwrap();
    let Reference::Inline(mut file) = node.need_reference("file").unwrap() else {
        panic!("it is described on the spot");
    };
    assert_eq!(file.need_string("driver").unwrap(), "file");
    let mut cache = file.take_object("cache").unwrap().unwrap();
    assert_eq!(
        desc(cache.need_string("no-flush")),
        "Parameter 'file.cache.no-flush' is missing"
    );
    assert_eq!(
        desc(cache.clone().finish()),
        "Parameter 'file.cache.direct' is unexpected"
    );
    assert_eq!(cache.take_bool("direct"), Ok(Some(true)));
    assert_eq!(
        desc(file.finish()),
        "Parameter 'file.filename' is unexpected"
    );
    assert_eq!(
        object(json!({"file": "node0"})).need_reference("file"),
        Ok(Reference::Name("node0".into()))
    );
    for text in [
        "a.b=1,a=2",
        "a=1,a.b=2",
        "a..b=1",
        ".a=1",
        "a.=1",
        "a=1,a.b.c=2",
    ] {
        assert!(parse(text).nested().is_err(), "{text}");
    }
    let deep = format!("{}x=1", "a.".repeat(100_000));
    assert!(parse(&deep).nested().is_err());
}

#[test]
fn pci_addresses_are_hexadecimal() {
    for (value, slot, function) in [
        (json!("5"), 5, 0),
        (json!("1f.7"), 31, 7),
        (json!("0x10.0x1"), 16, 1),
        (json!("03.0"), 3, 0),
        (json!(10), 16, 0),
    ] {
        assert_eq!(
            object(json!({ "addr": value })).take_pci_address("addr"),
            Ok(Some(PciAddress { slot, function }))
        );
    }
    for text in [
        "",
        ".",
        "20",
        "1.8",
        "+1",
        "1.+1",
        "x",
        "1.2.3",
        "0x",
        "00000000001 ",
    ] {
        let error = desc(object(json!({ "addr": text })).take_pci_address("addr"));
        assert!(error.contains("from 0 to 1f.7"), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn a_value_survives_the_command_line(values in proptest::collection::vec("[^=]{1,12}", 0..6)) {
        let text: Vec<String> = values
            .iter()
            .enumerate()
            .map(|(index, value)| format!("k{index}={}", value.replace(',', ",,")))
            .collect();
        let mut read = parse(&text.join(","));
        for (index, value) in values.iter().enumerate() {
            let name = format!("k{index}");
            let got = read.take_string(&name).unwrap();
            prop_assert_eq!(got.as_ref(), Some(value));
        }
        prop_assert!(read.is_empty());
    }

    #[test]
    fn any_text_gets_an_answer(text in ".{0,40}") {
        if let Ok(mut read) = Properties::parse(&text, "driver").and_then(Properties::nested) {
            let names: Vec<String> = read.clone().into_members().keys().cloned().collect();
            for name in names {
                let _ = read.clone().take_size(&name);
                let _ = read.clone().take_pci_address(&name);
                let _ = read.take_bool(&name);
            }
        }
    }
}
