// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log as the loom models drive it.

use super::{BlockInfo, DirtyClient, PAGE_BYTES, Table};
use crate::modelled::{Core, Home};
use crate::reader::counters::Lane;
use crate::reader::hub::Hub;

/// The dirty log, for blocks that start at host address 0 and have `PAGES` pages.
#[derive(Clone, Copy)]
pub struct Dirty {
    hub: &'static Hub,
    table: &'static Table,
}

/// Pages of a modelled block.
pub const PAGES: u64 = 2;

impl Dirty {
    /// The log of a memory.
    pub fn of(core: &Core) -> Dirty {
        Dirty {
            hub: core.hub(),
            table: core.hub().dirty(),
        }
    }

    /// As `RamList::add`, up to the point where views may show the block.
    pub fn add_block(&self, slot: u32) {
        let info = BlockInfo {
            name: String::new(),
            host: 0,
            max_bytes: PAGES * PAGE_BYTES,
            used_bytes: PAGES * PAGE_BYTES,
            sparse: None,
        };
        self.table.add(slot, info).unwrap();
    }

    /// As `DirtyLog::start`.
    pub fn start(&self) {
        self.hub.start_client(DirtyClient::Migration, None).unwrap();
    }

    /// What every write does once the bytes are there: page 0 the short way.
    pub fn mark(&self, slot: u32, page: u64) {
        // SAFETY: the models mark pages of blocks that stay until the end.
        unsafe {
            if page == 0 {
                let lane = Lane::new(slot, 0);
                self.table.mark_expected(lane, page * PAGE_BYTES, 1);
            } else {
                self.table.mark(slot, page * PAGE_BYTES, 1);
            }
        }
    }

    /// What the end of a pin of `thread` does once the bytes are there.
    pub fn mark_pinned(&self, thread: &Home, slot: u32, page: u64) {
        if thread.may_be_logged() {
            self.mark(slot, page);
        }
    }

    /// As `RamBlock::snapshot_and_clear`, of the whole block: whether each page was dirty.
    pub fn harvest(&self, slot: u32) -> [bool; PAGES as usize] {
        let Some(map) = self.table.bitmap((slot, 0), DirtyClient::Migration) else {
            return [false; PAGES as usize];
        };
        let mut words = Vec::new();
        map.take(0..PAGES, &mut words);
        if !words.is_empty() {
            self.table.settle();
        }
        let snapshot = super::DirtySnapshot::new(words);
        std::array::from_fn(|page| snapshot.contains(page as u64 * PAGE_BYTES))
    }
}
