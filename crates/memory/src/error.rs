// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crate's error type.

use std::io;

use thiserror::Error;

use crate::{DirtyClient, ListenerError};

/// Why the memory map or a RAM block could not be made or changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The address range for RAM blocks could not be reserved.
    #[error("cannot reserve {bytes} bytes of address space for guest memory: {source}")]
    Reserve {
        /// Bytes asked for.
        bytes: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// The reservation has no room left for the block.
    #[error(
        "RAM block {name}: {bytes} bytes do not fit the {left} bytes left of the address reservation"
    )]
    ArenaFull {
        /// The block.
        name: String,
        /// Bytes needed.
        bytes: u64,
        /// Bytes left.
        left: u64,
    },
    /// A thread could not be started.
    #[error("cannot start thread {name}: {source}")]
    Thread {
        /// The thread.
        name: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// A RAM block of that name exists.
    #[error("RAM block {0} exists already")]
    DuplicateName(String),
    /// A RAM specification contradicts itself.
    #[error("RAM block {name}: {reason}")]
    BadSpec {
        /// The block.
        name: String,
        /// What is wrong, with the values.
        reason: String,
    },
    /// The host cannot give the memory.
    #[error("RAM block {name}: the host cannot give {bytes} bytes: {detail}")]
    NoHostMemory {
        /// The block.
        name: String,
        /// Bytes asked for.
        bytes: u64,
        /// The host's figures.
        detail: String,
    },
    /// A call to the host failed.
    #[error("RAM block {name}: {what}: {source}")]
    Host {
        /// The block.
        name: String,
        /// What was attempted.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
    /// A range is not made of whole blocks inside the RAM block.
    #[error(
        "RAM block {name}: range {start:#x}..{end:#x} is not made of whole {block_size:#x}-byte blocks inside it"
    )]
    BadRange {
        /// The block.
        name: String,
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
        /// Block size in bytes.
        block_size: u64,
    },
    /// A range of a sparse RAM block is not in the state the operation needs.
    #[error("RAM block {name}: range {start:#x}..{end:#x} {state}")]
    BadState {
        /// The block.
        name: String,
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
        /// The state that is in the way.
        state: &'static str,
    },
    /// The operation needs a sparse RAM block.
    #[error("RAM block {0} is not sparse")]
    NotSparse(String),
    /// The range or the region still has users.
    #[error("{what} is not drained: {holders}")]
    NotDrained {
        /// The object.
        what: String,
        /// Who still holds it.
        holders: String,
    },
    /// The RAM block is on its way out or gone.
    #[error("RAM block {0} is being unplugged")]
    Unplugged(String),
    /// The RAM block is still shown by a region of some address space.
    #[error("RAM block {block} is still shown by region {region}")]
    StillMapped {
        /// The block.
        block: String,
        /// A region that shows it.
        region: String,
    },
    /// There are too many RAM blocks.
    #[error("no more than {0} RAM blocks")]
    TooManyBlocks(usize),
    /// A region is in the tree already.
    #[error("region {0} has a parent already")]
    HasParent(String),
    /// A region is not in the tree.
    #[error("region {0} has no parent")]
    NoParent(String),
    /// A region would contain itself.
    #[error("region {0} would contain itself")]
    Cycle(String),
    /// A child cannot be placed there.
    #[error("region {child} cannot be placed at {offset:#x} of {parent}: {reason}")]
    BadPlacement {
        /// The child.
        child: String,
        /// The parent.
        parent: String,
        /// Offset in the parent, bytes.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The region is not of the kind the operation needs.
    #[error("region {region} is not {wanted}")]
    WrongKind {
        /// The region.
        region: String,
        /// The kind needed.
        wanted: &'static str,
    },
    /// An ioeventfd is registered twice.
    #[error("region {region}: ioeventfd at {offset:#x} exists already")]
    DuplicateIoeventfd {
        /// The region.
        region: String,
        /// Offset in the region, bytes.
        offset: u64,
    },
    /// An ioeventfd to remove is not registered.
    #[error("region {region}: no such ioeventfd at {offset:#x}")]
    NoIoeventfd {
        /// The region.
        region: String,
        /// Offset in the region, bytes.
        offset: u64,
    },
    /// A region, RAM block or reader of another `Memory` was handed in.
    #[error("{0} belongs to another memory")]
    Foreign(String),
    /// The map was to be changed from within a change (from a listener).
    #[error("the memory map cannot be changed from within a change of it")]
    Reentrant,
    /// The host has no room for a dirty bitmap.
    #[error("RAM block {block}: no room for a dirty bitmap of {pages} pages: {source}")]
    DirtyBitmap {
        /// The block.
        block: String,
        /// Pages it was to have.
        pages: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// A client of the dirty log is not on for a block.
    #[error("RAM block {block}: the dirty log is off for {client:?}")]
    NotLogged {
        /// The block.
        block: String,
        /// The client.
        client: DirtyClient,
    },
    /// A listener refused a change; everything was rolled back.
    #[error("address space {space}: {source}")]
    Listener {
        /// The address space.
        space: String,
        /// The listener's reason.
        source: ListenerError,
    },
}
