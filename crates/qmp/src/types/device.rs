// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that come and go.

use crate::schema::{qapi_enum, qapi_struct};

qapi_struct! {
    /// Arguments of `device_add`: those of every device. The driver's own are in `properties`, `addr` among them.
    pub open struct DeviceAdd {
        /// The device's type, such as `virtio-blk-pci`.
        driver as "driver": String,
        /// The bus it goes to; by default one it fits.
        bus as "bus": Option<String>,
        /// Its id, by which it is found and removed.
        id as "id": Option<String>,
    }
}

qapi_struct! {
    /// The id, or the path in the object tree, of a device: arguments of `device_del`.
    #[derive(Eq)]
    pub struct DeviceDel {
        /// Its id or path.
        id as "id": String,
    }
}

qapi_struct! {
    /// Arguments of `device-list-properties` and `qom-list-properties`.
    #[derive(Eq)]
    pub struct TypeName {
        /// The type's name.
        typename as "typename": String,
    }
}

qapi_struct! {
    /// Data of `DEVICE_DELETED` and `DEVICE_UNPLUG_GUEST_ERROR`.
    #[derive(Eq)]
    pub struct DevicePath {
        /// Its id, if it has one.
        device as "device": Option<String>,
        /// Its path in the object tree.
        path as "path": String,
    }
}

qapi_struct! {
    /// One item of `query-iothreads`.
    #[derive(Eq)]
    pub struct IothreadInfo {
        /// Its id.
        id as "id": String,
        /// The host's number of the thread.
        thread_id as "thread-id": i64,
        /// The longest it polls, nanoseconds; 0: it does not.
        poll_max_ns as "poll-max-ns": i64,
        /// What polling time is multiplied by when it was too short; 0: not configured.
        poll_grow as "poll-grow": i64,
        /// What it is divided by when it was too long; 0: not configured.
        poll_shrink as "poll-shrink": i64,
        /// The most requests submitted at once; 0: no limit of its own.
        aio_max_batch as "aio-max-batch": i64,
    }
}

qapi_struct! {
    /// Which vCPU a slot is about.
    #[derive(Eq)]
    pub struct CpuInstanceProperties {
        /// Its NUMA node.
        node_id as "node-id": Option<i64>,
        /// Its socket.
        socket_id as "socket-id": Option<i64>,
        /// Its core within the socket.
        core_id as "core-id": Option<i64>,
        /// Its thread within the core.
        thread_id as "thread-id": Option<i64>,
    }
}

qapi_enum! {
    /// What a vCPU executes.
    pub enum SysEmuTarget {
        /// 64-bit x86.
        X86_64 = "x86_64",
    }
}

qapi_struct! {
    /// A vCPU: one item of `query-cpus-fast`.
    #[derive(Eq)]
    pub struct CpuInfoFast {
        /// Its index.
        cpu_index as "cpu-index": i64,
        /// Its path in the object tree.
        qom_path as "qom-path": String,
        /// The host's number of its thread.
        thread_id as "thread-id": i64,
        /// Where in the topology it is.
        props as "props": Option<CpuInstanceProperties>,
        /// What it executes.
        target as "target": SysEmuTarget,
    }
}

qapi_struct! {
    /// One item of `query-hotpluggable-cpus`: a slot with or without a vCPU.
    #[derive(Eq)]
    pub struct HotpluggableCpu {
        /// The type to give `device_add`.
        kind as "type": String,
        /// How many vCPUs the slot takes at once.
        vcpus_count as "vcpus-count": i64,
        /// What to give `device_add` to choose the slot.
        props as "props": CpuInstanceProperties,
        /// The vCPU's path when it is there.
        qom_path as "qom-path": Option<String>,
    }
}
