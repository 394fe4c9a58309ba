// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Block nodes and the disks that use them. Of a node's description only what a node here can have is declared; what is
//! required of every answer and always the same (no throttling, no encryption) [`BlockDeviceInfo::new`] fills in.

use serde::{Deserialize, Serialize};

use crate::Properties;
use crate::schema::{
    AlternateInfo, Member, ObjectInfo, Qapi, Type, Variants, is_absent, qapi_enum, qapi_struct,
};

qapi_enum! {
    /// Three-way switches.
    #[derive(Default)]
    pub enum OnOffAuto {
        /// As it fits.
        #[default]
        Auto = "auto",
        /// Yes, or fail.
        On = "on",
        /// No.
        Off = "off",
    }
}

qapi_enum! {
    /// What a guest's discard does.
    #[derive(Default)]
    pub enum BlockdevDiscard {
        /// Nothing.
        #[default]
        Ignore = "ignore",
        /// Space is given back to the host.
        Unmap = "unmap",
    }
}

qapi_enum! {
    /// What a guest's writing of zeroes becomes.
    #[derive(Default)]
    pub enum BlockdevDetectZeroes {
        /// A write as any other.
        #[default]
        Off = "off",
        /// An operation that only says so, where the medium has one.
        On = "on",
        /// A discard, where `discard` allows that.
        Unmap = "unmap",
    }
}

qapi_enum! {
    /// The block drivers.
    pub enum BlockdevDriver {
        /// A regular file.
        File = "file",
        /// A block device of the host.
        HostDevice = "host_device",
        /// Raw contents in another node.
        Raw = "raw",
        /// No medium.
        NullCo = "null-co",
        /// Another node, with faults on order.
        Fault = "x-ebbtide-fault",
    }
}

qapi_enum! {
    /// How a file's data is moved.
    pub enum BlockdevAio {
        /// By io_uring.
        IoUring = "io_uring",
    }
}

qapi_struct! {
    /// Use of the host's caches.
    #[derive(Copy, Eq, Default)]
    pub struct BlockdevCacheOptions {
        /// Past the host's page cache; off by default.
        direct as "direct": Option<bool>,
        /// The guest's flushes do nothing; off by default.
        no_flush as "no-flush": Option<bool>,
    }
}

/// A block node: arguments of `blockdev-add`, and nodes described within another. The driver's own properties are in
/// `properties`; [`BlockdevOptions::take_source`] reads them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevOptions {
    /// What provides the data.
    pub driver: BlockdevDriver,
    /// Its name; one that is not part of another must have one.
    #[serde(skip_serializing_if = "is_absent")]
    pub node_name: Option<String>,
    /// What a guest's discard does; `ignore` by default.
    #[serde(skip_serializing_if = "is_absent")]
    pub discard: Option<BlockdevDiscard>,
    /// Use of the host's caches.
    #[serde(skip_serializing_if = "is_absent")]
    pub cache: Option<BlockdevCacheOptions>,
    /// For reading only; off by default.
    #[serde(skip_serializing_if = "is_absent")]
    pub read_only: Option<bool>,
    /// For reading only when writing is not possible; off by default.
    #[serde(skip_serializing_if = "is_absent")]
    pub auto_read_only: Option<bool>,
    /// Others may write to it at the same time; off by default, and only with `read-only`.
    #[serde(skip_serializing_if = "is_absent")]
    pub force_share: Option<bool>,
    /// What a guest's writing of zeroes becomes; `off` by default.
    #[serde(skip_serializing_if = "is_absent")]
    pub detect_zeroes: Option<BlockdevDetectZeroes>,
    /// All the other members.
    #[serde(flatten)]
    pub properties: Properties,
}

const fn member(name: &'static str, ty: Type) -> Member {
    let optional = false;
    Member { name, ty, optional }
}

const fn optional(name: &'static str, ty: Type) -> Member {
    let optional = true;
    Member { name, ty, optional }
}

const fn source(name: &'static str, members: &'static [Member]) -> ObjectInfo {
    ObjectInfo {
        name,
        members,
        variants: None,
        open: false,
    }
}

// A node may be described within a node: statics have addresses, by which they can refer to each other.
static BLOCKDEV_OPTIONS: ObjectInfo = ObjectInfo {
    name: "BlockdevOptions",
    members: &[
        member("driver", BlockdevDriver::TYPE),
        optional("node-name", Type::Str),
        optional("discard", BlockdevDiscard::TYPE),
        optional("cache", BlockdevCacheOptions::TYPE),
        optional("read-only", Type::Bool),
        optional("auto-read-only", Type::Bool),
        optional("force-share", Type::Bool),
        optional("detect-zeroes", BlockdevDetectZeroes::TYPE),
    ],
    variants: Some(Variants {
        tag: "driver",
        cases: &[
            (BlockdevDriver::File.as_str(), &HOST_FILE),
            (BlockdevDriver::HostDevice.as_str(), &HOST_FILE),
            (BlockdevDriver::Raw.as_str(), &RAW),
            (BlockdevDriver::NullCo.as_str(), &NULL),
            (BlockdevDriver::Fault.as_str(), &FAULT),
        ],
    }),
    // What is declared is checked here, what is left over by whoever makes the node.
    open: true,
};

static BLOCKDEV_REF: AlternateInfo = AlternateInfo {
    name: "BlockdevRef",
    choices: &[Type::Object(&BLOCKDEV_OPTIONS), Type::Str],
};

static HOST_FILE: ObjectInfo = source(
    "BlockdevOptionsFile",
    &[
        member("filename", Type::Str),
        optional("locking", OnOffAuto::TYPE),
        optional("aio", BlockdevAio::TYPE),
    ],
);

static RAW: ObjectInfo = source(
    "BlockdevOptionsRaw",
    &[
        member("file", Type::Alternate(&BLOCKDEV_REF)),
        optional("offset", Type::Int),
        optional("size", Type::Int),
    ],
);

static NULL: ObjectInfo = source(
    "BlockdevOptionsNull",
    &[
        optional("size", Type::Int),
        optional("latency-ns", Type::Int),
        optional("read-zeroes", Type::Bool),
    ],
);

static FAULT: ObjectInfo = source(
    "BlockdevOptionsFault",
    &[
        member("file", Type::Alternate(&BLOCKDEV_REF)),
        optional("rules", Type::Array(&Type::Str)),
    ],
);

impl Qapi for BlockdevOptions {
    const TYPE: Type = Type::Object(&BLOCKDEV_OPTIONS);
}

qapi_struct! {
    /// Arguments of `blockdev-del`.
    #[derive(Eq)]
    pub struct BlockdevDel {
        /// The node's name.
        node_name as "node-name": String,
    }
}

qapi_struct! {
    /// A node's image.
    #[derive(Eq)]
    pub struct ImageInfo {
        /// Its name.
        filename as "filename": String,
        /// Its format: the driver's name.
        format as "format": String,
        /// What it takes of its medium, bytes.
        actual_size as "actual-size": Option<u64>,
        /// How large the disk is, bytes.
        virtual_size as "virtual-size": u64,
    }
}

qapi_struct! {
    /// How a node uses the host's caches.
    #[derive(Copy, Eq)]
    pub struct BlockdevCacheInfo {
        /// Data may be in a cache until a flush.
        writeback as "writeback": bool,
        /// Past the host's page cache.
        direct as "direct": bool,
        /// Flushes do nothing.
        no_flush as "no-flush": bool,
    }
}

qapi_struct! {
    /// A block node: one item of `query-named-block-nodes`.
    #[derive(Eq)]
    pub struct BlockDeviceInfo {
        /// Its image's name.
        file as "file": String,
        /// Its own name.
        node_name as "node-name": Option<String>,
        /// For reading only.
        ro as "ro": bool,
        /// Its driver.
        drv as "drv": String,
        /// How many images lie below it.
        backing_file_depth as "backing_file_depth": i64,
        /// Whether this machine may use it.
        active as "active": bool,
        /// Whether it is encrypted.
        encrypted as "encrypted": bool,
        /// What a guest's writing of zeroes becomes.
        detect_zeroes as "detect_zeroes": BlockdevDetectZeroes,
        /// Limit, bytes a second; 0: none.
        bps as "bps": i64,
        /// Limit of reads, bytes a second; 0: none.
        bps_rd as "bps_rd": i64,
        /// Limit of writes, bytes a second; 0: none.
        bps_wr as "bps_wr": i64,
        /// Limit, operations a second; 0: none.
        iops as "iops": i64,
        /// Limit of reads, operations a second; 0: none.
        iops_rd as "iops_rd": i64,
        /// Limit of writes, operations a second; 0: none.
        iops_wr as "iops_wr": i64,
        /// Its image.
        image as "image": ImageInfo,
        /// Use of the host's caches.
        cache as "cache": BlockdevCacheInfo,
        /// The offset past which a write is reported; 0: none is.
        write_threshold as "write_threshold": i64,
    }
}

impl BlockDeviceInfo {
    /// An active node without limits, encryption or images below it.
    pub fn new(
        node_name: Option<String>,
        image: ImageInfo,
        read_only: bool,
        cache: BlockdevCacheInfo,
        detect_zeroes: BlockdevDetectZeroes,
    ) -> Self {
        Self {
            file: image.filename.clone(),
            node_name,
            ro: read_only,
            drv: image.format.clone(),
            backing_file_depth: 0,
            active: true,
            encrypted: false,
            detect_zeroes,
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            image,
            cache,
            write_threshold: 0,
        }
    }
}

qapi_struct! {
    /// Arguments of `query-named-block-nodes`.
    #[derive(Copy, Eq)]
    pub struct QueryNamedBlockNodes {
        /// Leave out what lies below each node.
        flat as "flat": Option<bool>,
    }
}

qapi_enum! {
    /// What has become of a disk's last request.
    pub enum BlockDeviceIoStatus {
        /// It succeeded.
        Ok = "ok",
        /// It failed.
        Failed = "failed",
        /// There was no space.
        NoSpace = "nospace",
    }
}

qapi_struct! {
    /// A disk: one item of `query-block`.
    #[derive(Eq)]
    pub struct BlockInfo {
        /// The name of its drive; empty, for drives without a node name of their own are not made any more.
        device as "device": String,
        /// The disk's id, or its path in the object tree.
        qdev as "qdev": Option<String>,
        /// Always `unknown`.
        kind as "type": String,
        /// Whether its medium can be changed.
        removable as "removable": bool,
        /// Whether the guest keeps its medium from being changed.
        locked as "locked": bool,
        /// Its medium.
        inserted as "inserted": Option<BlockDeviceInfo>,
        /// Whether its tray is open, if it has one.
        tray_open as "tray_open": Option<bool>,
        /// What has become of its last request, if the machine stops on errors.
        io_status as "io-status": Option<BlockDeviceIoStatus>,
    }
}

impl BlockInfo {
    /// A disk whose medium is there for good.
    pub fn fixed(qdev: impl Into<String>, inserted: BlockDeviceInfo) -> Self {
        Self {
            device: String::new(),
            qdev: Some(qdev.into()),
            kind: "unknown".to_owned(),
            removable: false,
            locked: false,
            inserted: Some(inserted),
            tray_open: None,
            io_status: None,
        }
    }
}

qapi_enum! {
    /// Directions of disk operations.
    pub enum IoOperationType {
        /// From the medium.
        Read = "read",
        /// To the medium; flushes, discards and the like too.
        Write = "write",
    }
}

qapi_enum! {
    /// What was done about a failed operation.
    pub enum BlockErrorAction {
        /// Nothing, as if it had succeeded.
        Ignore = "ignore",
        /// The guest was told.
        Report = "report",
        /// The machine was stopped.
        Stop = "stop",
    }
}

qapi_struct! {
    /// Data of `BLOCK_IO_ERROR`.
    #[derive(Eq)]
    pub struct BlockIoError {
        /// The disk's path in the object tree.
        qom_path as "qom-path": String,
        /// The name of its drive; see [`BlockInfo`].
        device as "device": String,
        /// The node that failed.
        node_name as "node-name": Option<String>,
        /// What failed.
        operation as "operation": IoOperationType,
        /// What was done about it.
        action as "action": BlockErrorAction,
        /// Whether there was no space.
        nospace as "nospace": Option<bool>,
        /// What the system said, for people.
        reason as "reason": String,
    }
}
