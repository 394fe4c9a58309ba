// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Properties whose names and types only their consumer knows: those of a device, an object, a block driver.
//!
//! QMP brings them as members of a command's arguments, a command line as `driver,name=value,...`. [`Properties`] holds
//! both. Each consumer takes what it knows, with its type; [`Properties::finish`] makes an error of what is left over, so
//! that no property is ever ignored.
//!
//! ```
//! use ebbtide_qmp::Properties;
//! let mut disk = Properties::parse("virtio-blk-pci,id=d0,drive=node0,num-queues=2,write-cache", "driver")?;
//! assert_eq!(disk.need_string("driver")?, "virtio-blk-pci");
//! assert_eq!(disk.take_uint::<u16>("num-queues")?, Some(2));
//! assert_eq!(disk.take_bool("write-cache")?, Some(true));
//! let error = disk.finish_device("virtio-blk-pci").unwrap_err();
//! assert_eq!(error.desc, "Property 'virtio-blk-pci.id' not found");
//! # Ok::<(), ebbtide_qmp::QmpError>(())
//! ```

mod text;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::schema::{ObjectInfo, Qapi, Type};
use crate::sizes;

/// Names with values, in the order they were given.
///
/// A value is what JSON has, or a text as people type it: numbers may be texts with a unit (`"4096"`, `"1G"`, `"0x10"`),
/// truth values `"on"`, `"yes"`, `"true"`, `"off"`, `"no"`, `"false"`. Taking a value removes it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Properties {
    members: Map<String, Value>,
    /// Where the members are, for errors: `file.` for those of the member `file`.
    prefix: String,
}

/// Where a device sits on its PCI bus: the property `addr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PciAddress {
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub function: u8,
}

/// A member that names something or describes it on the spot.
#[derive(Debug, Clone, PartialEq)]
pub enum Reference {
    /// The name of one that is there.
    Name(String),
    /// What to make.
    Inline(Properties),
}

impl Properties {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many are left.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether `name` is there and not taken.
    pub fn contains(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Adds one, or replaces that of the same name.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        self.members.insert(name.into(), value.into());
    }

    /// What is left, as the members of a JSON object.
    pub fn into_members(self) -> Map<String, Value> {
        self.members
    }

    /// The value as it stands, without taking it.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.members.get(name)
    }

    /// Takes a value of any type.
    pub fn take_value(&mut self, name: &str) -> Option<Value> {
        self.members.shift_remove(name)
    }

    /// Takes a text. A number is taken as its digits: `serial=1234` and `"serial": 1234` mean the same.
    ///
    /// # Errors
    /// A value that is neither.
    pub fn take_string(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        match self.take_value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    /// Takes a text that must be there.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn need_string(&mut self, name: &str) -> Result<String, QmpError> {
        self.take_string(name)?.ok_or_else(|| self.missing(name))
    }

    /// Takes a truth value.
    ///
    /// # Errors
    /// Any other value.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.take_value(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::String(text)) => match text.as_str() {
                "on" | "yes" | "true" => Ok(Some(true)),
                "off" | "no" | "false" => Ok(Some(false)),
                other => Err(QmpError::generic(format!(
                    "Parameter '{}' expects 'on' or 'off', not '{}'",
                    self.full(name),
                    other.escape_debug()
                ))),
            },
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    /// Takes a size in bytes, or any other number from 0 to 2^64 - 1.
    ///
    /// # Errors
    /// A value that is no such number.
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        match self.take_value(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_u64() {
                Some(value) => Ok(Some(value)),
                None => Err(self.out_of_range(name, &number.to_string(), u64::MAX)),
            },
            Some(Value::String(text)) => sizes::parse(&text).map(Some).map_err(|error| {
                QmpError::generic(format!("Parameter '{}': {error}", self.full(name)))
            }),
            Some(_) => Err(self.wrong_type(name, "integer")),
        }
    }

    /// Takes a size that must be there.
    ///
    /// # Errors
    /// When it is missing, or as [`Properties::take_size`].
    pub fn need_size(&mut self, name: &str) -> Result<u64, QmpError> {
        self.take_size(name)?.ok_or_else(|| self.missing(name))
    }

    /// Takes a number that fits `T`.
    ///
    /// # Errors
    /// A value that is no number from 0 to the largest `T`.
    pub fn take_uint<T: TryFrom<u64> + Bound>(
        &mut self,
        name: &str,
    ) -> Result<Option<T>, QmpError> {
        match self.take_size(name)? {
            None => Ok(None),
            Some(value) => T::try_from(value)
                .map(Some)
                .map_err(|_| self.out_of_range(name, &value.to_string(), T::LARGEST)),
        }
    }

    /// Takes a number that may be negative.
    ///
    /// # Errors
    /// A value that is no integer of 64 bits.
    pub fn take_int(&mut self, name: &str) -> Result<Option<i64>, QmpError> {
        let value = match self.take_value(name) {
            None => return Ok(None),
            Some(Value::Number(number)) => number.as_i64(),
            Some(Value::String(text)) => text.trim().parse().ok(),
            Some(_) => None,
        };
        value
            .map(Some)
            .ok_or_else(|| self.wrong_type(name, "integer"))
    }

    /// Takes one of a set of texts.
    ///
    /// # Errors
    /// A text that is not one of `T`'s.
    pub fn take_enum<T: Qapi>(&mut self, name: &str) -> Result<Option<T>, QmpError> {
        // A switch reads as a truth value in JSON and may be one of the texts `on` and `off`.
        let text = match self.take_value(name) {
            None => return Ok(None),
            Some(Value::Bool(true)) => "on".to_owned(),
            Some(Value::Bool(false)) => "off".to_owned(),
            Some(Value::String(text)) => text,
            Some(_) => return Err(self.wrong_type(name, "string")),
        };
        serde_json::from_value(Value::String(text.clone()))
            .map(Some)
            .map_err(|_| {
                QmpError::invalid_value(&self.full(name), &text.escape_debug().to_string())
            })
    }

    /// Takes a list of texts; one text is a list of one.
    ///
    /// # Errors
    /// A value that is no text or array of texts.
    pub fn take_strings(&mut self, name: &str) -> Result<Option<Vec<String>>, QmpError> {
        let texts = match self.take_value(name) {
            None => return Ok(None),
            Some(Value::String(text)) => Some(vec![text]),
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| match item {
                    Value::String(text) => Some(text),
                    _ => None,
                })
                .collect(),
            Some(_) => None,
        };
        texts
            .map(Some)
            .ok_or_else(|| self.wrong_type(name, "array of strings"))
    }

    /// Takes the properties of a part; errors about them name the part too.
    ///
    /// # Errors
    /// A value that is no object.
    pub fn take_object(&mut self, name: &str) -> Result<Option<Properties>, QmpError> {
        match self.take_value(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(self.part(name, members))),
            Some(_) => Err(self.wrong_type(name, "object")),
        }
    }

    /// Takes the name of something, or its description.
    ///
    /// # Errors
    /// When it is missing, or is neither a text nor an object.
    pub fn need_reference(&mut self, name: &str) -> Result<Reference, QmpError> {
        match self.take_value(name) {
            None => Err(self.missing(name)),
            Some(Value::String(text)) => Ok(Reference::Name(text)),
            Some(Value::Object(members)) => Ok(Reference::Inline(self.part(name, members))),
            Some(_) => Err(self.wrong_type(name, "string or object")),
        }
    }

    /// Takes a PCI address: `SLOT` or `SLOT.FUNCTION`, in hexadecimal, with or without `0x`. A JSON number is read as
    /// the text of its digits, as clients of QEMU are used to.
    ///
    /// # Errors
    /// A value of another form, a slot above 1f, a function above 7.
    pub fn take_pci_address(&mut self, name: &str) -> Result<Option<PciAddress>, QmpError> {
        let Some(text) = self.take_string(name)? else {
            return Ok(None);
        };
        text::pci_address(&text).map(Some).ok_or_else(|| {
            QmpError::generic(format!(
                "Parameter '{}' expects a PCI address SLOT[.FUNCTION] in hexadecimal, from 0 to 1f.7, not '{}'",
                self.full(name),
                text.escape_debug()
            ))
        })
    }

    /// Ends the taking from a command's arguments, an object or a block driver.
    ///
    /// # Errors
    /// Names the first one that nobody took.
    pub fn finish(self) -> Result<(), QmpError> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!(
                "Parameter '{}' is unexpected",
                self.full(name)
            ))),
        }
    }

    /// Ends the taking from a device of type `driver`.
    ///
    /// # Errors
    /// Names the first one that nobody took.
    pub fn finish_device(self, driver: &str) -> Result<(), QmpError> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::property_not_found(driver, &self.full(name))),
        }
    }

    /// That `name` is missing.
    pub fn missing(&self, name: &str) -> QmpError {
        QmpError::missing_parameter(&self.full(name))
    }

    /// The name with where it is, for errors of the consumer's own.
    pub fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn part(&self, name: &str, members: Map<String, Value>) -> Properties {
        Properties {
            members,
            prefix: format!("{}.", self.full(name)),
        }
    }

    fn wrong_type(&self, name: &str, expected: &str) -> QmpError {
        QmpError::invalid_type(&self.full(name), expected)
    }

    fn out_of_range(&self, name: &str, value: &str, largest: u64) -> QmpError {
        QmpError::generic(format!(
            "Parameter '{}' expects a whole number from 0 to {largest}, not {value}",
            self.full(name)
        ))
    }
}

/// Unsigned integers that [`Properties::take_uint`] gives.
pub trait Bound {
    /// The largest.
    const LARGEST: u64;
}

impl Bound for u8 {
    const LARGEST: u64 = u8::MAX as u64;
}

impl Bound for u16 {
    const LARGEST: u64 = u16::MAX as u64;
}

impl Bound for u32 {
    const LARGEST: u64 = u32::MAX as u64;
}

impl Bound for u64 {
    const LARGEST: u64 = u64::MAX;
}

impl From<Map<String, Value>> for Properties {
    fn from(members: Map<String, Value>) -> Self {
        Self {
            members,
            prefix: String::new(),
        }
    }
}

impl Serialize for Properties {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.members.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Properties {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Map::deserialize(deserializer).map(Self::from)
    }
}

impl Qapi for Properties {
    const TYPE: Type = Type::Object(&ObjectInfo {
        name: "Properties",
        members: &[],
        variants: None,
        open: true,
    });
}

#[cfg(test)]
mod tests;
