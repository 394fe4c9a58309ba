// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log: which pages of which RAM block have changed since somebody looked.
//!
//! ```text
//!   whoever writes (section or pin)      whoever harvests
//!   1. write the bytes                   1. swap the words for 0
//!   2. light barrier                     2. heavy barrier
//!   3. ask the mask of clients           3. read the pages whose bits were set
//!   4. test the bit; set it if clear
//! ```
//!
//! A writer that finds its bit set leaves it alone, and so does nothing but load. Should the
//! harvester be taking that bit away at the same time, the writer's load came before the
//! harvester's swap was visible, and then the writer's bytes are visible to what the harvester
//! reads (the barriers are those of read sections, I1). The mask is asked in the same way: who
//! does not see a client that starts is seen by its first harvest, to which all RAM is dirty. So is a
//! flag in each thread's row that says whether there is a client at all: the end of a pin looks at that
//! first, as it looks at the row anyway. It is set once the masks are, and for a row that is new while a
//! client is on, before anybody has the row.
//!
//! Bitmaps are flat, one per client and block, as long as the block may become, and reserve no
//! memory. They are made when a client starts and published before its bit in the mask, so that
//! whoever sees the bit finds the bitmap; a block that appears while a client is on has its
//! bitmap before any view shows it. A bitmap goes only with its block: until then a pin may mark.
//!
//! Marks come from guarded writes, from stores of [`crate::AddressSpace`], from writes through
//! cached maps and slices, from writes by vm-memory's traits, and from pins taken for writing, which
//! mark all they cover before they let go: a block that has drained has been marked. What the kernel
//! or another process writes is known to an external tracker (KVM's slots), a [`crate::Listener`] of
//! the address space, which merges what it knows when asked to ([`DirtyLog::sync`]).

mod bitmap;
mod block;
mod log;
#[cfg(loom)]
pub(crate) mod modelled;
mod snapshot;
mod table;

pub use log::DirtyLog;
pub use snapshot::{DirtyRanges, DirtySnapshot};
pub(crate) use table::{BlockInfo, Key, SlotLog, Table};

/// What one bit stands for, in bytes.
pub(crate) const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
const PAGE_SHIFT: u32 = 12;

/// How many clients there are.
const CLIENTS: usize = 3;

/// Who wants to know what changes. Each has bits of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtyClient {
    /// Redraws what changes of a frame buffer.
    Display,
    /// Has translated code, and must forget it.
    Code,
    /// Sends memory away while the guest runs.
    Migration,
}

impl DirtyClient {
    /// All clients.
    pub const ALL: [DirtyClient; CLIENTS] = [
        DirtyClient::Display,
        DirtyClient::Code,
        DirtyClient::Migration,
    ];

    /// The client's bit in a mask.
    const fn bit(self) -> u8 {
        1 << self as u8
    }
}
