// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM blocks: where guest memory comes from, and how parts of it are plugged and unplugged.

pub(crate) mod arena;
mod backing;
mod block;
pub(crate) mod fence;
mod host;
mod list;
mod seal;

pub use block::RamBlock;
pub use host::HostMemory;
pub(crate) use list::ListShared;
pub use list::RamList;
pub use seal::Seal;

use std::path::PathBuf;
use std::ptr::NonNull;

/// Where a block's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anon {
        /// Advise transparent huge pages.
        thp: bool,
    },
    /// A memfd, which other processes can map.
    Memfd {
        /// Advise transparent huge pages.
        thp: bool,
    },
    /// Huge pages from the host's pool.
    Hugetlb {
        /// Page size in bytes.
        page_size_bytes: u64,
    },
    /// A file.
    File {
        /// Its path; made or extended when needed.
        path: PathBuf,
        /// Whether guest writes reach the file.
        share: bool,
    },
}

/// What a RAM block is to be.
#[derive(Clone, Debug)]
pub struct RamSpec {
    /// Name, unique in the list.
    pub name: String,
    /// Bytes used.
    pub size_bytes: u64,
    /// Bytes it may grow to; at least `size_bytes`.
    pub max_size_bytes: u64,
    /// Where the memory comes from.
    pub backing: Backing,
    /// Allocate all of it now.
    pub prefault: bool,
    /// Sparse: made of blocks of this many bytes, all unplugged at first.
    pub block_size_bytes: Option<u64>,
}

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

/// Follows the RAM list. Called with the list locked: no call back into it.
pub trait RamNotifier: Send {
    /// A block appears: host address, bytes used, bytes it may grow to.
    fn added(&mut self, host: NonNull<u8>, used: u64, max: u64);
    /// A block goes.
    fn removed(&mut self, host: NonNull<u8>, used: u64, max: u64);
    /// A block changes its size.
    fn resized(&mut self, host: NonNull<u8>, old: u64, new: u64);
}

/// Names a notifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NotifierId(pub(crate) u64);
