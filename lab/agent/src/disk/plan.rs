// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is done to a disk, one operation after the other, as a seed decides it.

use super::EXTENT_BLOCKS;
use crate::pattern::mix;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// An operation on `count` blocks from `block` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub kind: Kind,
    pub block: u64,
    pub count: u64,
}

#[derive(Debug)]
pub(super) struct Plan {
    random: u64,
    blocks: u64,
}

impl Plan {
    /// For a disk of `blocks` blocks, at least one.
    pub(super) fn new(seed: u64, blocks: u64) -> Plan {
        Plan {
            random: mix(seed),
            blocks,
        }
    }

    /// The size of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What comes next; a write unless `reads` allows that it is a read.
    pub(super) fn next(&mut self, reads: bool) -> Step {
        let count = 1 + self.number() % EXTENT_BLOCKS.min(self.blocks);
        let block = self.number() % (self.blocks - count + 1);
        let kind = match reads && self.number().is_multiple_of(2) {
            true => Kind::Read,
            false => Kind::Write,
        };
        Step { kind, block, count }
    }

    fn number(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }
}
