// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The node of a cell that shows one section and nothing else.

use std::cell::UnsafeCell;
use std::mem::{MaybeUninit, offset_of};
use std::sync::Arc;

use super::{Entry, Head, UNIT};
use crate::flat::Flat;

/// A node that shows one section wherever it is asked, as a part of that section: it needs no
/// memory of its own, and lives as long.
pub(crate) struct Solo(UnsafeCell<MaybeUninit<Inside>>);

/// Laid out as any node is.
#[repr(C)]
struct Inside {
    head: Head,
    slots: [u16; 4],
    entry: Entry,
}

// SAFETY: written by `show` before anybody else knows it, and read ever after; what it points to
// is part of its own section (M2).
unsafe impl Send for Solo {}
// SAFETY: as above.
unsafe impl Sync for Solo {}

impl Solo {
    /// One that shows nothing yet.
    pub(crate) const fn new() -> Solo {
        Solo(UnsafeCell::new(MaybeUninit::uninit()))
    }

    /// Makes it show `flat`.
    ///
    /// # Safety
    /// It is the solo node of `flat`, which nobody else knows.
    pub(crate) unsafe fn show(&self, flat: &Arc<Flat>) {
        let at = self.0.get().cast::<Inside>();
        let head = Head {
            slot_zero: at.wrapping_byte_add(offset_of!(Inside, slots)).cast(),
            last_slot: 0,
            shift: 63,
            slot_count: 4,
            entry_count: 1,
        };
        let inside = Inside {
            head,
            slots: [(offset_of!(Inside, entry) / UNIT) as u16; 4],
            entry: Entry::section(flat),
        };
        // SAFETY: room for it, and nobody reads it yet.
        unsafe { at.write(inside) };
    }

    /// The node, after `show`.
    pub(super) fn head(&self) -> *const Head {
        self.0.get().cast::<Inside>().cast_const().cast()
    }
}
