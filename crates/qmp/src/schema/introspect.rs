// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The schema as `query-qmp-schema` shows it: commands and events first, then every type they reach.
//! Objects and enums are numbered, for their names are no part of the interface; arrays are `[element]`.

use std::collections::{HashMap, VecDeque};

use serde_json::{Map, Value, json};

use super::{ObjectInfo, Schema, Type};

pub(super) fn array(schema: &Schema) -> Value {
    let mut entities = Entities::default();
    for command in schema.commands() {
        let arg_type = entities.name(&command.arguments);
        let ret_type = entities.name(&command.returns);
        entities.out.push(json!({
            "name": command.name, "meta-type": "command", "arg-type": arg_type, "ret-type": ret_type,
        }));
    }
    for event in schema.events() {
        let arg_type = entities.name(&event.data);
        entities
            .out
            .push(json!({"name": event.name, "meta-type": "event", "arg-type": arg_type}));
    }
    while let Some((name, ty)) = entities.pending.pop_front() {
        entities.describe(&name, &ty);
    }
    Value::Array(entities.out)
}

#[derive(Default)]
struct Entities {
    out: Vec<Value>,
    /// The names of numbered types.
    numbers: HashMap<&'static str, String>,
    /// Every name that was given out.
    known: HashMap<String, ()>,
    pending: VecDeque<(String, Type)>,
}

impl Entities {
    fn name(&mut self, ty: &Type) -> String {
        let name = match ty {
            Type::Str => "str".to_owned(),
            Type::Int => "int".to_owned(),
            Type::Number => "number".to_owned(),
            Type::Bool => "bool".to_owned(),
            Type::Any => "any".to_owned(),
            Type::Enum(info) => self.number(info.name),
            // All objects without members are one type; that an object is open is not shown, as QEMU does not.
            Type::Object(info) if info.members.is_empty() && info.variants.is_none() => {
                self.number("")
            }
            Type::Object(info) => self.number(info.name),
            Type::Array(element) => format!("[{}]", self.name(element)),
            Type::Alternate(info) => self.number(info.name),
        };
        if self.known.insert(name.clone(), ()).is_none() {
            self.pending.push_back((name.clone(), *ty));
        }
        name
    }

    fn number(&mut self, type_name: &'static str) -> String {
        let next = self.numbers.len();
        self.numbers
            .entry(type_name)
            .or_insert_with(|| next.to_string())
            .clone()
    }

    fn describe(&mut self, name: &str, ty: &Type) {
        let entity = match ty {
            Type::Str => builtin(name, "string"),
            Type::Int => builtin(name, "int"),
            Type::Number => builtin(name, "number"),
            Type::Bool => builtin(name, "boolean"),
            Type::Any => builtin(name, "value"),
            Type::Enum(info) => {
                let members: Vec<Value> = info
                    .values
                    .iter()
                    .map(|value| json!({"name": value}))
                    .collect();
                json!({"name": name, "meta-type": "enum", "members": members, "values": info.values})
            }
            Type::Array(element) => {
                let element = self.name(element);
                json!({"name": name, "meta-type": "array", "element-type": element})
            }
            Type::Object(info) => self.object(name, info),
            Type::Alternate(info) => {
                let members: Vec<Value> = info
                    .choices
                    .iter()
                    .map(|choice| json!({"type": self.name(choice)}))
                    .collect();
                json!({"name": name, "meta-type": "alternate", "members": members})
            }
        };
        self.out.push(entity);
    }

    fn object(&mut self, name: &str, info: &ObjectInfo) -> Value {
        let mut members = Vec::new();
        for member in info.members {
            let mut shown = Map::new();
            shown.insert("name".into(), member.name.into());
            shown.insert("type".into(), self.name(&member.ty).into());
            if member.optional {
                // What null means here: optional, without a stated default.
                shown.insert("default".into(), Value::Null);
            }
            members.push(Value::Object(shown));
        }
        let mut entity = Map::new();
        entity.insert("name".into(), name.into());
        entity.insert("meta-type".into(), "object".into());
        entity.insert("members".into(), Value::Array(members));
        if let Some(variants) = &info.variants {
            entity.insert("tag".into(), variants.tag.into());
            let cases = variants.cases.iter().map(
                |(case, object)| json!({"case": case, "type": self.name(&Type::Object(object))}),
            );
            entity.insert("variants".into(), cases.collect());
        }
        Value::Object(entity)
    }
}

fn builtin(name: &str, json_type: &str) -> Value {
    json!({"name": name, "meta-type": "builtin", "json-type": json_type})
}
