// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The shape of `query-qmp-schema`'s own answer.

use serde_json::Value;

use crate::schema::{Member, ObjectInfo, Qapi, Type, Variants, qapi_enum, qapi_struct};

qapi_enum! {
    /// Kinds of entities.
    pub enum MetaType {
        /// A predefined type.
        Builtin = "builtin",
        /// A set of strings.
        Enum = "enum",
        /// An array.
        Array = "array",
        /// An object.
        Object = "object",
        /// One of several types.
        Alternate = "alternate",
        /// A command.
        Command = "command",
        /// An event.
        Event = "event",
    }
}

qapi_enum! {
    /// What a predefined type is in JSON.
    pub enum JsonType {
        /// A string.
        String = "string",
        /// A number.
        Number = "number",
        /// An integer.
        Int = "int",
        /// True or false.
        Boolean = "boolean",
        /// Null.
        Null = "null",
        /// An object.
        Object = "object",
        /// An array.
        Array = "array",
        /// Anything.
        Value = "value",
    }
}

qapi_struct! {
    /// One string of an enum.
    pub struct EnumMember {
        /// The string.
        name as "name": String,
        /// Special features.
        features as "features": Option<Vec<String>>,
    }
}

qapi_struct! {
    /// One member of an object.
    pub struct ObjectMember {
        /// Its key.
        name as "name": String,
        /// Its type's name.
        type_name as "type": String,
        /// Present when the member is optional.
        default as "default": Option<Value>,
        /// Special features.
        features as "features": Option<Vec<String>>,
    }
}

qapi_struct! {
    /// What one value of a tag adds to an object.
    pub struct ObjectVariant {
        /// The tag's value.
        case as "case": String,
        /// The type whose members are added.
        type_name as "type": String,
    }
}

qapi_struct! {
    /// One type of an alternate.
    pub struct AlternateMember {
        /// The type's name.
        type_name as "type": String,
    }
}

macro_rules! details {
    ($($name:ident { $($wire:literal: $ty:ty),* })+) => {
        $(const $name: ObjectInfo = ObjectInfo {
            name: stringify!($name),
            members: &[$(Member { name: $wire, ty: <$ty as Qapi>::TYPE, optional: <$ty as Qapi>::OPTIONAL }),*],
            variants: None,
            open: false,
        };)+
    };
}

details! {
    BUILTIN { "json-type": JsonType }
    ENUM { "members": Vec<EnumMember>, "values": Vec<String> }
    ARRAY { "element-type": String }
    OBJECT { "members": Vec<ObjectMember>, "tag": Option<String>, "variants": Option<Vec<ObjectVariant>> }
    ALTERNATE { "members": Vec<AlternateMember> }
    COMMAND { "arg-type": String, "ret-type": String, "allow-oob": Option<bool> }
    EVENT { "arg-type": String }
}

/// One entity of the schema, as [`crate::Schema::introspect`] writes it.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct SchemaEntity(pub Value);

impl Qapi for SchemaEntity {
    const TYPE: Type = Type::Object(&ObjectInfo {
        name: "SchemaInfo",
        members: &[
            Member {
                name: "name",
                ty: Type::Str,
                optional: false,
            },
            Member {
                name: "meta-type",
                ty: MetaType::TYPE,
                optional: false,
            },
            Member {
                name: "features",
                ty: Type::Array(&Type::Str),
                optional: true,
            },
        ],
        variants: Some(Variants {
            tag: "meta-type",
            cases: &[
                (MetaType::Builtin.as_str(), &BUILTIN),
                (MetaType::Enum.as_str(), &ENUM),
                (MetaType::Array.as_str(), &ARRAY),
                (MetaType::Object.as_str(), &OBJECT),
                (MetaType::Alternate.as_str(), &ALTERNATE),
                (MetaType::Command.as_str(), &COMMAND),
                (MetaType::Event.as_str(), &EVENT),
            ],
        }),
        open: false,
    });
}
