// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vm-memory's bitmaps: what is written by way of its traits is marked here.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::RamBlock;

/// Who wants to know what is written through vm-memory's traits.
pub trait WriteLog: Send + Sync {
    /// Bytes of a block were written, offsets counted from its start. Called after the write, on
    /// the thread that wrote; may be called for more than was written, and never waits.
    fn wrote(&self, block: &RamBlock, range: Range<u64>);

    /// Whether the page at an offset was written.
    fn is_dirty(&self, block: &RamBlock, offset: u64) -> bool;
}

/// The part of a RAM block from one offset on: what is written to it is marked in the dirty log of
/// its memory, and told to another log, if there is one.
#[derive(Clone, Copy)]
pub struct Marks<'a> {
    log: Option<&'a dyn WriteLog>,
    block: &'a RamBlock,
    offset: u64,
    /// Whether `'a` is inside a section that shows the block, or a pin on it.
    held: bool,
}

impl<'a> Marks<'a> {
    /// # Safety
    /// For all of `'a` a section is open whose view shows the block, or a pin on it is out.
    pub(super) unsafe fn held(
        log: Option<&'a dyn WriteLog>,
        block: &'a RamBlock,
        offset: u64,
    ) -> Marks<'a> {
        Marks {
            log,
            block,
            offset,
            held: true,
        }
    }

    /// The part from `offset` bytes further on.
    pub(super) fn at(self, offset: usize) -> Marks<'a> {
        Marks {
            offset: self.offset.saturating_add(offset as u64),
            ..self
        }
    }
}

impl<'a> WithBitmapSlice<'_> for Marks<'a> {
    type S = Marks<'a>;
}

impl BitmapSlice for Marks<'_> {}

impl<'a> Bitmap for Marks<'a> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let start = self.at(offset).offset;
        let end = start.saturating_add(len as u64);
        if self.held {
            // SAFETY: by the promise that `held` was made with.
            unsafe { self.block.mark_held(start, len as u64) };
        } else {
            self.block.mark_dirty(start..end);
        }
        if let Some(log) = self.log {
            log.wrote(self.block, start..end);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let at = self.at(offset).offset;
        self.log.is_some_and(|log| log.is_dirty(self.block, at))
    }

    fn slice_at(&self, offset: usize) -> Marks<'a> {
        self.at(offset)
    }
}

impl fmt::Debug for Marks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Marks({}+{:#x})", self.block.name(), self.offset)
    }
}

/// The same with a share in log and block. vm-memory wants a type that lends [`Marks`].
#[derive(Clone)]
pub struct Written {
    log: Option<Arc<dyn WriteLog>>,
    block: Arc<RamBlock>,
}

impl Written {
    /// The whole of `block`.
    pub fn new(block: &Arc<RamBlock>, log: Option<Arc<dyn WriteLog>>) -> Written {
        Written {
            log,
            block: Arc::clone(block),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = Marks<'a>;
}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> Marks<'_> {
        Marks {
            log: self.log.as_deref(),
            block: &self.block,
            offset: offset as u64,
            held: false,
        }
    }
}
