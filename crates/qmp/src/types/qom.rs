// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tree of objects and their properties, `/machine/peripheral/ID` and `/objects/ID`.

use serde_json::Value;

use crate::schema::qapi_struct;

qapi_struct! {
    /// Arguments of `qom-list`.
    #[derive(Eq)]
    pub struct QomList {
        /// An absolute path, or the unambiguous end of one.
        path as "path": String,
    }
}

qapi_struct! {
    /// Arguments of `qom-get`.
    #[derive(Eq)]
    pub struct QomGet {
        /// An absolute path, or the unambiguous end of one.
        path as "path": String,
        /// The property's name.
        property as "property": String,
    }
}

qapi_struct! {
    /// Arguments of `qom-set`.
    pub struct QomSet {
        /// An absolute path, or the unambiguous end of one.
        path as "path": String,
        /// The property's name.
        property as "property": String,
        /// Its new value.
        value as "value": Value,
    }
}

qapi_struct! {
    /// One property; children are properties of the type `child<TYPE>`.
    pub struct ObjectPropertyInfo {
        /// Its name.
        name as "name": String,
        /// Its type, such as `size`, `bool`, `child<virtio-mem-pci>`, `link<memory-backend>`.
        type_name as "type": String,
        /// For people.
        description as "description": Option<String>,
        /// Its default.
        default_value as "default-value": Option<Value>,
    }
}

impl ObjectPropertyInfo {
    /// A property without description and default.
    pub fn new(name: impl Into<String>, type_name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            type_name: type_name.into(),
            description: None,
            default_value: None,
        }
    }
}

qapi_struct! {
    /// Arguments of `object-add`: those of every object. The type's own are in `properties`.
    pub open struct ObjectAdd {
        /// Its type, such as `memory-backend-memfd`.
        qom_type as "qom-type": String,
        /// Its id.
        id as "id": String,
    }
}

qapi_struct! {
    /// Arguments of `object-del`.
    pub struct ObjectDel {
        /// The object's id.
        id as "id": String,
    }
}

qapi_struct! {
    /// Arguments of `qom-list-types`.
    pub struct QomListTypes {
        /// Only types that are of this type.
        implements as "implements": Option<String>,
        /// Also types of which there are no objects.
        with_abstract as "abstract": Option<bool>,
    }
}

qapi_struct! {
    /// One item of `qom-list-types`.
    pub struct ObjectTypeInfo {
        /// The type's name.
        name as "name": String,
        /// True when there are no objects of exactly this type; absent otherwise.
        is_abstract as "abstract": Option<bool>,
        /// The type it is a kind of.
        parent as "parent": Option<String>,
    }
}
