// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl qmp`

use ebbtide_qmp::json;
use serde_json::{Map, Value};

use super::{Failure, Outcome, Session};

/// A QMP command object.
#[derive(Debug, Clone)]
pub(super) struct Request(Map<String, Value>);

/// Reads a command object, or the bare name of a command.
pub(super) fn parse(text: &str) -> Result<Request, String> {
    let text = text.trim();
    let is_name = !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    if is_name {
        return Ok(Request(Map::from_iter([(
            "execute".to_owned(),
            text.into(),
        )])));
    }
    match json::parse_one(text) {
        Ok(Value::Object(members)) if members.get("execute").is_some_and(Value::is_string) => Ok(Request(members)),
        Ok(_) => Err("a command is an object with a member 'execute', such as {\"execute\": \"query-status\"}".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn send(session: &mut Session<'_>, request: &Request) -> Result<Outcome, Failure> {
    let answer = session.client.execute_request(request.0.clone())?;
    if session.json {
        session.print_json(&answer)?;
    } else {
        writeln!(session.out, "{answer:#}")?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_name_is_a_command_too() {
        assert_eq!(
            Value::Object(parse("query-status").unwrap().0),
            json!({"execute": "query-status"})
        );
        assert_eq!(
            Value::Object(parse("{'execute': 'stop', 'id': 1}").unwrap().0),
            json!({"execute": "stop", "id": 1})
        );
        for text in ["", "[]", "{}", "{\"execute\": 1}", "{", "query status"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
