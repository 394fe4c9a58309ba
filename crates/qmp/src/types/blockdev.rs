// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Block nodes as they are ordered: from properties, of JSON or of a command line, to what each driver takes.

use super::block::{BlockdevAio, BlockdevCacheOptions, BlockdevDriver, BlockdevOptions, OnOffAuto};
use crate::error::QmpError;
use crate::properties::{Properties, Reference};

/// The size of a `null-co` node that names none, bytes.
const NULL_SIZE: u64 = 1 << 30;

/// What provides a node's data, with the driver's own properties.
#[derive(Debug, Clone, PartialEq)]
pub enum BlockdevSource {
    /// A regular file.
    File(HostFile),
    /// A block device of the host.
    HostDevice(HostFile),
    /// A part of another node.
    Raw {
        /// The other node.
        file: BlockdevRef,
        /// Where it begins, bytes.
        offset: u64,
        /// How long it is, bytes; to the end without it.
        size: Option<u64>,
    },
    /// No medium: every operation takes `latency_ns`.
    NullCo {
        /// Bytes.
        size: u64,
        /// How long every operation takes, nanoseconds.
        latency_ns: u64,
        /// Whether reads give zeroes; else they leave the buffer as it is.
        read_zeroes: bool,
    },
    /// Another node, with faults on order.
    Fault {
        /// The other node.
        file: BlockdevRef,
        /// The rules, such as `fault=delay,delay-ns=1000000,op=read`.
        rules: Vec<String>,
    },
}

/// A path on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFile {
    /// The path.
    pub filename: String,
    /// Whether others are kept out by a lock on the file.
    pub locking: OnOffAuto,
}

/// A node by name, or described on the spot.
#[derive(Debug, Clone, PartialEq)]
pub enum BlockdevRef {
    /// The name of one that is there.
    Node(String),
    /// One that belongs to the node it is a part of.
    Inline(Box<BlockdevOptions>),
}

impl BlockdevOptions {
    /// From properties as a command line or another node has them. The driver's own are left in `properties`.
    ///
    /// # Errors
    /// When the driver is missing or unknown, or one of the properties of every node has a wrong value.
    pub fn from_properties(mut from: Properties) -> Result<Self, QmpError> {
        let driver = from
            .take_enum("driver")?
            .ok_or_else(|| from.missing("driver"))?;
        let cache = match from.take_object("cache")? {
            None => None,
            Some(mut cache) => {
                let options = BlockdevCacheOptions {
                    direct: cache.take_bool("direct")?,
                    no_flush: cache.take_bool("no-flush")?,
                };
                cache.finish()?;
                Some(options)
            }
        };
        Ok(Self {
            driver,
            node_name: from.take_string("node-name")?,
            discard: from.take_enum("discard")?,
            cache,
            read_only: from.take_bool("read-only")?,
            auto_read_only: from.take_bool("auto-read-only")?,
            force_share: from.take_bool("force-share")?,
            detect_zeroes: from.take_enum("detect-zeroes")?,
            properties: from,
        })
    }

    /// Takes the driver's own properties. A node described within this one is left as it is: whoever makes nodes takes
    /// its source in turn, and decides how deep that may go.
    ///
    /// # Errors
    /// What is missing, wrong or unknown.
    pub fn take_source(&mut self) -> Result<BlockdevSource, QmpError> {
        let own = &mut self.properties;
        let source = match self.driver {
            BlockdevDriver::File => BlockdevSource::File(host_file(own)?),
            BlockdevDriver::HostDevice => BlockdevSource::HostDevice(host_file(own)?),
            BlockdevDriver::Raw => BlockdevSource::Raw {
                file: reference(own)?,
                offset: own.take_size("offset")?.unwrap_or(0),
                size: own.take_size("size")?,
            },
            BlockdevDriver::NullCo => BlockdevSource::NullCo {
                size: own.take_size("size")?.unwrap_or(NULL_SIZE),
                latency_ns: own.take_size("latency-ns")?.unwrap_or(0),
                read_zeroes: own.take_bool("read-zeroes")?.unwrap_or(false),
            },
            BlockdevDriver::Fault => BlockdevSource::Fault {
                file: reference(own)?,
                rules: own.take_strings("rules")?.unwrap_or_default(),
            },
        };
        std::mem::take(own).finish()?;
        Ok(source)
    }
}

fn host_file(own: &mut Properties) -> Result<HostFile, QmpError> {
    // There is one way of doing I/O; a client that insists on another is told.
    own.take_enum::<BlockdevAio>("aio")?;
    Ok(HostFile {
        filename: own.need_string("filename")?,
        locking: own.take_enum("locking")?.unwrap_or_default(),
    })
}

fn reference(own: &mut Properties) -> Result<BlockdevRef, QmpError> {
    Ok(match own.need_reference("file")? {
        Reference::Name(node) => BlockdevRef::Node(node),
        Reference::Inline(properties) => {
            BlockdevRef::Inline(Box::new(BlockdevOptions::from_properties(properties)?))
        }
    })
}
