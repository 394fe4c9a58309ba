// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies from and to memory that a guest changes at the same time, and that the host may fail to
//! provide.
//!
//! The guest is no thread of this program, but to the compiler its stores are data races all the
//! same. Inline assembly is not subject to the compiler's assumptions, and its faults are answered
//! (`fault.rs`).

use std::ptr;
use std::sync::atomic::Ordering;

use crate::fault::{self, Fault, Word};

/// Copies up to this many bytes word by word: above, one instruction takes less.
const SMALL: usize = 32;

/// Copies `len` bytes out of guest memory.
///
/// # Safety
/// `guest` must be guest memory of `len` bytes that nobody unmaps meanwhile, `own` valid for
/// writes, and they must not overlap.
#[inline]
pub(crate) unsafe fn from_guest(guest: *const u8, own: *mut u8, len: usize) -> Result<(), Fault> {
    if len > SMALL {
        // SAFETY: the caller's promise.
        return unsafe { fault::copy(guest, own, len) };
    }
    let mut done = 0;
    // SAFETY: each piece lies in the two ranges the caller vouches for.
    unsafe {
        while len - done >= 8 {
            word_from::<u64>(guest, own, &mut done)?;
        }
        if len & 4 != 0 {
            word_from::<u32>(guest, own, &mut done)?;
        }
        if len & 2 != 0 {
            word_from::<u16>(guest, own, &mut done)?;
        }
        if len & 1 != 0 {
            word_from::<u8>(guest, own, &mut done)?;
        }
    }
    Ok(())
}

/// # Safety
/// A word at `done` lies in both ranges of the copy.
#[inline(always)]
unsafe fn word_from<T: Word>(
    guest: *const u8,
    own: *mut u8,
    done: &mut usize,
) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe {
        let value = fault::load(guest.add(*done).cast::<T>()).map_err(|_| Fault { done: *done })?;
        own.add(*done).cast::<T>().write_unaligned(value);
    }
    *done += size_of::<T>();
    Ok(())
}

/// Copies `len` bytes into guest memory.
///
/// # Safety
/// `guest` must be guest memory of `len` bytes that the caller may write to and nobody unmaps
/// meanwhile, `own` valid for reads, and they must not overlap.
#[inline]
pub(crate) unsafe fn to_guest(own: *const u8, guest: *mut u8, len: usize) -> Result<(), Fault> {
    if len > SMALL {
        // SAFETY: the caller's promise.
        return unsafe { fault::copy(own, guest, len) };
    }
    let mut done = 0;
    // SAFETY: each piece lies in the two ranges the caller vouches for.
    unsafe {
        while len - done >= 8 {
            word_to::<u64>(own, guest, &mut done)?;
        }
        if len & 4 != 0 {
            word_to::<u32>(own, guest, &mut done)?;
        }
        if len & 2 != 0 {
            word_to::<u16>(own, guest, &mut done)?;
        }
        if len & 1 != 0 {
            word_to::<u8>(own, guest, &mut done)?;
        }
    }
    Ok(())
}

/// # Safety
/// A word at `done` lies in both ranges of the copy.
#[inline(always)]
unsafe fn word_to<T: Word>(own: *const u8, guest: *mut u8, done: &mut usize) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe {
        let value = own.add(*done).cast::<T>().read_unaligned();
        fault::store(guest.add(*done).cast::<T>(), value).map_err(|_| Fault { done: *done })?;
    }
    *done += size_of::<T>();
    Ok(())
}

/// Reads a value out of guest memory, of any alignment.
///
/// # Safety
/// `guest` must be guest memory of the value's size that nobody unmaps meanwhile.
#[inline]
pub(crate) unsafe fn read<T: zerocopy::FromBytes>(guest: *const u8) -> Result<T, Fault> {
    let mut value = std::mem::MaybeUninit::<T>::uninit();
    // SAFETY: after a copy without a fault every byte is written, and any bytes are a valid `T`.
    unsafe {
        from_guest(guest, value.as_mut_ptr().cast(), size_of::<T>())?;
        Ok(value.assume_init())
    }
}

/// Writes a value into guest memory, of any alignment.
///
/// # Safety
/// `guest` must be guest memory of the value's size that the caller may write to and nobody
/// unmaps meanwhile.
#[inline]
pub(crate) unsafe fn write<T: zerocopy::IntoBytes + zerocopy::Immutable>(
    guest: *mut u8,
    value: &T,
) -> Result<(), Fault> {
    // SAFETY: `value` is initialised throughout (`IntoBytes`); the caller vouches for `guest`.
    unsafe { to_guest(ptr::from_ref(value).cast(), guest, size_of::<T>()) }
}

/// Loads an aligned word atomically.
///
/// # Safety
/// `guest` must be aligned guest memory that nobody unmaps meanwhile.
///
/// # Panics
/// When `order` is not one for loads.
#[inline(always)]
pub(crate) unsafe fn load<T: Word>(guest: *const T, order: Ordering) -> Result<T, Fault> {
    assert!(
        !matches!(order, Ordering::Release | Ordering::AcqRel),
        "no ordering for loads: {order:?}"
    );
    // SAFETY: the caller's promise. A load acquires, and sequentially consistent stores are fenced.
    unsafe { fault::load(guest) }
}

/// Stores an aligned word atomically.
///
/// # Safety
/// `guest` must be aligned guest memory that the caller may write to and nobody unmaps meanwhile.
///
/// # Panics
/// When `order` is not one for stores.
#[inline(always)]
pub(crate) unsafe fn store<T: Word>(guest: *mut T, value: T, order: Ordering) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe {
        match order {
            Ordering::Relaxed | Ordering::Release => fault::store(guest, value),
            Ordering::SeqCst => T::store_fenced(guest, value),
            order => panic!("no ordering for stores: {order:?}"),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_is_copied_whole() {
        let source: Vec<u8> = (0..=255).collect();
        for len in (0..=70).chain([100, 128, 200]) {
            for skip in 0..9 {
                let mut out = vec![0xee; len + 2];
                // SAFETY: both ranges lie in the vectors.
                unsafe { from_guest(source[skip..].as_ptr(), out[1..].as_mut_ptr(), len) }.unwrap();
                assert_eq!(out[1..=len], source[skip..skip + len]);
                assert_eq!((out[0], out[len + 1]), (0xee, 0xee));
                let mut back = [0xdd; 300];
                // SAFETY: as above.
                unsafe { to_guest(out[1..].as_ptr(), back[skip..].as_mut_ptr(), len) }.unwrap();
                assert_eq!(back[skip..skip + len], source[skip..skip + len]);
                assert_eq!(back[skip + len], 0xdd);
            }
        }
    }

    /// Two pages, of which only the first can be accessed.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    struct Cliff(*mut u8);

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    impl Cliff {
        fn new() -> Cliff {
            crate::fault::install().unwrap();
            // SAFETY: a new mapping, and a change of its second half.
            unsafe {
                let at = libc::mmap(
                    ptr::null_mut(),
                    8192,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                assert_ne!(at, libc::MAP_FAILED);
                assert_eq!(libc::mprotect(at.add(4096), 4096, libc::PROT_NONE), 0);
                Cliff(at.cast())
            }
        }

        /// The address `before` bytes before the edge.
        fn edge(&self, before: usize) -> *mut u8 {
            self.0.wrapping_add(4096 - before)
        }
    }

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    impl Drop for Cliff {
        fn drop(&mut self) {
            // SAFETY: our own mapping.
            unsafe { libc::munmap(self.0.cast(), 8192) };
        }
    }

    #[test]
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    fn a_fault_is_an_error_that_tells_how_far_the_copy_got() {
        let cliff = Cliff::new();
        let mut own = [7u8; 5000];
        for (before, len) in [
            (8, 16),
            (100, 200),
            (0, 1),
            (0, 2),
            (0, 4),
            (0, 8),
            (4096, 5000),
        ] {
            let done = before;
            // SAFETY: guest memory that may fault, and a buffer of ours.
            let to = unsafe { to_guest(own.as_ptr(), cliff.edge(before), len) };
            assert_eq!(to, Err(Fault { done }));
            // SAFETY: as above.
            let from = unsafe { from_guest(cliff.edge(before), own.as_mut_ptr(), len) };
            assert_eq!(from, Err(Fault { done }));
        }
        // A word across the edge fails as one.
        // SAFETY: as above.
        let across = unsafe { to_guest(own.as_ptr(), cliff.edge(4), 8) };
        assert_eq!(across, Err(Fault { done: 0 }));
        assert!(own.iter().all(|byte| *byte == 7));
    }

    #[test]
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    fn words_fault_in_every_width_and_ordering() {
        fn try_all<T: Word>(cliff: &Cliff, value: T) {
            let (good, bad) = (cliff.edge(8).cast::<T>(), cliff.edge(0).cast::<T>());
            // SAFETY: aligned guest memory, of which `bad` faults.
            unsafe {
                assert!(load(good, Ordering::SeqCst).is_ok());
                assert!(load(bad, Ordering::Acquire).is_err());
                for order in [Ordering::Relaxed, Ordering::Release, Ordering::SeqCst] {
                    assert!(store(good, value, order).is_ok());
                    assert!(store(bad, value, order).is_err());
                }
            }
        }
        let cliff = Cliff::new();
        try_all(&cliff, 0x11u8);
        try_all(&cliff, 0x2222u16);
        try_all(&cliff, 0x3333_3333u32);
        try_all(&cliff, 0x4444_4444_4444_4444u64);
        // SAFETY: as above.
        let stored = unsafe { load(cliff.edge(8).cast::<u64>(), Ordering::Relaxed) };
        assert_eq!(stored, Ok(0x4444_4444_4444_4444));
    }
}
