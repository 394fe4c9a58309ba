// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What commands take and return and what events carry, declared once.
//!
//! A Rust type that goes over the wire implements [`Qapi`]; its `TYPE` describes it. A [`Command`] joins
//! a name with the types of its arguments and its answer. From these same declarations come the
//! dispatch ([`crate::CommandTable`]), the argument checks, `query-commands`, `query-qmp-schema` and the
//! calls of the client, so that they cannot differ from each other.

mod check;
mod introspect;

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::QmpError;

/// The shape of a value on the wire.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// A string.
    Str,
    /// An integer of 64 bits, signed or not.
    Int,
    /// Any number.
    Number,
    /// True or false.
    Bool,
    /// Any JSON value.
    Any,
    /// One of a set of strings.
    Enum(&'static EnumInfo),
    /// An object.
    Object(&'static ObjectInfo),
    /// An array of one type.
    Array(&'static Type),
    /// A value of one of several types, which JSON tells apart.
    Alternate(&'static AlternateInfo),
}

/// A set of strings.
#[derive(Debug)]
pub struct EnumInfo {
    /// Its name in this crate; not on the wire.
    pub name: &'static str,
    /// The strings.
    pub values: &'static [&'static str],
}

/// The members of an object.
#[derive(Debug)]
pub struct ObjectInfo {
    /// Its name in this crate; not on the wire.
    pub name: &'static str,
    /// The members that are always there or optional.
    pub members: &'static [Member],
    /// Further members that depend on the value of one.
    pub variants: Option<Variants>,
    /// Whether members nobody declared are allowed: what they are depends on more than a schema can say, as a device's
    /// properties do on its driver. Who carries the command out checks them; see [`crate::Properties`].
    pub open: bool,
}

/// Types of which a value has one.
#[derive(Debug)]
pub struct AlternateInfo {
    /// Its name in this crate; not on the wire.
    pub name: &'static str,
    /// The types; each of another kind in JSON.
    pub choices: &'static [Type],
}

/// One member of an object.
#[derive(Debug)]
pub struct Member {
    /// Its key.
    pub name: &'static str,
    /// Its shape.
    pub ty: Type,
    /// Whether it may be missing.
    pub optional: bool,
}

/// The part of a union that depends on its tag.
#[derive(Debug)]
pub struct Variants {
    /// The member that chooses.
    pub tag: &'static str,
    /// What each value of the tag adds.
    pub cases: &'static [(&'static str, &'static ObjectInfo)],
}

/// A Rust type with a declared shape on the wire.
pub trait Qapi: Serialize + DeserializeOwned {
    /// The shape.
    const TYPE: Type;
    /// Whether a member of this type may be missing.
    const OPTIONAL: bool = false;

    /// Whether this value is expressed by leaving the member out.
    fn is_absent(&self) -> bool {
        false
    }
}

macro_rules! plain {
    ($($ty:ty => $shape:expr),*) => { $(impl Qapi for $ty { const TYPE: Type = $shape; })* };
}
plain!(String => Type::Str, bool => Type::Bool, u64 => Type::Int, i64 => Type::Int, u32 => Type::Int, f64 => Type::Number, Value => Type::Any);

impl<T: Qapi> Qapi for Vec<T> {
    const TYPE: Type = Type::Array(&T::TYPE);
}

impl<T: Qapi> Qapi for Option<T> {
    const TYPE: Type = T::TYPE;
    const OPTIONAL: bool = true;

    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

/// For serde: leaves absent members out.
pub(crate) fn is_absent<T: Qapi>(value: &T) -> bool {
    value.is_absent()
}

/// Declares a set of strings as an enum.
macro_rules! qapi_enum {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $wire:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$variant_meta])* #[serde(rename = $wire)] $variant,)+ }

        impl $name {
            /// The string on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $wire,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl $crate::schema::Qapi for $name {
            const TYPE: $crate::schema::Type = $crate::schema::Type::Enum(&$crate::schema::EnumInfo {
                name: stringify!($name),
                values: &[$($wire),+],
            });
        }
    };
}
pub(crate) use qapi_enum;

/// Declares an object as a struct; each member with its key on the wire.
macro_rules! qapi_struct {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* $field:ident as $wire:literal: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(rename = $wire, skip_serializing_if = "crate::schema::is_absent")] pub $field: $ty,)*
        }

        impl $crate::schema::Qapi for $name {
            const TYPE: $crate::schema::Type = $crate::schema::Type::Object(&$crate::schema::ObjectInfo {
                name: stringify!($name),
                members: &[$($crate::schema::Member {
                    name: $wire,
                    ty: <$ty as $crate::schema::Qapi>::TYPE,
                    optional: <$ty as $crate::schema::Qapi>::OPTIONAL,
                },)*],
                variants: None,
                open: false,
            });
        }
    };
    // Open: whatever else the object has is put into `properties`.
    ($(#[$meta:meta])* pub open struct $name:ident { $($(#[$field_meta:meta])* $field:ident as $wire:literal: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(rename = $wire, skip_serializing_if = "crate::schema::is_absent")] pub $field: $ty,)*
            /// All the other members.
            #[serde(flatten)] pub properties: $crate::Properties,
        }

        impl $crate::schema::Qapi for $name {
            const TYPE: $crate::schema::Type = $crate::schema::Type::Object(&$crate::schema::ObjectInfo {
                name: stringify!($name),
                members: &[$($crate::schema::Member {
                    name: $wire,
                    ty: <$ty as $crate::schema::Qapi>::TYPE,
                    optional: <$ty as $crate::schema::Qapi>::OPTIONAL,
                },)*],
                variants: None,
                open: true,
            });
        }
    };
}
pub(crate) use qapi_struct;

qapi_struct! {
    /// No arguments, no data, or `{}` for an answer.
    #[derive(Copy, Eq, Default)]
    pub struct Empty {}
}

/// A command's name and shapes.
#[derive(Debug, Clone, Copy)]
pub struct CommandInfo {
    /// Its name.
    pub name: &'static str,
    /// Its arguments; always an object.
    pub arguments: Type,
    /// Its answer.
    pub returns: Type,
}

/// A command with the Rust types of its arguments `A` and its answer `R`.
#[derive(Debug)]
pub struct Command<A, R> {
    info: CommandInfo,
    types: PhantomData<fn(A) -> R>,
}

impl<A: Qapi, R: Qapi> Command<A, R> {
    /// Declares a command.
    pub const fn new(name: &'static str) -> Self {
        Self {
            info: CommandInfo {
                name,
                arguments: A::TYPE,
                returns: R::TYPE,
            },
            types: PhantomData,
        }
    }

    /// Its name and shapes.
    pub const fn info(&self) -> CommandInfo {
        self.info
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.info.name
    }
}

/// How often an event may be sent. Of those that come too soon only the last is kept, and that one is sent when
/// the interval is over.
#[derive(Debug, Clone, Copy)]
pub struct RateLimit {
    /// The least time between two events.
    pub interval: Duration,
    /// The member that tells sources apart; each source has its own limit. Without it, all share one.
    pub per_member: Option<&'static str>,
}

/// An event's name, shape and limit.
#[derive(Debug, Clone, Copy)]
pub struct EventInfo {
    /// Its name.
    pub name: &'static str,
    /// Its data; always an object, empty when the event carries none.
    pub data: Type,
    /// How often it may be sent.
    pub limit: Option<RateLimit>,
}

/// An event with the Rust type of its data.
#[derive(Debug)]
pub struct EventKind<D> {
    info: EventInfo,
    data: PhantomData<fn(D)>,
}

impl<D: Qapi> EventKind<D> {
    /// Declares an event.
    pub const fn new(name: &'static str) -> Self {
        Self {
            info: EventInfo {
                name,
                data: D::TYPE,
                limit: None,
            },
            data: PhantomData,
        }
    }

    /// Declares an event that may not be sent too often.
    pub const fn limited(name: &'static str, limit: RateLimit) -> Self {
        Self {
            info: EventInfo {
                name,
                data: D::TYPE,
                limit: Some(limit),
            },
            data: PhantomData,
        }
    }

    /// Its name, shape and limit.
    pub const fn info(&self) -> EventInfo {
        self.info
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.info.name
    }

    /// One such event.
    pub fn with(&self, data: D) -> Event {
        let data = match serde_json::to_value(data) {
            Ok(Value::Object(members)) => members,
            // Declared data is an object of plain members, which always serialises.
            _ => Map::new(),
        };
        Event {
            info: self.info,
            data,
        }
    }
}

/// One event, to be sent by [`crate::EventSink::emit`].
#[derive(Debug, Clone)]
pub struct Event {
    pub(crate) info: EventInfo,
    pub(crate) data: Map<String, Value>,
}

impl Event {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.info.name
    }

    /// Its data.
    pub fn data(&self) -> &Map<String, Value> {
        &self.data
    }
}

/// All that a server understands.
#[derive(Debug, Default)]
pub struct Schema {
    commands: BTreeMap<&'static str, CommandInfo>,
    events: BTreeMap<&'static str, EventInfo>,
}

impl Schema {
    /// A schema of these commands and events. A name that comes twice keeps its first declaration.
    pub fn new(
        commands: impl IntoIterator<Item = CommandInfo>,
        events: impl IntoIterator<Item = EventInfo>,
    ) -> Self {
        let mut schema = Self::default();
        for command in commands {
            schema.commands.entry(command.name).or_insert(command);
        }
        for event in events {
            schema.events.entry(event.name).or_insert(event);
        }
        schema
    }

    /// The commands, by name.
    pub fn commands(&self) -> impl Iterator<Item = &CommandInfo> {
        self.commands.values()
    }

    /// The events, by name.
    pub fn events(&self) -> impl Iterator<Item = &EventInfo> {
        self.events.values()
    }

    /// The command of this name.
    pub fn command(&self, name: &str) -> Option<&CommandInfo> {
        self.commands.get(name)
    }

    /// What `query-qmp-schema` answers; see [`crate::types::introspection`].
    pub fn introspect(&self) -> Value {
        introspect::array(self)
    }
}

impl CommandInfo {
    /// Whether `arguments` are what the command takes.
    ///
    /// # Errors
    /// A `GenericError` that names the argument that is missing, of a wrong type, unknown, or of more than 128 levels.
    pub fn check_arguments(&self, arguments: &Map<String, Value>) -> Result<(), QmpError> {
        check::depth(arguments)?;
        match self.arguments {
            Type::Object(info) => check::object(arguments, info, ""),
            _ => Ok(()),
        }
    }

    /// Whether `answer` is what the command returns; tells the implementation from the declaration.
    ///
    /// # Errors
    /// A `GenericError` that names the member.
    pub fn check_answer(&self, answer: &Value) -> Result<(), QmpError> {
        check::value(answer, &self.returns, "return")
    }
}

impl EventInfo {
    /// Whether `data` is what the event carries.
    ///
    /// # Errors
    /// A `GenericError` that names the member.
    pub fn check_data(&self, data: &Map<String, Value>) -> Result<(), QmpError> {
        match self.data {
            Type::Object(info) => check::object(data, info, ""),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
