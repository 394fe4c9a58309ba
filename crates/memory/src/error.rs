// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crate's error type.

use std::io;
use std::path::PathBuf;

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
    /// The signals of faults could not be received.
    #[error("cannot receive SIGSEGV and SIGBUS: {0}")]
    FaultSignals(#[source] io::Error),
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
    /// The host's pool of huge pages cannot give them.
    #[error("RAM block {name}: no {bytes} bytes in pages of {page_size_bytes}: {detail}")]
    NoHugePages {
        /// The block.
        name: String,
        /// Size of a page in bytes.
        page_size_bytes: u64,
        /// Bytes asked for.
        bytes: u64,
        /// The host's figures.
        detail: String,
    },
    /// The file behind a block is too short, from the start or since it was cut.
    #[error("RAM block {name}: {path} has {bytes} bytes, {needed} are needed", path = path.display())]
    BackingTooShort {
        /// The block.
        name: String,
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        bytes: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The file behind a block has holes, and its filesystem is too full to fill them.
    #[error("RAM block {name}: the filesystem of {path} is full: it has room for {room} bytes, {missing} are missing", path = path.display())]
    BackingWithoutRoom {
        /// The block.
        name: String,
        /// The file.
        path: PathBuf,
        /// Bytes the filesystem can still give.
        room: u64,
        /// Bytes of the file that have no place yet.
        missing: u64,
    },
    /// The file behind a block cannot be written to.
    #[error("RAM block {name}: {path} cannot be written to: {source}", path = path.display())]
    BackingUnwritable {
        /// The block.
        name: String,
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The host has no such NUMA node, or no memory on it.
    #[error("RAM block {name}: no memory on NUMA node {node}: the host has it on {nodes}")]
    NoNode {
        /// The block.
        name: String,
        /// The node.
        node: u32,
        /// The nodes with memory, as the kernel lists them.
        nodes: String,
    },
    /// A block cannot have that size.
    #[error("RAM block {name}: size {bytes} is not {used} to {max} in steps of {page_size_bytes}")]
    BadResize {
        /// The block.
        name: String,
        /// The size asked for, in bytes.
        bytes: u64,
        /// Its size in bytes; blocks do not shrink.
        used: u64,
        /// Its maximum in bytes.
        max: u64,
        /// Size of a page in bytes.
        page_size_bytes: u64,
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
    #[error("RAM block {0} is being unplugged, or was")]
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
    /// Two RAM regions would overlap at one priority, so that it would depend on their age which
    /// of them the guest sees.
    #[error(
        "RAM region {region} at {offset:#x} overlaps RAM region {other}, both at priority {priority}"
    )]
    Overlap {
        /// The region.
        region: String,
        /// Its offset in the parent of both, bytes.
        offset: u64,
        /// The region that is there.
        other: String,
        /// Priority of both.
        priority: i32,
    },
    /// A region's size, or what an alias shows, is not possible.
    #[error("region {region}: {reason}")]
    BadSize {
        /// The region.
        region: String,
        /// What is wrong, with the values.
        reason: String,
    },
    /// A region would grow past its maximum.
    #[error("region {region}: {size:#x} bytes are more than its maximum of {max:#x}")]
    PastMaximum {
        /// The region.
        region: String,
        /// Bytes asked for.
        size: u64,
        /// Bytes it may have.
        max: u64,
    },
    /// The access rules of registers contradict themselves.
    #[error("region {region}: {reason}")]
    BadRules {
        /// The region.
        region: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A coalesced range is registered twice, or overlaps another.
    #[error("region {region}: writes at {offset:#x} are coalesced already")]
    DuplicateCoalesced {
        /// The region.
        region: String,
        /// Offset in the region, bytes.
        offset: u64,
    },
    /// A coalesced range to remove is not registered.
    #[error("region {region}: no coalesced range at {offset:#x}")]
    NoCoalesced {
        /// The region.
        region: String,
        /// Offset in the region, bytes.
        offset: u64,
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
    /// A discard listener refused that memory is populated; everything was rolled back.
    #[error("RAM block {name}: {listener} refuses range {start:#x}..{end:#x}: {source}")]
    PopulateVetoed {
        /// The block.
        name: String,
        /// Who refuses.
        listener: String,
        /// First byte of what it refuses.
        start: u64,
        /// First byte after.
        end: u64,
        /// Its reason.
        source: Box<ListenerError>,
    },
    /// What is asked for excludes what somebody holds.
    #[error("{who} cannot {wants}: in the way are {blockers}")]
    DiscardConflict {
        /// Who asked.
        who: String,
        /// For what.
        wants: &'static str,
        /// Who holds what is in the way.
        blockers: String,
    },
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
