// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The four kinds of messages: greeting, request, answer, event.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::error::{ErrorClass, QmpError};
use crate::schema::Event;
use crate::types::monitor::VersionInfo;

/// What a server says first. No capabilities: commands do not overtake each other here.
pub(crate) fn greeting(version: &VersionInfo) -> Vec<u8> {
    line(&json!({"QMP": {"version": version, "capabilities": []}}))
}

/// A command as a client sent it.
#[derive(Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) id: Option<Value>,
    pub(crate) command: String,
    pub(crate) arguments: Map<String, Value>,
}

/// An input that is no command; its id is echoed as far as it has one.
#[derive(Debug, PartialEq)]
pub(crate) struct Refused {
    pub(crate) id: Option<Value>,
    pub(crate) error: QmpError,
}

impl Request {
    pub(crate) fn from_value(input: Value) -> Result<Request, Refused> {
        let Value::Object(mut members) = input else {
            return Err(Refused {
                id: None,
                error: QmpError::generic("QMP input must be a JSON object"),
            });
        };
        let id = members.shift_remove("id");
        match read_members(members) {
            Ok((command, arguments)) => Ok(Request {
                id,
                command,
                arguments,
            }),
            Err(desc) => Err(Refused {
                id,
                error: QmpError::generic(desc),
            }),
        }
    }
}

fn read_members(members: Map<String, Value>) -> Result<(String, Map<String, Value>), String> {
    let mut command = None;
    let mut arguments = None;
    for (key, value) in members {
        match (key.as_str(), value) {
            ("execute", Value::String(name)) => command = Some(name),
            ("execute", _) => return Err("QMP input member 'execute' must be a string".to_owned()),
            ("arguments", Value::Object(members)) => arguments = Some(members),
            ("arguments", _) => {
                return Err("QMP input member 'arguments' must be an object".to_owned());
            }
            _ => return Err(format!("QMP input member '{key}' is unexpected")),
        }
    }
    let command = command.ok_or_else(|| "QMP input lacks member 'execute'".to_owned())?;
    Ok((command, arguments.unwrap_or_default()))
}

/// A server's answer.
pub(crate) fn answer(id: Option<Value>, result: Result<Value, QmpError>) -> Vec<u8> {
    let mut members = Map::new();
    match result {
        Ok(value) => members.insert("return".to_owned(), value),
        Err(error) => members.insert("error".to_owned(), error_value(error)),
    };
    if let Some(id) = id {
        members.insert("id".to_owned(), id);
    }
    line(&Value::Object(members))
}

fn error_value(QmpError { class, desc }: QmpError) -> Value {
    let class = match class {
        ErrorClass::GenericError => "GenericError",
        ErrorClass::CommandNotFound => "CommandNotFound",
        ErrorClass::DeviceNotFound => "DeviceNotFound",
        ErrorClass::DeviceNotActive => "DeviceNotActive",
        ErrorClass::KVMMissingCap => "KVMMissingCap",
    };
    json!({"class": class, "desc": desc})
}

/// An event that happened at `when`.
pub(crate) fn event(event: &Event, when: SystemTime) -> Vec<u8> {
    let since_epoch = when.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut members = Map::new();
    members.insert(
        "timestamp".to_owned(),
        json!({"seconds": since_epoch.as_secs(), "microseconds": since_epoch.subsec_micros()}),
    );
    members.insert("event".to_owned(), event.name().into());
    if !event.data().is_empty() {
        members.insert("data".to_owned(), Value::Object(event.data().clone()));
    }
    line(&Value::Object(members))
}

/// One line, for clients that read lines: JSON text never holds a raw newline.
pub(crate) fn line(message: &Value) -> Vec<u8> {
    let mut bytes = message.to_string().into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn request(text: &str) -> Result<Request, Refused> {
        Request::from_value(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn requests_are_read() {
        let read =
            request(r#"{"id": [1, null], "arguments": {"path": "/"}, "execute": "qom-list"}"#)
                .unwrap();
        assert_eq!(read.command, "qom-list");
        assert_eq!(read.id, Some(json!([1, null])));
        assert_eq!(Value::Object(read.arguments), json!({"path": "/"}));
        assert_eq!(
            request(r#"{"execute": "stop", "id": null}"#).unwrap().id,
            Some(Value::Null)
        );
        assert_eq!(request(r#"{"execute": "stop"}"#).unwrap().id, None);
    }

    #[test]
    fn other_inputs_are_refused_with_their_id() {
        for (text, desc) in [
            ("[]", "QMP input must be a JSON object"),
            ("7", "QMP input must be a JSON object"),
            ("{}", "QMP input lacks member 'execute'"),
            (r#"{"a": 1}"#, "QMP input member 'a' is unexpected"),
            (
                r#"{"execute": 1}"#,
                "QMP input member 'execute' must be a string",
            ),
            (
                r#"{"execute": "stop", "arguments": []}"#,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"execute": "stop", "arguments": null}"#,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"exec-oob": "stop"}"#,
                "QMP input member 'exec-oob' is unexpected",
            ),
        ] {
            assert_eq!(
                request(text).unwrap_err().error,
                QmpError::generic(desc),
                "{text}"
            );
        }
        assert_eq!(
            request(r#"{"execute": {}, "id": "x"}"#).unwrap_err().id,
            Some(json!("x"))
        );
    }

    #[test]
    fn messages_have_qemus_shape() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let version = VersionInfo::ebbtide();
        assert_eq!(
            text(greeting(&version)),
            format!(
                "{{\"QMP\":{{\"version\":{{\"qemu\":{{\"micro\":0,\"minor\":0,\"major\":10}},\"package\":\"{}\"}},\"capabilities\":[]}}}}\r\n",
                version.package
            )
        );
        assert_eq!(
            text(answer(Some(json!(1)), Ok(json!({})))),
            "{\"return\":{},\"id\":1}\r\n"
        );
        assert_eq!(
            text(answer(None, Err(QmpError::command_not_found("x")))),
            "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"The command x has not been found\"}}\r\n"
        );
        let when = UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_123);
        let stop = crate::types::events::STOP.with(crate::schema::Empty {});
        assert_eq!(
            text(event(&stop, when)),
            "{\"timestamp\":{\"seconds\":1700000000,\"microseconds\":123},\"event\":\"STOP\"}\r\n"
        );
    }

    #[test]
    fn an_id_of_the_deepest_kind_is_echoed() {
        let mut id = json!(null);
        for _ in 0..1022 {
            id = json!([id]);
        }
        assert!(answer(Some(id), Ok(json!({}))).len() > 2044);
    }
}
