// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Follows a chain of descriptors and checks every rule of 2.7.5.

use ebbtide_memory::{Access, AccessError, Gpa, GuestSlice, ReadGuard};

use super::chain::Chain;
use super::descriptor::Descriptor;
use super::error::{QueueError, Ring};

/// Most descriptors of a chain that ends in an indirect table.
///
/// A driver must keep to the queue size there too (2.7.5.3.1), but Linux keeps to what the device's own configuration
/// allows (a block device's `seg_max`, for instance) even when it chose a smaller queue. The limit that is left keeps a
/// guest from making the host allocate, and is what one vectored system call takes.
pub const MAX_INDIRECT_CHAIN: u32 = 1024;

/// The most buffers of data that a device may tell its driver to put into a request, where the queue has at most `queue_size`
/// descriptors and what is around the data takes two: as many as are taken in an indirect table whatever size the driver
/// chose.
pub(crate) fn segments_max(queue_size: u16) -> u32 {
    u32::from(queue_size)
        .min(MAX_INDIRECT_CHAIN)
        .saturating_sub(2)
        .max(1)
}

/// The direct table of a queue and what was negotiated for it.
pub(super) struct Table<'g> {
    pub(super) descriptors: GuestSlice<'g>,
    pub(super) gpa: Gpa,
    pub(super) size: u16,
    pub(super) indirect: bool,
}

impl Table<'_> {
    /// Makes `chain` the one that starts at `head`.
    pub(super) fn read(
        &self,
        guard: &ReadGuard<'_>,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), QueueError> {
        chain.restart(head);
        let mut index = head;
        // Every turn takes one descriptor; a chain that visits one twice runs out of turns.
        for taken in 1..=u32::from(self.size) {
            let descriptor = self.descriptor(index)?;
            if descriptor.is_indirect() {
                self.check_indirect(&descriptor, head)?;
                return walk_indirect(guard, &descriptor, chain, taken - 1, self.size);
            }
            chain.push(&descriptor)?;
            match descriptor.next() {
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
        Err(QueueError::ChainTooLong {
            head,
            limit: u32::from(self.size),
        })
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, QueueError> {
        if index >= self.size {
            return Err(QueueError::DescriptorIndex {
                index,
                entries: u32::from(self.size),
            });
        }
        self.descriptors
            .read::<Descriptor>(usize::from(index) * Descriptor::SIZE_BYTES as usize)
            .map_err(|source| QueueError::Access {
                ring: Ring::Descriptors,
                gpa: self.gpa,
                source,
            })
    }

    fn check_indirect(&self, descriptor: &Descriptor, head: u16) -> Result<(), QueueError> {
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated { head });
        }
        if descriptor.next().is_some() {
            return Err(QueueError::IndirectWithNext { head });
        }
        // The write flag of the descriptor means nothing here (2.7.5.3.2).
        Ok(())
    }
}

/// Follows the indirect table behind `table`; `taken` buffers of the chain came before it.
fn walk_indirect(
    guard: &ReadGuard<'_>,
    table: &Descriptor,
    chain: &mut Chain,
    taken: u32,
    queue_size: u16,
) -> Result<(), QueueError> {
    let length = table.length();
    if length == 0 || !length.is_multiple_of(Descriptor::SIZE_BYTES) {
        return Err(QueueError::IndirectLength { length });
    }
    let base = Gpa(table.address());
    if base.0.checked_add(u64::from(length) - 1).is_none() {
        return Err(QueueError::AddressOverflow { gpa: base, length });
    }
    let head = chain.head;
    let entries = length / Descriptor::SIZE_BYTES;
    let limit = MAX_INDIRECT_CHAIN.max(u32::from(queue_size));
    // One translation for all, unless the table lies across regions.
    let table = guard.slice(base, length as usize, Access::Read).ok();
    let mut index = 0u16;
    for _ in 0..entries.min(limit.saturating_sub(taken)) {
        let offset = usize::from(index) * Descriptor::SIZE_BYTES as usize;
        let descriptor = match table.as_ref().map(|table| table.read(offset)) {
            Some(Ok(descriptor)) => descriptor,
            _ => indirect_descriptor(guard, base, index)?,
        };
        if descriptor.is_indirect() {
            return Err(QueueError::IndirectNested { head });
        }
        chain.push(&descriptor)?;
        index = match descriptor.next() {
            None => return Ok(()),
            Some(next) if u32::from(next) < entries => next,
            Some(next) => {
                return Err(QueueError::DescriptorIndex {
                    index: next,
                    entries,
                });
            }
        };
    }
    Err(QueueError::ChainTooLong {
        head,
        limit: entries.min(limit),
    })
}

/// Entry `index` of the table at `base`, which is known not to wrap.
fn indirect_descriptor(
    guard: &ReadGuard<'_>,
    base: Gpa,
    index: u16,
) -> Result<Descriptor, QueueError> {
    let gpa = Gpa(base
        .0
        .wrapping_add(u64::from(index) * u64::from(Descriptor::SIZE_BYTES)));
    guard
        .read::<Descriptor>(gpa)
        .map_err(|source: AccessError| QueueError::Access {
            ring: Ring::Indirect,
            gpa,
            source,
        })
}
