// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM that the machine has for as long as it runs: which block is behind it, and where the guest sees it.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use ebbtide_memory::{Error, Memory, RamBlock, Region, Ticket};

/// RAM wins over everything it overlaps; nothing should.
pub(crate) const RAM_PRIORITY: i32 = 10;

/// One block of RAM in the guest's map.
pub(crate) struct GuestRam {
    memory: Arc<Memory>,
    root: Arc<Region>,
    shown: Shown,
    now: RefCell<Now>,
}

/// How the guest sees a block.
pub(crate) enum Shown {
    /// All of it, from here on.
    At(u64),
    /// One part after the other, each with its name.
    Parts(Vec<(&'static str, Range<u64>)>),
}

struct Now {
    block: Arc<RamBlock>,
    regions: Vec<Arc<Region>>,
}

impl GuestRam {
    /// Shows `block` to the guest.
    ///
    /// # Errors
    /// Something is there.
    pub(crate) fn new(
        memory: &Arc<Memory>,
        root: &Arc<Region>,
        block: Arc<RamBlock>,
        shown: Shown,
    ) -> Result<GuestRam, Error> {
        let regions = shown.regions(&block);
        memory.update(|t| {
            let mut placed = regions.iter();
            placed.try_for_each(|(at, region)| t.add(root, region, *at, RAM_PRIORITY))
        })?;
        let regions = regions.into_iter().map(|(_, region)| region).collect();
        Ok(GuestRam {
            memory: Arc::clone(memory),
            root: Arc::clone(root),
            shown,
            now: RefCell::new(Now { block, regions }),
        })
    }

    /// The block.
    pub(crate) fn block(&self) -> Arc<RamBlock> {
        Arc::clone(&self.now.borrow().block)
    }

    /// Shows `block` in its place, in one change. The ticket is that of the block that was there.
    ///
    /// # Errors
    /// The change of the map failed; the guest sees what it saw.
    pub(crate) fn replace(&self, block: &Arc<RamBlock>) -> Result<Ticket, Error> {
        let new = self.shown.regions(block);
        let mut now = self.now.borrow_mut();
        let ticket = self.memory.update(|t| {
            for region in &now.regions {
                t.remove(region)?;
            }
            let ticket = t.retire(&now.block)?;
            for (at, region) in &new {
                t.add(&self.root, region, *at, RAM_PRIORITY)?;
            }
            Ok(ticket)
        })?;
        *now = Now {
            block: Arc::clone(block),
            regions: new.into_iter().map(|(_, region)| region).collect(),
        };
        Ok(ticket)
    }
}

impl Shown {
    /// Regions of `block`, and where they go.
    fn regions(&self, block: &Arc<RamBlock>) -> Vec<(u64, Arc<Region>)> {
        let all = Region::ram(block.name(), block);
        let parts = match self {
            Shown::At(at) => return vec![(*at, all)],
            Shown::Parts(parts) => parts,
        };
        let mut offset = 0;
        let part = |(name, range): &(&'static str, Range<u64>)| {
            let bytes = range.end - range.start;
            let part = Region::alias(*name, &all, offset, bytes);
            offset += bytes;
            (range.start, part)
        };
        parts.iter().map(part).collect()
    }
}
