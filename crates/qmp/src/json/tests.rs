// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Everything a stream yields for `input`, fed in pieces that end at `cuts`, and its end.
fn all(limits: Limits, input: &[u8], cuts: &[usize]) -> Vec<Result<Value, String>> {
    let mut stream = Stream::new(limits);
    let mut found = Vec::new();
    let mut cuts: Vec<usize> = cuts
        .iter()
        .map(|cut| cut % (input.len() + 1))
        .chain([0, input.len()])
        .collect();
    cuts.sort_unstable();
    for piece in cuts.windows(2) {
        let mut piece = &input[piece[0]..piece[1]];
        while let Some(item) = stream.next(&mut piece) {
            found.push(item.map_err(|error| error.to_string()));
        }
        assert!(piece.is_empty());
    }
    found.extend(
        stream
            .end()
            .map(|item| item.map_err(|error| error.to_string())),
    );
    found
}

fn read(input: &str) -> Vec<Result<Value, String>> {
    all(Limits::REQUEST, input.as_bytes(), &[])
}

fn error_of(input: &[u8]) -> String {
    let found = all(Limits::REQUEST, input, &[]);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone().unwrap_err()
}

#[test]
fn values_follow_each_other_in_any_spacing() {
    assert_eq!(
        read("{\"a\":1}{\"b\":[2,{}]}\n\r\t {\n\"c\" : null }"),
        [
            Ok(json!({"a": 1})),
            Ok(json!({"b": [2, {}]})),
            Ok(json!({"c": null}))
        ]
    );
    assert_eq!(read(" \n "), []);
    assert_eq!(
        read("1\n\"x\" true"),
        [Ok(json!(1)), Ok(json!("x")), Ok(json!(true))]
    );
}

#[test]
fn strings_hide_brackets_and_quotes() {
    let text = r#"{"}]'\"{": "\\"}{"a'b": 'c"d\'e\"\\'}"#;
    assert_eq!(
        read(text),
        [
            Ok(json!({"}]'\"{": "\\"})),
            Ok(json!({"a'b": "c\"d'e\"\\"}))
        ]
    );
    assert_eq!(read(r#"{"a":"it\'s"}"#), [Ok(json!({"a": "it's"}))]);
    // A quoted command is a string, not a command.
    assert_eq!(
        read(r#""{'execute':'quit'}""#),
        [Ok(json!("{'execute':'quit'}"))]
    );
}

#[test]
fn unfinished_values_wait() {
    assert_eq!(read(r#"{"a":1"#), []);
    assert_eq!(read(r#"{"a":"#), []);
    assert_eq!(read(r#"{"a":"b"#), []);
    let mut stream = Stream::new(Limits::REQUEST);
    assert!(stream.is_idle());
    assert_eq!(stream.next(&mut &b"{"[..]), None);
    assert!(!stream.is_idle());
}

#[test]
fn errors_are_named_and_the_stream_goes_on() {
    for (bad, message) in [
        ("nope\n", "JSON parse error, invalid keyword 'nope'"),
        (
            "GET / HTTP/1.1\r\n",
            "JSON parse error, stray 'GET / HTTP/1.1'",
        ),
        ("}", "JSON parse error, stray '}'"),
        ("\x01", "JSON parse error, stray '\x01'"),
        (
            r#"{"a":1]"#,
            "JSON parse error, expected separator in dict at column 7",
        ),
        (
            r#"{"a":1,}"#,
            "JSON parse error, key is not a string in object at column 8",
        ),
        (r#"{"a":}"#, "JSON parse error, expecting value at column 6"),
        (
            r#"{"a" 1}"#,
            "JSON parse error, missing : in object pair at column 6",
        ),
        (
            r#"[1 2]"#,
            "JSON parse error, expected separator in list at column 4",
        ),
        (r#"[,]"#, "JSON parse error, expecting value at column 2"),
        (
            r#"[{"a":[1,]}]"#,
            "JSON parse error, expecting value at column 10",
        ),
        (
            r#"{"a":tru}"#,
            "JSON parse error, invalid keyword 'tru' at column 6",
        ),
        (
            r#"{"a":00}"#,
            "JSON parse error, '00': invalid number at column 6",
        ),
        (
            r#"{"a":1e999}"#,
            "JSON parse error, '1e999': number out of range at column 6",
        ),
        (
            r#"{"a":"\x"}"#,
            "JSON parse error, invalid escape at column 6",
        ),
        (
            r#"{"a":"\ud800"}"#,
            "JSON parse error, unexpected end of hex escape at column 6",
        ),
        (
            r#"{"a":1,"a":2}"#,
            "JSON parse error, duplicate key 'a' at column 12",
        ),
        ("{\"a\":\"b\n", "JSON parse error, stray '\"b\n'"),
        ("\"b\r", "JSON parse error, stray '\"b\r'"),
        ("{\"a\":\"b\x02", "JSON parse error, stray '\x02'"),
    ] {
        let found = read(&format!("{bad}{{\"ok\":1}}"));
        assert_eq!(
            found,
            [Err(message.to_owned()), Ok(json!({"ok": 1}))],
            "{bad:?}"
        );
    }
}

#[test]
fn invalid_utf8_is_refused() {
    assert!(
        error_of(b"{\"a\":\"\xc3\x28\"}")
            .starts_with("JSON parse error, invalid unicode code point")
    );
    assert_eq!(
        error_of(b"{\"a\":\"\xff"),
        "JSON parse error, stray '\u{fffd}'"
    );
    assert_eq!(
        error_of(b"\xe9t\xe9\n"),
        "JSON parse error, stray '\u{fffd}t\u{fffd}'"
    );
}

#[test]
fn depth_is_limited_exactly() {
    let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    assert!(matches!(read(&deep(1024))[..], [Ok(Value::Array(_))]));
    let refused = Err("JSON parse error, nesting depth limit exceeded (1024 levels)".to_owned());
    assert_eq!(
        read(&format!("{}{{}}", deep(1025))),
        [refused.clone(), Ok(json!({}))]
    );
    assert_eq!(
        read(&format!("{}{{}}", deep(100_000))),
        [refused.clone(), Ok(json!({}))]
    );
    // Never closed, but a client that sends one request a line is understood again on the next.
    assert_eq!(
        read(&format!("{}\n{{}}", "[{\"a\":".repeat(100_000))),
        [refused.clone(), Ok(json!({}))]
    );
    // Spread over lines: skipped to its end, nothing inside is mistaken for a request.
    let lines = format!(
        "{}\n{{\"execute\":\"quit\"}}{}{{}}",
        "[\n".repeat(2000),
        "\n]".repeat(2000)
    );
    assert_eq!(read(&lines), [refused, Ok(json!({}))]);
}

#[test]
fn length_is_limited_and_memory_bounded() {
    let limits = Limits {
        value_bytes: 100,
        depth: 8,
    };
    let refused = Err("JSON parse error, size limit exceeded (100 bytes)".to_owned());
    let of_length =
        |length: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(length - 8)).into_bytes();
    assert!(all(limits, &of_length(100), &[])[0].is_ok());
    let mut input = of_length(101);
    input.extend_from_slice(b"{}");
    assert_eq!(all(limits, &input, &[]), [refused.clone(), Ok(json!({}))]);

    let mut stream = Stream::new(Limits::REQUEST);
    let block = vec![b'x'; 1 << 16];
    assert_eq!(stream.next(&mut &b"{\"a\":\""[..]), None);
    let mut errors = 0;
    for _ in 0..100 {
        let mut piece = &block[..];
        while let Some(item) = stream.next(&mut piece) {
            assert_eq!(item, Err(ParseError::TooLong(1 << 20)));
            errors += 1;
        }
        assert!(stream.framing.held_bytes() <= 2 << 20);
    }
    assert_eq!((errors, stream.framing.held_bytes()), (1, 0));
    assert_eq!(stream.next(&mut &b"\"}{}"[..]), Some(Ok(json!({}))));
}

#[test]
fn one_value_is_one_value() {
    assert_eq!(parse_one(" {'a': 1} "), Ok(json!({"a": 1})));
    assert_eq!(parse_one("7"), Ok(json!(7)));
    for (text, message) in [
        ("", "JSON parse error, the text has no end"),
        ("{", "JSON parse error, the text has no end"),
        ("{} {}", "JSON parse error, stray '{}'"),
        (
            "{a}",
            "JSON parse error, key is not a string in object at column 2",
        ),
    ] {
        assert_eq!(
            parse_one(text).unwrap_err().to_string(),
            message,
            "{text:?}"
        );
    }
}

#[test]
fn bare_text_is_bounded_too() {
    let message = error_of(&vec![b'A'; 1 << 20]);
    assert!(message.len() < 120, "{message}");
}

fn json_like() -> impl Strategy<Value = Vec<u8>> {
    let token = prop_oneof![
        8 => proptest::sample::select(vec![
            "{", "}", "[", "]", "\"", "'", "\\", "\n", "\r", " ", ",", ":", "1", "-", "e", "null", "tru", "\"a\":",
            "{\"a\":1}", "'b'", "\\u00", "\u{e9}", "\x01", "[[[[[[[[[", "]]]]]]]]]", "xxxxxxxxxxxxxxxxxxxxxxxxx",
        ]).prop_map(|text| text.as_bytes().to_vec()),
        1 => any::<u8>().prop_map(|byte| vec![byte]),
    ];
    proptest::collection::vec(token, 0..60).prop_map(|tokens| tokens.concat())
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".{0,4}", inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// Valid text with one byte changed, or none.
fn damaged_json() -> impl Strategy<Value = Vec<u8>> {
    (any_json(), any::<usize>(), any::<u8>(), any::<bool>()).prop_map(
        |(value, at, byte, damage)| {
            let mut text = value.to_string().into_bytes();
            if damage {
                let at = at % text.len();
                text[at] = byte;
            }
            text
        },
    )
}

proptest! {
    #[test]
    fn cutting_changes_nothing(input in json_like(), cuts in proptest::collection::vec(any::<usize>(), 0..8)) {
        let limits = Limits { value_bytes: 48, depth: 6 };
        let whole = all(limits, &input, &[]);
        prop_assert_eq!(&all(limits, &input, &cuts), &whole);
        let bytewise: Vec<usize> = (0..input.len()).collect();
        prop_assert_eq!(&all(limits, &input, &bytewise), &whole);
    }

    #[test]
    fn a_control_character_always_resynchronises(input in json_like()) {
        let limits = Limits { value_bytes: 48, depth: 6 };
        let mut stream = Stream::new(limits);
        let mut rest = &input[..];
        while stream.next(&mut rest).is_some() {}
        let mut rest = &b"\x01{\"ok\":1}"[..];
        while let Some(item) = stream.next(&mut rest) {
            if rest.is_empty() {
                prop_assert_eq!(item, Ok(json!({"ok": 1})));
                return Ok(());
            }
        }
        prop_assert!(false, "nothing after the control character");
    }

    #[test]
    fn valid_json_comes_out_as_it_went_in(values in proptest::collection::vec(any_json(), 0..5), pretty: bool) {
        // Each in an array: a bare number needs a newline to end, and then is no business of the next one.
        let text: String = values
            .iter()
            .map(|value| if pretty { serde_json::to_string_pretty(&[value]) } else { serde_json::to_string(&[value]) }.unwrap())
            .collect();
        let expected: Vec<_> = values.into_iter().map(|value| Ok(Value::Array(vec![value]))).collect();
        prop_assert_eq!(read(&text), expected);
    }

    #[test]
    fn agrees_with_serde_json(text in prop_oneof![json_like(), damaged_json()]) {
        match (value::parse(&text), serde_json::from_slice::<Value>(&text)) {
            (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours, theirs),
            (Err(_), Err(_)) => {}
            (Err(error), Ok(_)) => prop_assert!(error.to_string().contains("duplicate key"), "{}", error),
            (Ok(value), Err(error)) => prop_assert!(false, "{value} and {error}"),
        }
    }
}
