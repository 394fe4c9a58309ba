// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM blocks.

use std::future::Future;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Error;

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

/// The RAM blocks of a memory.
pub struct RamList {}

impl RamList {
    /// Makes a block. May block when it prefaults.
    pub fn add(&self, _spec: RamSpec) -> Result<Arc<RamBlock>, Error> {
        todo!()
    }
    /// All blocks, largest first.
    pub fn blocks(&self) -> Vec<Arc<RamBlock>> {
        todo!()
    }
    /// By name.
    pub fn by_name(&self, _name: &str) -> Option<Arc<RamBlock>> {
        todo!()
    }
    /// By host address: the block and the offset in it.
    pub fn by_host(&self, _host: *const u8) -> Option<(Arc<RamBlock>, u64)> {
        todo!()
    }
    /// By RAM offset: the block and the offset in it.
    pub fn by_ram_offset(&self, _ram_offset: u64) -> Option<(Arc<RamBlock>, u64)> {
        todo!()
    }
    /// Counts the changes of the list.
    pub fn version(&self) -> u64 {
        todo!()
    }
    /// The list as text.
    pub fn dump(&self) -> String {
        todo!()
    }
    /// Adds a notifier, which is shown the blocks that exist.
    pub fn add_notifier(&self, _notifier: Box<dyn RamNotifier>) -> NotifierId {
        todo!()
    }
    /// Removes a notifier.
    pub fn remove_notifier(&self, _id: NotifierId) {
        todo!()
    }
}

/// A block of RAM.
pub struct RamBlock {}

impl RamBlock {
    /// Name.
    pub fn name(&self) -> &str {
        todo!()
    }
    /// Where it is in the RAM offset space.
    pub fn ram_offset(&self) -> u64 {
        todo!()
    }
    /// Host address.
    pub fn host(&self) -> NonNull<u8> {
        todo!()
    }
    /// Bytes used.
    pub fn size_bytes(&self) -> u64 {
        todo!()
    }
    /// Bytes it may grow to.
    pub fn max_size_bytes(&self) -> u64 {
        todo!()
    }
    /// Bytes of a page of its backing.
    pub fn page_size_bytes(&self) -> u64 {
        todo!()
    }
    /// The descriptor behind it.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        todo!()
    }
    /// Bytes of a block, when sparse.
    pub fn block_size_bytes(&self) -> Option<u64> {
        todo!()
    }
    /// The state of a range.
    pub fn plugged(&self, _range: Range<u64>) -> Plugged {
        todo!()
    }
    /// Bytes plugged.
    pub fn plugged_bytes(&self) -> u64 {
        todo!()
    }
    /// Plugs whole unplugged blocks: all or nothing.
    pub fn plug(&self, _range: Range<u64>, _populate: bool) -> Result<(), Error> {
        todo!()
    }
    /// Begins to unplug whole plugged blocks.
    pub fn seal(self: &Arc<Self>, _range: Range<u64>) -> Result<Seal, Error> {
        todo!()
    }
}

/// A range of a sparse block on its way out.
pub struct Seal {}

impl Seal {
    /// The range.
    pub fn range(&self) -> Range<u64> {
        todo!()
    }
    /// Whether nobody uses it any more.
    pub fn is_drained(&self) -> bool {
        todo!()
    }
    /// Ready when nobody uses it any more.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        async { todo!() }
    }
    /// Makes it plugged again, with its contents.
    pub fn undo(self) {
        todo!()
    }
    /// Frees its pages and makes it inaccessible.
    pub fn discard(self) -> Result<(), (Seal, Error)> {
        todo!()
    }
}
