// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bytes of one value to a [`Value`]. The structure is parsed here, with a stack of its own, so that a
//! thousand levels cost heap and not call frames; strings, numbers and keywords are serde_json's.
//! A key that appears twice is an error: else two readers of one request could see two requests.

use serde_json::{Map, Value};

use super::ParseError;
use super::framing::shorten;

/// Parses one complete value.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value, ParseError> {
    let mut parser = Parser {
        bytes,
        at: 0,
        open: Vec::new(),
    };
    let value = parser
        .run()
        .map_err(|message| ParseError::Syntax(format!("{message} at column {}", parser.at + 1)))?;
    parser.skip_space();
    match parser.peek() {
        None => Ok(value),
        Some(_) => Err(ParseError::Syntax(format!(
            "trailing characters at column {}",
            parser.at + 1
        ))),
    }
}

/// Text outside brackets and quotes: a number, a keyword, or garbage.
pub(crate) fn parse_bare(bytes: &[u8]) -> Result<Value, ParseError> {
    let text = bytes.trim_ascii();
    if let Ok(value) = parse(text) {
        return Ok(value);
    }
    let mut text = String::from_utf8_lossy(text).into_owned();
    shorten(&mut text);
    if text.bytes().all(|b| b.is_ascii_lowercase()) {
        Err(ParseError::Keyword(text))
    } else {
        Err(ParseError::Stray(text))
    }
}

/// An array or object whose end has not come yet.
enum Open {
    Array(Vec<Value>),
    Object {
        members: Map<String, Value>,
        key: String,
    },
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    open: Vec<Open>,
}

impl Parser<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            self.skip_space();
            let Some(mut value) = self.value_or_open()? else {
                continue;
            };
            // A value is complete; it may be the last of what holds it, and so on outwards.
            loop {
                let Some(holder) = self.open.last_mut() else {
                    return Ok(value);
                };
                match holder {
                    Open::Array(items) => items.push(value),
                    Open::Object { members, key } => {
                        members.insert(std::mem::take(key), value);
                    }
                }
                match self.after_value()? {
                    Some(complete) => value = complete,
                    None => break,
                }
            }
        }
    }

    /// A scalar or an empty array or object; `None` when an array or object was opened.
    fn value_or_open(&mut self) -> Result<Option<Value>, String> {
        match self.peek() {
            Some(b'[') => {
                self.at += 1;
                self.skip_space();
                if self.take(b']') {
                    return Ok(Some(Value::Array(Vec::new())));
                }
                self.open.push(Open::Array(Vec::new()));
                Ok(None)
            }
            Some(b'{') => {
                self.at += 1;
                self.skip_space();
                if self.take(b'}') {
                    return Ok(Some(Value::Object(Map::new())));
                }
                let key = self.key()?;
                self.open.push(Open::Object {
                    members: Map::new(),
                    key,
                });
                Ok(None)
            }
            Some(b'"') => self.string().map(|text| Some(Value::String(text))),
            Some(b'}' | b']' | b',' | b':') | None => Err("expecting value".to_owned()),
            Some(_) => self.word().map(Some),
        }
    }

    /// After a member: the closing bracket completes the holder, a comma leads to the next member.
    fn after_value(&mut self) -> Result<Option<Value>, String> {
        self.skip_space();
        let in_object = matches!(self.open.last(), Some(Open::Object { .. }));
        if self.take(if in_object { b'}' } else { b']' }) {
            return Ok(self.open.pop().map(|holder| match holder {
                Open::Array(items) => Value::Array(items),
                Open::Object { members, .. } => Value::Object(members),
            }));
        }
        if !self.take(b',') {
            return Err(format!(
                "expected separator in {}",
                if in_object { "dict" } else { "list" }
            ));
        }
        if in_object {
            self.skip_space();
            let next = self.key()?;
            if let Some(Open::Object { members, key }) = self.open.last_mut() {
                if members.contains_key(&next) {
                    return Err(format!("duplicate key '{}'", next.escape_debug()));
                }
                *key = next;
            }
        }
        Ok(None)
    }

    /// A key and its colon.
    fn key(&mut self) -> Result<String, String> {
        if self.peek() != Some(b'"') {
            return Err("key is not a string in object".to_owned());
        }
        let key = self.string()?;
        self.skip_space();
        if self.take(b':') {
            Ok(key)
        } else {
            Err("missing : in object pair".to_owned())
        }
    }

    fn string(&mut self) -> Result<String, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let mut escaped = false;
        let end = rest.iter().skip(1).position(|&byte| {
            let closes = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            closes
        });
        let length = end
            .map(|end| end + 2)
            .ok_or_else(|| "string without end".to_owned())?;
        self.scalar(length)
    }

    fn word(&mut self) -> Result<Value, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let ends = |byte: &u8| {
            matches!(
                byte,
                b' ' | b'\t' | b'\r' | b'\n' | b',' | b':' | b'[' | b']' | b'{' | b'}' | b'"'
            )
        };
        let length = rest.iter().position(ends).unwrap_or(rest.len());
        self.scalar(length).map_err(|message| {
            let mut word =
                String::from_utf8_lossy(rest.get(..length).unwrap_or_default()).into_owned();
            shorten(&mut word);
            if word.bytes().all(|b| b.is_ascii_lowercase()) {
                format!("invalid keyword '{word}'")
            } else {
                format!("'{word}': {message}")
            }
        })
    }

    fn scalar<T: serde::de::DeserializeOwned>(&mut self, length: usize) -> Result<T, String> {
        let text = self
            .bytes
            .get(self.at..self.at + length)
            .unwrap_or_default();
        let value = serde_json::from_slice(text).map_err(|error| {
            // The position within the scalar would only mislead.
            let message = error.to_string();
            message
                .split(" at line ")
                .next()
                .unwrap_or_default()
                .to_owned()
        })?;
        self.at += length;
        Ok(value)
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }
}
