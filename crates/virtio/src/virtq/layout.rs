// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the parts of a split virtqueue are (2.7): sizes, offsets, alignments.

use ebbtide_memory::Gpa;

use super::error::{QueueError, Ring};

/// The largest queue size (2.7).
pub const MAX_SIZE: u16 = 32768;

/// Offset of `flags` in the available and in the used ring.
pub(super) const FLAGS: usize = 0;
/// Offset of `idx` in the available and in the used ring.
pub(super) const INDEX: usize = 2;
/// Offset of the first element in the available and in the used ring.
pub(super) const ELEMENTS: usize = 4;
/// Bytes of an element of the available ring.
pub(super) const AVAIL_ELEMENT: usize = 2;
/// Bytes of an element of the used ring.
pub(super) const USED_ELEMENT: usize = 8;
/// `flags` of the available ring: the driver wants no interrupts (2.7.7.1).
pub(super) const NO_INTERRUPT: u16 = 1;
/// `flags` of the used ring: the device wants no kicks (2.7.10).
pub(super) const NO_NOTIFY: u16 = 1;

/// Size and place of a queue, as the driver programmed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Descriptors in the table; a power of two up to [`MAX_SIZE`].
    pub size: u16,
    /// The descriptor table.
    pub desc: Gpa,
    /// The available ring ("driver area").
    pub avail: Gpa,
    /// The used ring ("device area").
    pub used: Gpa,
}

impl QueueConfig {
    /// Checks what can be checked without looking at memory: size and alignments.
    ///
    /// # Errors
    /// [`QueueError::Size`], [`QueueError::Misaligned`].
    pub fn validate(&self) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > MAX_SIZE {
            return Err(QueueError::Size { size: self.size });
        }
        aligned(Ring::Descriptors, self.desc, 16)?;
        aligned(Ring::Available, self.avail, 2)?;
        aligned(Ring::Used, self.used, 4)
    }

    /// Bytes of the descriptor table.
    pub fn desc_len(&self) -> usize {
        16 * usize::from(self.size)
    }

    /// Bytes of the available ring, `used_event` included.
    pub fn avail_len(&self) -> usize {
        self.used_event() + 2
    }

    /// Bytes of the used ring, `avail_event` included.
    pub fn used_len(&self) -> usize {
        self.avail_event() + 2
    }

    /// Offset of `used_event` in the available ring.
    pub(super) fn used_event(&self) -> usize {
        ELEMENTS + AVAIL_ELEMENT * usize::from(self.size)
    }

    /// Offset of `avail_event` in the used ring.
    pub(super) fn avail_event(&self) -> usize {
        ELEMENTS + USED_ELEMENT * usize::from(self.size)
    }

    /// Offset of the element for `index` in the available ring.
    pub(super) fn avail_element(&self, index: u16) -> usize {
        ELEMENTS + AVAIL_ELEMENT * usize::from(self.slot(index))
    }

    /// Offset of the element for `index` in the used ring.
    pub(super) fn used_element(&self, index: u16) -> usize {
        ELEMENTS + USED_ELEMENT * usize::from(self.slot(index))
    }

    /// Ring indices count freely; the size is a power of two.
    fn slot(&self, index: u16) -> u16 {
        index & self.size.wrapping_sub(1)
    }
}

fn aligned(ring: Ring, gpa: Gpa, alignment: u64) -> Result<(), QueueError> {
    if gpa.0.is_multiple_of(alignment) {
        Ok(())
    } else {
        Err(QueueError::Misaligned {
            ring,
            gpa,
            alignment,
        })
    }
}
