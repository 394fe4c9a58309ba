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

/// Pins taken and let go by the owner of the row, per bank: plain stores.
#[derive(Default)]
#[repr(align(32))]
pub(super) struct Home {
    pub(super) acquired: [AtomicU64; 2],
    pub(super) released: [AtomicU64; 2],
}

/// Pins of the row cloned or let go by other threads, per bank: atomic additions, on lines of
/// their own.
#[derive(Default)]
pub(super) struct Away {
    pub(super) acquired: [AtomicU64; 2],
    pub(super) released: [AtomicU64; 2],
}

/// The counters of a row.
pub(super) struct Counters {
    /// Pins at home.
    pub(super) home: PerSlot<Home>,
    /// Pins elsewhere.
    pub(super) away: PerSlot<Line<Away>>,
    /// Whether the worker waits for pins of the slot.
    pub(super) armed: PerSlot<AtomicBool>,
}

impl Counters {
    pub(super) fn new() -> Counters {
        Counters {
            home: PerSlot::new(),
            away: PerSlot::new(),
            armed: PerSlot::new(),
        }
    }

    /// Sets the counters of the first `slots` slots to zero.
    pub(super) fn clear(&self, slots: u32) {
        for slot in 0..slots {
            let (home, away) = (self.home.at(slot), &self.away.at(slot).0);
            for counts in [
                &home.acquired,
                &home.released,
                &away.acquired,
                &away.released,
            ] {
                counts.iter().for_each(|count| count.store(0, Relaxed));
            }
            self.armed.at(slot).store(false, Relaxed);
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

// SAFETY: gives out shared references only, to things that are never freed.
unsafe impl<T: Sync> Send for PerSlot<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for PerSlot<T> {}

impl<T: Zero> PerSlot<T> {
    /// The one of `slot`.
    #[inline(always)]
    pub(crate) fn at(&self, slot: u32) -> &T {
        debug_assert!((slot as usize) < MAX_SLOTS);
        // SAFETY: there are `MAX_SLOTS`, all slots are below (I5), and none is ever freed (I6).
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
unsafe impl Zero for Home {}
// SAFETY: made of atomics.
unsafe impl Zero for Line<Away> {}

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
