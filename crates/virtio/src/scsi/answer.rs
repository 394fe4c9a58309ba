// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where an answer goes.

use std::ops::Range;

use ebbtide_memory::{Access, AccessError, PinList, ReadGuard};

use crate::service::Unanswerable;
use crate::virtq::Buffers;

/// The place of an answer, pinned.
pub(super) struct AnswerPlace {
    /// `None`: the memory is gone.
    memory: Option<PinList>,
}

impl AnswerPlace {
    /// Takes the first `bytes` of what the device may write.
    ///
    /// # Errors
    /// They are not there, or not in RAM.
    pub(super) fn take(
        guard: &ReadGuard<'_>,
        head: u16,
        writable: &mut Buffers,
        bytes: u32,
    ) -> Result<AnswerPlace, Unanswerable> {
        let place = writable
            .split_front(bytes)
            .ok_or(Unanswerable::NoRoom { head })?;
        let mut pins = PinList::new();
        let memory = match guard.pin_list(&place, Access::Write, &mut pins) {
            Ok(()) => Some(pins),
            // The guest has just given this memory back. It cannot expect an answer there; other requests go on.
            Err(AccessError::Unplugged { .. }) => None,
            Err(source) => return Err(Unanswerable::Memory { head, source }),
        };
        Ok(AnswerPlace { memory })
    }

    /// The host addresses it is at.
    pub(super) fn host_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.memory.iter().flat_map(PinList::host_ranges)
    }

    /// Writes the answer; returns how many bytes of the chain are written from its start, without a gap, when `behind`
    /// bytes behind the answer were.
    pub(super) fn give(&self, bytes: &[u8], behind: u32) -> u32 {
        let written = self
            .memory
            .as_ref()
            .is_some_and(|pins| pins.copy_from(0, bytes).is_ok());
        if written {
            u32::try_from(bytes.len())
                .unwrap_or(u32::MAX)
                .saturating_add(behind)
        } else {
            0
        }
    }
}
