// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pin counters of a row, by slot.

use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

use super::row::Line;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64};

/// Slots, and with that RAM blocks, a memory can have.
#[cfg(not(loom))]
pub(crate) const MAX_SLOTS: usize = 1 << 16;
#[cfg(loom)]
pub(crate) const MAX_SLOTS: usize = 2;

/// Where a pin counts: one of the two banks of a slot. A number of bytes, so that the counts are an
/// addition away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane(u32);

impl Lane {
    /// What nothing counts in.
    pub(crate) const NONE: Lane = Lane(0);

    /// From a lane in bank 0 to that of the same slot in bank 1.
    pub(crate) const STEP: u64 = size_of::<Counts>() as u64;

    pub(super) const SLOT: u32 = size_of::<Banks>() as u32;

    #[inline(always)]
    pub(crate) fn new(slot: u32, bank: usize) -> Lane {
        debug_assert!(bank < 2);
        Lane(Lane::SLOT * slot + (Lane::STEP * bank as u64) as u32)
    }

    /// The lane of the same slot that is `step` (0 or [`Lane::STEP`]) further, of one in bank 0.
    #[inline(always)]
    pub(crate) fn step(self, step: u64) -> Lane {
        debug_assert!(self.0.is_multiple_of(Lane::SLOT) && (step == 0 || step == Lane::STEP));
        Lane(self.0 + step as u32)
    }

    #[inline(always)]
    pub(crate) fn slot(self) -> u32 {
        self.0 / Lane::SLOT
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

impl Banks {
    /// The counts of `lane`, of those of the first slot of a table of type `T`.
    ///
    /// # Safety
    /// `T` begins with a `Banks`.
    #[inline(always)]
    unsafe fn of<T>(table: &PerSlot<T>, lane: Lane) -> &Counts {
        debug_assert!((lane.slot() as usize) < MAX_SLOTS);
        let (slot, bank) = (lane.0 / Lane::SLOT, lane.0 % Lane::SLOT);
        let distance = slot as usize * size_of::<T>() + bank as usize;
        let first = std::ptr::from_ref(table).cast::<Counts>();
        // SAFETY: there are `MAX_SLOTS`, all slots are below (M5), and the caller's word for what
        // each begins with.
        unsafe { &*first.byte_add(distance) }
    }
}

/// The counters of a row.
#[repr(C)]
pub(super) struct Counters {
    /// Pins taken and let go by the owner of the row: plain stores.
    home: PerSlot<Banks>,
    /// Pins of the row cloned or let go by other threads: atomic additions, on lines of their own.
    away: PerSlot<Line<Banks>>,
    /// Whether the worker waits for pins of the slot.
    armed: PerSlot<AtomicBool>,
}

impl Counters {
    /// Sets up those at `at`.
    ///
    /// # Safety
    /// As for [`PerSlot::set_up`].
    pub(super) unsafe fn set_up(at: *mut Counters) {
        // SAFETY: as for this function, for each part.
        unsafe {
            PerSlot::set_up(&raw mut (*at).home);
            PerSlot::set_up(&raw mut (*at).away);
            PerSlot::set_up(&raw mut (*at).armed);
        }
    }

    /// The counts of pins at home.
    #[inline(always)]
    pub(super) fn home(&self, lane: Lane) -> &Counts {
        // SAFETY: a table of them.
        unsafe { Banks::of(&self.home, lane) }
    }

    /// The counts of pins elsewhere.
    #[inline(always)]
    pub(super) fn away(&self, lane: Lane) -> &Counts {
        // SAFETY: a line of them has nothing else.
        unsafe { Banks::of(&self.away, lane) }
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
}

/// One `T` per slot, inside what they belong to, so that one is found by an addition to an address
/// that is known already. What they belong to is made by [`never_freed`].
#[repr(C)]
pub(crate) struct PerSlot<T>([T; MAX_SLOTS]);

impl<T: Zero> PerSlot<T> {
    /// Sets up the table at `at`.
    ///
    /// # Safety
    /// `at` is in what [`never_freed`] has given, as it came, and nobody else knows it.
    pub(crate) unsafe fn set_up(at: *mut PerSlot<T>) {
        // Elsewhere it is all zeroes, and to touch it would cost memory.
        if cfg!(loom) {
            let first = at.cast::<T>();
            // SAFETY: room for so many, by the caller's promise.
            (0..MAX_SLOTS).for_each(|slot| unsafe { first.add(slot).write(T::default()) });
        }
    }

    /// The one of the slot of `lane`: found with less work than by the slot, if it is as large as a slot's
    /// counters.
    #[inline(always)]
    pub(crate) fn of(&self, lane: Lane) -> &T {
        let slot = lane.slot() as usize;
        debug_assert!(slot < MAX_SLOTS);
        let distance = if size_of::<T>() == Lane::SLOT as usize {
            (lane.0 & !(Lane::SLOT - 1)) as usize
        } else {
            slot * size_of::<T>()
        };
        let first = std::ptr::from_ref(self).cast::<T>();
        // SAFETY: there are `MAX_SLOTS`, and all slots are below (M5).
        unsafe { &*first.byte_add(distance) }
    }

    /// The one of `slot`.
    #[inline(always)]
    pub(crate) fn at(&self, slot: u32) -> &T {
        debug_assert!((slot as usize) < MAX_SLOTS);
        // SAFETY: there are `MAX_SLOTS`, and all slots are below (M5).
        unsafe { self.0.get_unchecked(slot as usize) }
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
// SAFETY: as above; a null pointer.
unsafe impl<T> Zero for AtomicPtr<T> where AtomicPtr<T>: Default {}
// SAFETY: made of atomics.
unsafe impl Zero for Banks {}
// SAFETY: made of atomics.
unsafe impl Zero for Line<Banks> {}

/// Room for a `T` with tables by slot, which is never freed (M6): all zeroes, at the beginning of a
/// page. The memory comes from the host as it is touched, so that a table costs a page or two.
#[cfg(not(loom))]
pub(crate) fn never_freed<T>() -> NonNull<MaybeUninit<T>> {
    const { assert!(align_of::<T>() <= 4096) };
    let bytes = size_of::<T>();
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
    address.unwrap_or_else(|| unreachable!("nothing is mapped at 0 unasked"))
}

/// Room for a `T`, which a model frees as a `Box` once all its threads have ended.
#[cfg(loom)]
pub(crate) fn never_freed<T>() -> NonNull<MaybeUninit<T>> {
    NonNull::from(Box::leak(Box::<T>::new_uninit()))
}
