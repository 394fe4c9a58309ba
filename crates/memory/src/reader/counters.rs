// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pin counters of a row, by slot.

use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

use super::row::Line;
use crate::sync::{AtomicBool, AtomicU8, AtomicU64};

/// Slots, and with that RAM blocks, a memory can have.
#[cfg(not(loom))]
pub(crate) const MAX_SLOTS: usize = 1 << 16;
#[cfg(loom)]
pub(crate) const MAX_SLOTS: usize = 2;

/// Where a pin counts: one of the two banks of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane(u32);

impl Lane {
    /// What nothing counts in.
    pub(crate) const NONE: Lane = Lane(0);

    #[inline(always)]
    pub(crate) fn new(slot: u32, bank: usize) -> Lane {
        debug_assert!(bank < 2);
        Lane(2 * slot + bank as u32)
    }

    /// The lane of the same slot in `bank`, of one in bank 0.
    #[inline(always)]
    pub(crate) fn in_bank(self, bank: usize) -> Lane {
        debug_assert!(self.0.is_multiple_of(2) && bank < 2);
        Lane(self.0 + bank as u32)
    }

    pub(crate) fn slot(self) -> u32 {
        self.0 / 2
    }
}

/// Pins taken and let go, of one lane.
#[derive(Default)]
#[repr(align(16))]
pub(super) struct Counts {
    pub(super) acquired: AtomicU64,
    pub(super) released: AtomicU64,
}

/// The counts of a slot, by bank.
#[derive(Default)]
#[repr(C)]
struct Banks([Counts; 2]);

/// The counters of a row.
pub(super) struct Counters {
    /// Pins taken and let go by the owner of the row: plain stores.
    home: PerSlot<Banks>,
    /// Pins of the row cloned or let go by other threads: atomic additions, on lines of their own.
    away: PerSlot<Line<Banks>>,
    /// Whether the worker waits for pins of the slot.
    armed: PerSlot<AtomicBool>,
}

impl Counters {
    pub(super) fn new() -> Counters {
        Counters {
            home: PerSlot::new(),
            away: PerSlot::new(),
            armed: PerSlot::new(),
        }
    }

    /// The counts of pins at home.
    #[inline(always)]
    pub(super) fn home(&self, lane: Lane) -> &Counts {
        debug_assert!((lane.slot() as usize) < MAX_SLOTS);
        let lanes = self.home.0.cast::<Counts>();
        // SAFETY: as in `PerSlot::at`; the banks of all slots lie in a row.
        unsafe { lanes.add(lane.0 as usize).as_ref() }
    }

    /// The counts of pins elsewhere.
    #[inline(always)]
    pub(super) fn away(&self, lane: Lane) -> &Counts {
        &self.away.at(lane.slot()).0.0[(lane.0 % 2) as usize]
    }

    /// Whether the worker waits for pins of the slot.
    pub(super) fn armed(&self, slot: u32) -> &AtomicBool {
        self.armed.at(slot)
    }

    /// Sets the counters of the first `slots` slots to zero.
    pub(super) fn clear(&self, slots: u32) {
        for slot in 0..slots {
            for lane in [Lane::new(slot, 0), Lane::new(slot, 1)] {
                for counts in [self.home(lane), self.away(lane)] {
                    counts.acquired.store(0, Relaxed);
                    counts.released.store(0, Relaxed);
                }
            }
            self.armed(slot).store(false, Relaxed);
        }
    }

    /// Frees the counters of a model that has ended.
    #[cfg(loom)]
    pub(super) fn free(&self) {
        self.home.free();
        self.away.free();
        self.armed.free();
    }
}

/// One `T` per slot. The memory comes from the host as it is touched, so that it costs a page or
/// two, and one is found without a table in between.
pub(crate) struct PerSlot<T>(NonNull<T>);

// SAFETY: gives out shared references only, to things that are never freed (M6).
unsafe impl<T: Sync> Send for PerSlot<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for PerSlot<T> {}

impl<T: Zero> PerSlot<T> {
    /// The one of `slot`.
    #[inline(always)]
    pub(crate) fn at(&self, slot: u32) -> &T {
        debug_assert!((slot as usize) < MAX_SLOTS);
        // SAFETY: there are `MAX_SLOTS`, all slots are below (M5), and none is ever freed (M6).
        unsafe { self.0.add(slot as usize).as_ref() }
    }
}

/// Types for which all zeroes is the value to start with.
///
/// # Safety
/// All zeroes must be a valid value.
pub(crate) unsafe trait Zero: Default {}
// SAFETY: atomics are as valid with all zeroes as the plain types are, here and below.
unsafe impl Zero for AtomicBool {}
// SAFETY: as above.
unsafe impl Zero for AtomicU8 {}
// SAFETY: as above.
unsafe impl Zero for AtomicU64 {}
// SAFETY: made of atomics.
unsafe impl Zero for Banks {}
// SAFETY: made of atomics.
unsafe impl Zero for Line<Banks> {}

#[cfg(not(loom))]
impl<T: Zero> PerSlot<T> {
    pub(crate) fn new() -> PerSlot<T> {
        let bytes = MAX_SLOTS * size_of::<T>();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        let error = std::io::Error::last_os_error();
        assert!(
            address != libc::MAP_FAILED,
            "no address space for tables of pin slots: {error}"
        );
        // SAFETY: the mapping just made. Huge pages would cost 2 MiB for the first counter.
        unsafe { libc::madvise(address, bytes, libc::MADV_NOHUGEPAGE) };
        let address = NonNull::new(address.cast());
        PerSlot(address.unwrap_or_else(|| unreachable!("nothing is mapped at 0 unasked")))
    }
}

#[cfg(loom)]
impl<T: Zero> PerSlot<T> {
    pub(crate) fn new() -> PerSlot<T> {
        let things: Box<[T]> = (0..MAX_SLOTS).map(|_| T::default()).collect();
        PerSlot(NonNull::from(Box::leak(things)).cast())
    }

    /// Frees them; the model has ended.
    pub(crate) fn free(&self) {
        let things = std::ptr::slice_from_raw_parts_mut(self.0.as_ptr(), MAX_SLOTS);
        // SAFETY: leaked by `new`, and not used any more.
        drop(unsafe { Box::from_raw(things) });
    }
}
