// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pin counters of a row, by slot.

use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

use super::row::Line;
use crate::sync::{AtomicBool, AtomicU64};

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

/// One counter of each kind per slot. The memory comes from the host as it is touched, so that a
/// row costs a page or two and a pin finds its counter without a table in between.
pub(super) struct Counters {
    home: NonNull<Home>,
    away: NonNull<Line<Away>>,
    armed: NonNull<AtomicBool>,
}

// SAFETY: all that is reached through the pointers are atomics, valid for ever.
unsafe impl Send for Counters {}
// SAFETY: as above.
unsafe impl Sync for Counters {}

impl Counters {
    /// Pins at home.
    #[inline(always)]
    pub(super) fn home(&self, slot: u32) -> &Home {
        debug_assert!((slot as usize) < MAX_SLOTS);
        // SAFETY: there are `MAX_SLOTS` counters, all slots are below (I5), none is ever freed.
        unsafe { self.home.add(slot as usize).as_ref() }
    }

    /// Pins elsewhere.
    #[inline(always)]
    pub(super) fn away(&self, slot: u32) -> &Away {
        debug_assert!((slot as usize) < MAX_SLOTS);
        // SAFETY: as above.
        unsafe { &self.away.add(slot as usize).as_ref().0 }
    }

    /// Whether the worker waits for pins of the slot.
    pub(super) fn armed(&self, slot: u32) -> &AtomicBool {
        debug_assert!((slot as usize) < MAX_SLOTS);
        // SAFETY: as above.
        unsafe { self.armed.add(slot as usize).as_ref() }
    }

    /// Sets the counters of the first `slots` slots to zero.
    pub(super) fn clear(&self, slots: u32) {
        for slot in 0..slots {
            let (home, away) = (self.home(slot), self.away(slot));
            for counts in [
                &home.acquired,
                &home.released,
                &away.acquired,
                &away.released,
            ] {
                counts.iter().for_each(|count| count.store(0, Relaxed));
            }
            self.armed(slot).store(false, Relaxed);
        }
    }
}

#[cfg(not(loom))]
impl Counters {
    pub(super) fn new() -> Counters {
        // All zeroes is what new counters are.
        Counters {
            home: zeroed(),
            away: zeroed(),
            armed: zeroed(),
        }
    }
}

/// `MAX_SLOTS` zeroed things, which the host provides as they are touched.
#[cfg(not(loom))]
fn zeroed<T>() -> NonNull<T> {
    let bytes = MAX_SLOTS * size_of::<T>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    let error = std::io::Error::last_os_error();
    assert!(
        address != libc::MAP_FAILED,
        "no address space for a thread's pin counters: {error}"
    );
    // SAFETY: the mapping just made. Huge pages would cost 2 MiB for the first counter.
    unsafe { libc::madvise(address, bytes, libc::MADV_NOHUGEPAGE) };
    let address = NonNull::new(address.cast());
    address.unwrap_or_else(|| unreachable!("the kernel maps nothing at 0 unless told to"))
}

#[cfg(loom)]
impl Counters {
    pub(super) fn new() -> Counters {
        fn leak<T: Default>() -> NonNull<T> {
            let things: Box<[T]> = (0..MAX_SLOTS).map(|_| T::default()).collect();
            NonNull::from(Box::leak(things)).cast()
        }
        Counters {
            home: leak(),
            away: leak(),
            armed: leak(),
        }
    }

    /// Frees the counters of a model that has ended.
    pub(super) fn free(&self) {
        fn free<T>(things: NonNull<T>) {
            let things = std::ptr::slice_from_raw_parts_mut(things.as_ptr(), MAX_SLOTS);
            // SAFETY: leaked by `new`, and not used any more.
            drop(unsafe { Box::from_raw(things) });
        }
        free(self.home);
        free(self.away);
        free(self.armed);
    }
}
