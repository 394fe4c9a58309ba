// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log of a RAM block.

use std::ops::Range;
use std::sync::Arc;

use super::bitmap::Bitmap;
use super::table::Key;
use super::{BlockInfo, DirtyClient, DirtySnapshot, PAGE_BYTES, Table};
use crate::ram::fence::Fence;
use crate::{Error, RamBlock};

/// Offsets are in bytes from the start of the block. A range counts as the 4-KiB pages that it
/// touches; what of it lies outside the block is nothing.
impl RamBlock {
    /// Whether any client is on for the block. Inside a [`crate::Listener`] the answer holds
    /// until the listener returns.
    pub fn is_logged(&self) -> bool {
        self.log().is_logged(self.log_key())
    }

    /// Makes `range` dirty to all clients that are on: something has changed it that marks
    /// nothing itself. Call it after the change.
    pub fn mark_dirty(&self, range: Range<u64>) {
        self.log().set(self.log_key(), range);
    }

    /// Makes pages dirty to all clients that are on, as the bitmap of an external tracker tells:
    /// bit `n % 64` of word `n / 64` stands for page `n` from `offset`, a multiple of 4096, on.
    pub fn merge_dirty(&self, offset: u64, words: &[u64]) {
        let first = offset / PAGE_BYTES;
        self.log().merge(self.log_key(), first, words);
    }

    /// Whether anything of `range` is dirty.
    ///
    /// # Errors
    /// `NotLogged` when the client is not on.
    pub fn is_dirty(&self, client: DirtyClient, range: Range<u64>) -> Result<bool, Error> {
        Ok(self.bitmap(client)?.look(pages(range)).next().is_some())
    }

    /// What is dirty of `range`. It stays so.
    ///
    /// # Errors
    /// `NotLogged` when the client is not on.
    pub fn dirty(&self, client: DirtyClient, range: Range<u64>) -> Result<DirtySnapshot, Error> {
        let words = self.bitmap(client)?.look(pages(range)).collect();
        Ok(DirtySnapshot::new(words))
    }

    /// What is dirty of `range`, which is clean from then on. Whatever is written to a page that
    /// the snapshot has is seen by who reads the page after this call, or makes it dirty again.
    ///
    /// A pin that was taken for writing makes its pages dirty when it goes, not before. External
    /// trackers are not asked: [`crate::DirtyLog::sync`] is.
    ///
    /// # Errors
    /// `NotLogged` when the client is not on.
    pub fn snapshot_and_clear(
        &self,
        client: DirtyClient,
        range: Range<u64>,
    ) -> Result<DirtySnapshot, Error> {
        let mut words = Vec::new();
        self.bitmap(client)?.take(pages(range), &mut words);
        if !words.is_empty() {
            self.log().settle();
        }
        Ok(DirtySnapshot::new(words))
    }

    // --- for the crate ----------------------------------------------------------------------

    /// Marks what was written: `len` bytes from `start` on, as far as they lie in the block. Takes no
    /// lock.
    ///
    /// # Safety
    /// The caller is in a section whose view shows the block, or holds a pin on it.
    #[cfg_attr(not(feature = "vm-memory"), allow(dead_code))]
    #[inline]
    pub(crate) unsafe fn mark_held(&self, start: u64, len: u64) {
        let len = len.min(self.max_size_bytes().saturating_sub(start));
        if len != 0 {
            let (slot, host) = self.log_key();
            // SAFETY: bytes of the block, which the caller keeps.
            unsafe { self.log().mark(slot, host + start, len) };
        }
    }

    /// What the log needs to know of the block.
    pub(crate) fn enter_log(&self, sparse: Option<(&Arc<Fence>, u64)>) -> Result<(), Error> {
        let info = BlockInfo {
            name: self.name().to_owned(),
            host: self.log_key().1,
            max_bytes: self.max_size_bytes(),
            used_bytes: self.size_bytes(),
            sparse: sparse.map(|(fence, block_bytes)| (Arc::clone(fence), block_bytes)),
        };
        self.log().add(self.slot(), info)
    }

    /// The block has grown.
    pub(crate) fn log_growth(&self) {
        let size = self.size_bytes();
        self.log().grown(self.log_key(), size);
    }

    /// The block has drained and goes.
    pub(crate) fn leave_log(&self) {
        self.log().remove(self.log_key());
    }

    fn log(&self) -> &'static Table {
        self.grace().hub().dirty()
    }

    /// How the log names the block.
    pub(super) fn log_key(&self) -> Key {
        (self.slot(), self.host().as_ptr() as u64)
    }

    fn bitmap(&self, client: DirtyClient) -> Result<Arc<Bitmap>, Error> {
        let bitmap = self.log().bitmap(self.log_key(), client);
        bitmap.ok_or_else(|| Error::NotLogged {
            block: self.name().to_owned(),
            client,
        })
    }
}

fn pages(range: Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}
