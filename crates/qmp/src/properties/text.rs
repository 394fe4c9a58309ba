// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Properties as people type them: `first,name=value,name,...`, as QEMU's command line spells them.

use serde_json::{Map, Value};

use super::{PciAddress, Properties};
use crate::error::QmpError;
use crate::json;

impl Properties {
    /// Reads the text of an option. A first part without `=` is the value of `first`; any other is a switch that is on.
    /// Two commas stand for one within a value. A text that begins with `{` is a JSON object instead.
    ///
    /// # Errors
    /// A part without a name, and a name that comes twice; JSON that is none.
    pub fn parse(text: &str, first: &str) -> Result<Properties, QmpError> {
        if text.trim_start().starts_with('{') {
            return match json::parse_one(text) {
                Ok(Value::Object(members)) => Ok(members.into()),
                Ok(_) => Err(QmpError::invalid_type("option", "object")),
                Err(error) => Err(QmpError::generic(error.to_string())),
            };
        }
        let mut members = Map::new();
        for (index, part) in split(text).into_iter().enumerate() {
            let (name, value) = match part.split_once('=') {
                Some(("", _)) => {
                    return Err(QmpError::generic(format!(
                        "'{}' has no name before its '='",
                        part.escape_debug()
                    )));
                }
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if index == 0 => (first.to_owned(), part),
                None => (part, "on".to_owned()),
            };
            if members.contains_key(&name) {
                return Err(QmpError::generic(format!(
                    "Parameter '{}' is given twice",
                    name.escape_debug()
                )));
            }
            members.insert(name, Value::String(value));
        }
        Ok(members.into())
    }

    /// Makes parts of names with dots: `file.driver=file,file.filename=x` is the part `file` with two members.
    ///
    /// # Errors
    /// A name that is both a value and a part, and one with an empty piece.
    pub fn nested(self) -> Result<Properties, QmpError> {
        let mut root = Map::new();
        for (name, value) in self.members {
            let pieces: Vec<&str> = name.split('.').collect();
            if pieces.iter().any(|piece| piece.is_empty()) || pieces.len() > MAX_LEVELS {
                return Err(QmpError::generic(format!(
                    "'{}' is no parameter's name",
                    name.escape_debug()
                )));
            }
            insert(&mut root, &pieces, value).ok_or_else(|| {
                QmpError::generic(format!(
                    "Parameter '{}' clashes with another: a value cannot have parts",
                    name.escape_debug()
                ))
            })?;
        }
        Ok(Properties {
            members: root,
            prefix: self.prefix,
        })
    }
}

/// How many pieces a name may have; the depth of what is built from it.
const MAX_LEVELS: usize = 32;

/// Puts the value where its name says; `None` when something else is there.
fn insert(members: &mut Map<String, Value>, pieces: &[&str], value: Value) -> Option<()> {
    match pieces {
        [] => None,
        [last] => match members.contains_key(*last) {
            true => None,
            false => {
                members.insert((*last).to_owned(), value);
                Some(())
            }
        },
        [first, rest @ ..] => {
            let part = members
                .entry((*first).to_owned())
                .or_insert_with(|| Value::Object(Map::new()));
            insert(part.as_object_mut()?, rest, value)
        }
    }
}

/// Splits at single commas; two commas are one that belongs to the value. Empty parts are none.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

pub(super) fn pci_address(text: &str) -> Option<PciAddress> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let hex = |digits: &str, largest: u8| {
        let digits = digits.strip_prefix("0x").unwrap_or(digits);
        // from_str_radix would take a sign.
        let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let value = u8::from_str_radix(digits, 16).ok()?;
        (plain && value <= largest).then_some(value)
    };
    Some(PciAddress {
        slot: hex(slot, 0x1f)?,
        function: hex(function, 7)?,
    })
}
