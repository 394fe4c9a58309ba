// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Seals: the way of a range of a sparse block out.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::RamBlock;
use crate::Error;
use crate::reader::wake::Level;

/// A range of a sparse block that nobody can newly use; see [`RamBlock::seal`].
///
/// Dropping it is [`Seal::undo`].
pub struct Seal {
    block: Arc<RamBlock>,
    range: Range<u64>,
    level: Arc<Level>,
    /// Discard listeners have been told.
    told: bool,
    discarded: bool,
}

impl Seal {
    pub(super) fn new(block: Arc<RamBlock>, range: Range<u64>, level: Arc<Level>) -> Seal {
        Seal {
            block,
            range,
            level,
            told: false,
            discarded: false,
        }
    }

    /// The range in the block, in bytes.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The block.
    pub fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }

    /// Whether no section and no pin taken before the seal is left.
    pub fn is_drained(&self) -> bool {
        self.level.get() != 0
    }

    /// Ready when drained. Independent of the seal's life.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        self.level.reached(1)
    }

    /// Waits on this thread until it has drained, for `limit` at most. Returns whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        self.level.wait_for(1, limit)
    }

    /// Makes the range plugged again, with its contents. Discard listeners that were told of its
    /// discard get it back.
    pub fn undo(self) {}

    /// Tells the discard listeners, gives the pages of the range back to the host and makes it
    /// inaccessible. May block for as long as those take.
    ///
    /// # Errors
    /// `NotDrained` while pins are left, naming whose; `Host` when the host refuses. The seal
    /// comes back with the error: nothing has changed, and it can be tried again or undone.
    pub fn discard(mut self) -> Result<(), (Seal, Error)> {
        if !self.is_drained() {
            let holders = self.block.pin_holders();
            let holders: Vec<String> = holders
                .iter()
                .map(|(who, count)| format!("{count} pins of {who}"))
                .collect();
            let Range { start, end } = self.range;
            let what = format!(
                "range {start:#x}..{end:#x} of RAM block {}",
                self.block.name()
            );
            return Err((
                self,
                Error::NotDrained {
                    what,
                    holders: holders.join(", "),
                },
            ));
        }
        match self.block.discard_sealed(&self.range, &mut self.told) {
            Ok(()) => {
                self.discarded = true;
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Seal {
    fn drop(&mut self) {
        if !self.discarded {
            self.block.unseal(&self.range, self.told);
        }
    }
}
