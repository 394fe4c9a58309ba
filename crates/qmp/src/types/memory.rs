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

qapi_struct! {
    /// A DIMM. Bytes.
    pub struct PcDimmDeviceInfo {
        /// Its id.
        id as "id": Option<String>,
        /// Where it lies in guest physical memory.
        addr as "addr": i64,
        /// How large it is.
        size as "size": i64,
        /// Its slot.
        slot as "slot": i64,
        /// Its NUMA node.
        node as "node": i64,
        /// The object path of its backend.
        memdev as "memdev": String,
        /// Whether it came while the machine ran.
        hotplugged as "hotplugged": bool,
        /// Whether it could come while the machine ran.
        hotpluggable as "hotpluggable": bool,
    }
}

qapi_enum! {
    /// Kinds of memory devices.
    pub enum MemoryDeviceKind {
        /// A DIMM.
        Dimm = "dimm",
        /// virtio-mem.
        VirtioMem = "virtio-mem",
    }
}

/// A memory device: `{"type": …, "data": {…}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum MemoryDeviceInfo {
    /// A DIMM.
    Dimm(PcDimmDeviceInfo),
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
            cases: &[
                (
                    MemoryDeviceKind::Dimm.as_str(),
                    &ObjectInfo {
                        name: "PcDimmDeviceInfoWrapper",
                        members: &data_member(PcDimmDeviceInfo::TYPE),
                        variants: None,
                        open: false,
                    },
                ),
                (
                    MemoryDeviceKind::VirtioMem.as_str(),
                    &ObjectInfo {
                        name: "VirtioMemDeviceInfoWrapper",
                        members: &data_member(VirtioMemDeviceInfo::TYPE),
                        variants: None,
                        open: false,
                    },
                ),
            ],
        }),
        open: false,
    });
}

qapi_enum! {
    /// Where a backend's memory comes from on a host with several nodes.
    pub enum HostMemPolicy {
        /// As the host sees fit.
        Default = "default",
        /// These nodes first.
        Preferred = "preferred",
        /// These nodes only.
        Bind = "bind",
        /// From these nodes in turn.
        Interleave = "interleave",
    }
}

qapi_struct! {
    /// A memory backend: one item of `query-memdev`.
    pub struct Memdev {
        /// Its id.
        id as "id": Option<String>,
        /// Bytes.
        size as "size": u64,
        /// Whether the host may share its pages with others of the same content.
        merge as "merge": bool,
        /// Whether a core dump of the VMM has it.
        dump as "dump": bool,
        /// Whether it was populated before use.
        prealloc as "prealloc": bool,
        /// Whether other processes that map it see it change.
        share as "share": bool,
        /// Whether swap space or huge pages are reserved for it; absent when the host does not tell.
        reserve as "reserve": Option<bool>,
        /// The host's nodes of its policy.
        host_nodes as "host-nodes": Vec<u32>,
        /// Where it comes from.
        policy as "policy": HostMemPolicy,
    }
}

qapi_struct! {
    /// The answer to `query-balloon`, and data of `BALLOON_CHANGE`. Bytes.
    #[derive(Copy, Eq)]
    pub struct BalloonInfo {
        /// What the balloon leaves to the guest.
        actual as "actual": i64,
    }
}

qapi_struct! {
    /// Arguments of `balloon`. Bytes.
    #[derive(Copy, Eq)]
    pub struct Balloon {
        /// What the balloon is to leave to the guest.
        value as "value": i64,
    }
}
