// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's memory: how much, and the devices that provide it.

use serde::{Deserialize, Serialize};

use crate::schema::{Member, ObjectInfo, Qapi, Type, Variants, qapi_enum, qapi_struct};

qapi_struct! {
    /// The answer to `query-memory-size-summary`. Bytes.
    pub struct MemorySizeSummary {
        /// What the machine booted with.
        base_memory as "base-memory": u64,
        /// What memory devices provide now; absent without support for memory devices.
        plugged_memory as "plugged-memory": Option<u64>,
    }
}

qapi_struct! {
    /// A virtio-mem device. Bytes.
    pub struct VirtioMemDeviceInfo {
        /// Its id.
        id as "id": Option<String>,
        /// Where it lies in guest physical memory.
        memaddr as "memaddr": u64,
        /// How much the guest is asked to use of it.
        requested_size as "requested-size": u64,
        /// How much the guest uses of it now.
        size as "size": u64,
        /// The most it can provide.
        max_size as "max-size": u64,
        /// What `size` is a multiple of.
        block_size as "block-size": u64,
        /// Its NUMA node.
        node as "node": u64,
        /// The object path of its backend.
        memdev as "memdev": String,
    }
}

qapi_enum! {
    /// Kinds of memory devices.
    pub enum MemoryDeviceKind {
        /// virtio-mem.
        VirtioMem = "virtio-mem",
    }
}

/// A memory device: `{"type": …, "data": {…}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum MemoryDeviceInfo {
    /// A virtio-mem device.
    VirtioMem(VirtioMemDeviceInfo),
}

const fn data_member(ty: Type) -> [Member; 1] {
    [Member {
        name: "data",
        ty,
        optional: false,
    }]
}

impl Qapi for MemoryDeviceInfo {
    const TYPE: Type = Type::Object(&ObjectInfo {
        name: "MemoryDeviceInfo",
        members: &[Member {
            name: "type",
            ty: MemoryDeviceKind::TYPE,
            optional: false,
        }],
        variants: Some(Variants {
            tag: "type",
            cases: &[(
                MemoryDeviceKind::VirtioMem.as_str(),
                &ObjectInfo {
                    name: "VirtioMemDeviceInfoWrapper",
                    members: &data_member(VirtioMemDeviceInfo::TYPE),
                    variants: None,
                },
            )],
        }),
    });
}
