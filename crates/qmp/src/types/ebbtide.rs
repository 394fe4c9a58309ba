// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What Ebbtide adds to QMP. Bytes and milliseconds throughout.

use crate::schema::{qapi_enum, qapi_struct};
use crate::types::run_state::RunState;

qapi_struct! {
    /// The answer to `x-ebbtide-query-status`.
    #[derive(Eq)]
    pub struct Status {
        /// What the machine is doing.
        status as "status": RunState,
        /// How many vCPUs it has.
        vcpus as "vcpus": u64,
        /// The process id of the VMM.
        pid as "pid": u64,
        /// The VMM's version.
        version as "version": String,
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-query-memory`.
    #[derive(Eq)]
    pub struct Memory {
        /// What the machine booted with.
        boot as "boot": u64,
        /// What memory devices provide now.
        plugged as "plugged": u64,
        /// Both together: what the guest can use.
        total as "total": u64,
        /// The most that `total` can become.
        max as "max": u64,
        /// What the VMM process holds of the host's memory (VmRSS).
        rss as "rss": u64,
        /// The memory devices, by id.
        devices as "devices": Vec<MemoryDevice>,
    }
}

qapi_struct! {
    /// One memory device.
    #[derive(Eq)]
    pub struct MemoryDevice {
        /// Its id.
        id as "id": String,
        /// Its kind, such as `virtio-mem`.
        kind as "type": String,
        /// Its NUMA node.
        node as "node": u64,
        /// Where it lies in guest physical memory.
        memaddr as "memaddr": u64,
        /// What its sizes are multiples of.
        block_size as "block_size": u64,
        /// How much the guest is asked to use.
        requested as "requested": u64,
        /// How much the guest uses.
        size as "size": u64,
        /// The most it can provide.
        max as "max": u64,
    }
}

qapi_struct! {
    /// Arguments of `x-ebbtide-query-resize`.
    #[derive(Eq)]
    pub struct QueryResize {
        /// The memory device's id.
        id as "id": String,
    }
}

qapi_enum! {
    /// How far a resize has come.
    pub enum ResizeState {
        /// The guest is following.
        Working = "working",
        /// The guest has what was asked for.
        Reached = "reached",
        /// The guest has followed a part of the way and stopped.
        Partial = "partial",
        /// The guest does not follow.
        Stalled = "stalled",
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-query-resize`.
    #[derive(Eq)]
    pub struct Resize {
        /// The device's id.
        id as "id": String,
        /// How much the guest is asked to use.
        target as "target": u64,
        /// How much it uses.
        plugged as "plugged": u64,
        /// How far it has come.
        state as "state": ResizeState,
        /// Why it goes no further, or what a guest that is working waits for.
        reason as "reason": Option<String>,
        /// Since the target was set, milliseconds.
        since_ms as "since-ms": u64,
    }
}
