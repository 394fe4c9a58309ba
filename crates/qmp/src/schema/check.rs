// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values against their declared shape. The messages are worded as QMP clients know them.

use serde_json::{Map, Value};

use super::{ObjectInfo, Type};
use crate::error::QmpError;

/// How many levels arguments may have. What reads them goes down a level with each call, and 1024 levels, which a request
/// may have, take more stack than a thread may have.
const DEPTH: usize = 128;

/// Checks that no argument has too many levels, without going down them.
pub(super) fn depth(arguments: &Map<String, Value>) -> Result<(), QmpError> {
    for (name, argument) in arguments {
        let mut open = vec![(argument, 1)];
        while let Some((value, level)) = open.pop() {
            if level > DEPTH {
                return Err(QmpError::generic(format!(
                    "Parameter '{name}' is nested too deeply, {DEPTH} levels are accepted"
                )));
            }
            match value {
                Value::Array(items) => open.extend(items.iter().map(|item| (item, level + 1))),
                Value::Object(members) => {
                    open.extend(members.values().map(|member| (member, level + 1)));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Checks one value; `path` names it in the error.
pub(super) fn value(value: &Value, ty: &Type, path: &str) -> Result<(), QmpError> {
    let fits = match (ty, value) {
        (Type::Any, _)
        | (Type::Str, Value::String(_))
        | (Type::Bool, Value::Bool(_))
        | (Type::Number, Value::Number(_)) => true,
        (Type::Int, Value::Number(number)) => number.is_i64() || number.is_u64(),
        (Type::Enum(info), Value::String(text)) => {
            if !info.values.contains(&text.as_str()) {
                return Err(QmpError::generic(format!(
                    "Parameter '{path}' does not accept value '{text}'"
                )));
            }
            true
        }
        (Type::Array(element), Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                self::value(item, element, &format!("{path}[{index}]"))?;
            }
            true
        }
        (Type::Object(info), Value::Object(members)) => return object(members, info, path),
        (Type::Alternate(info), _) => match info.choices.iter().find(|ty| suits(ty, value)) {
            Some(choice) => return self::value(value, choice, path),
            None => false,
        },
        _ => false,
    };
    if fits {
        return Ok(());
    }
    Err(QmpError::generic(format!(
        "Invalid parameter type for '{path}', expected: {}",
        expected(ty)
    )))
}

/// Checks an object's members: declared ones in their order, then, unless it is open, that there are no others.
pub(super) fn object(
    members: &Map<String, Value>,
    info: &ObjectInfo,
    path: &str,
) -> Result<(), QmpError> {
    let mut infos = vec![info];
    declared(members, info, path)?;
    if let Some(variants) = &info.variants {
        let tag = members
            .get(variants.tag)
            .and_then(Value::as_str)
            .unwrap_or_default();
        if let Some((_, case)) = variants.cases.iter().find(|(name, _)| *name == tag) {
            declared(members, case, path)?;
            infos.push(case);
        }
    }
    if infos.iter().any(|info| info.open) {
        return Ok(());
    }
    match members.keys().find(|key| {
        !infos
            .iter()
            .any(|info| info.members.iter().any(|member| member.name == *key))
    }) {
        Some(key) => Err(QmpError::generic(format!(
            "Parameter '{}' is unexpected",
            join(path, key)
        ))),
        None => Ok(()),
    }
}

fn declared(members: &Map<String, Value>, info: &ObjectInfo, path: &str) -> Result<(), QmpError> {
    for member in info.members {
        match members.get(member.name) {
            Some(found) => value(found, &member.ty, &join(path, member.name))?,
            None if member.optional => {}
            None => {
                return Err(QmpError::generic(format!(
                    "Parameter '{}' is missing",
                    join(path, member.name)
                )));
            }
        }
    }
    Ok(())
}

/// Whether `value` is of the JSON type that `ty` is.
fn suits(ty: &Type, value: &Value) -> bool {
    match ty {
        Type::Any => true,
        Type::Str | Type::Enum(_) => value.is_string(),
        Type::Int | Type::Number => value.is_number(),
        Type::Bool => value.is_boolean(),
        Type::Object(_) => value.is_object(),
        Type::Array(_) => value.is_array(),
        Type::Alternate(info) => info.choices.iter().any(|choice| suits(choice, value)),
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn expected(ty: &Type) -> &'static str {
    match ty {
        Type::Str | Type::Enum(_) => "string",
        Type::Int => "integer",
        Type::Number => "number",
        Type::Bool => "boolean",
        Type::Any => "value",
        Type::Object(_) => "object",
        Type::Array(_) => "array",
        Type::Alternate(info) => info.name,
    }
}
