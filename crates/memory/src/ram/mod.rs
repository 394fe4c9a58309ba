// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM blocks: where guest memory comes from, and how parts of it are plugged and unplugged.

pub(crate) mod arena;
mod backing;
mod block;
mod blocks;
mod describe;
mod discard;
pub(crate) mod fence;
mod host;
mod list;
mod listen;
mod numa;
mod populate;
mod provided;
mod renew;
mod seal;
mod source;
mod spec;

pub use block::RamBlock;
pub use blocks::RamBlocks;
pub use discard::Discard;
pub use host::HostMemory;
pub(crate) use list::ListShared;
pub use list::{RamList, RamListGuard};
pub use seal::Seal;
pub use spec::{Backing, NumaPolicy, RamPolicy, RamSpec};

use std::ptr::NonNull;

/// The state of a range of a sparse block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// All of it is plugged.
    All,
    /// None of it is.
    None,
    /// Some of it is.
    Mixed,
}

/// Follows the RAM list. Called by whoever changes the list, one change after the other: a
/// notifier may look blocks up, but must not change the list or its notifiers, nor the map or who follows the dirty log: who
/// changes the map may grow a block meanwhile.
pub trait RamNotifier: Send {
    /// A block has appeared: host address, bytes used, bytes it may grow to.
    fn added(&mut self, host: NonNull<u8>, used: u64, max: u64);
    /// A block goes: it is no longer in the list; nobody uses its memory, which is still mapped.
    fn removed(&mut self, host: NonNull<u8>, used: u64, max: u64);
    /// A block has a new size in bytes.
    fn resized(&mut self, host: NonNull<u8>, old: u64, new: u64);
}

/// Names a notifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NotifierId(pub(crate) u64);
