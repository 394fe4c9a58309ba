// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies from and to memory that a guest changes at the same time.
//!
//! The guest is no thread of this program, but to the compiler its stores are data races all the
//! same. Volatile accesses and inline assembly are not subject to the compiler's assumptions.

use std::ptr;

/// Copies up to this many bytes word by word.
const SMALL: usize = 64;

/// Copies `len` bytes out of guest memory.
///
/// # Safety
/// `guest` must be valid for reads of `len` bytes, `own` for writes, and they must not overlap.
#[inline]
pub(crate) unsafe fn from_guest(guest: *const u8, own: *mut u8, len: usize) {
    let aligned = |size: usize| (guest as usize).is_multiple_of(size);
    // SAFETY: alignment was tested where the type needs it; the caller vouches for the rest.
    unsafe {
        match len {
            1 => *own = guest.read_volatile(),
            2 if aligned(2) => own
                .cast::<u16>()
                .write_unaligned(guest.cast::<u16>().read_volatile()),
            4 if aligned(4) => own
                .cast::<u32>()
                .write_unaligned(guest.cast::<u32>().read_volatile()),
            _ if len.is_multiple_of(8) && len <= SMALL && aligned(8) => {
                for at in 0..len / 8 {
                    own.cast::<u64>()
                        .add(at)
                        .write_unaligned(guest.cast::<u64>().add(at).read_volatile());
                }
            }
            _ => bulk(guest, own, len),
        }
    }
}

/// Copies `len` bytes into guest memory.
///
/// # Safety
/// `guest` must be valid for writes of `len` bytes, `own` for reads, and they must not overlap.
#[inline]
pub(crate) unsafe fn to_guest(own: *const u8, guest: *mut u8, len: usize) {
    let aligned = |size: usize| (guest as usize).is_multiple_of(size);
    // SAFETY: alignment was tested where the type needs it; the caller vouches for the rest.
    unsafe {
        match len {
            1 => guest.write_volatile(*own),
            2 if aligned(2) => guest
                .cast::<u16>()
                .write_volatile(own.cast::<u16>().read_unaligned()),
            4 if aligned(4) => guest
                .cast::<u32>()
                .write_volatile(own.cast::<u32>().read_unaligned()),
            _ if len.is_multiple_of(8) && len <= SMALL && aligned(8) => {
                for at in 0..len / 8 {
                    guest
                        .cast::<u64>()
                        .add(at)
                        .write_volatile(own.cast::<u64>().add(at).read_unaligned());
                }
            }
            _ => bulk(own, guest, len),
        }
    }
}

/// # Safety
/// As `ptr::copy_nonoverlapping`, except that either side may change meanwhile.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn bulk(source: *const u8, target: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") source => _,
            inout("rdi") target => _,
            options(nostack, preserves_flags),
        );
    }
}

/// # Safety
/// As `ptr::copy_nonoverlapping`, except that either side may change meanwhile.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
unsafe fn bulk(source: *const u8, target: *mut u8, len: usize) {
    for at in 0..len {
        // SAFETY: the caller vouches for both ranges.
        unsafe {
            target
                .add(at)
                .write_volatile(source.add(at).read_volatile())
        };
    }
}

/// Reads a value out of guest memory, of any alignment.
///
/// # Safety
/// `guest` must be valid for reads of the value's size.
#[inline]
pub(crate) unsafe fn read<T: zerocopy::FromBytes>(guest: *const u8) -> T {
    let mut value = std::mem::MaybeUninit::<T>::uninit();
    // SAFETY: every byte is written, and any bytes are a valid `T`.
    unsafe {
        from_guest(guest, value.as_mut_ptr().cast(), size_of::<T>());
        value.assume_init()
    }
}

/// Writes a value into guest memory, of any alignment.
///
/// # Safety
/// `guest` must be valid for writes of the value's size.
#[inline]
pub(crate) unsafe fn write<T: zerocopy::IntoBytes + zerocopy::Immutable>(
    guest: *mut u8,
    value: &T,
) {
    // SAFETY: `value` is initialised throughout (`IntoBytes`); the caller vouches for `guest`.
    unsafe { to_guest(ptr::from_ref(value).cast(), guest, size_of::<T>()) };
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_is_copied_whole() {
        let source: Vec<u8> = (0..=255).collect();
        for len in [0, 1, 2, 3, 4, 7, 8, 16, 24, 63, 64, 65, 100] {
            for skip in 0..9 {
                let mut out = vec![0xee; len + 2];
                // SAFETY: both ranges lie in the vectors.
                unsafe { from_guest(source[skip..].as_ptr(), out[1..].as_mut_ptr(), len) };
                assert_eq!(out[1..=len], source[skip..skip + len]);
                assert_eq!((out[0], out[len + 1]), (0xee, 0xee));
                let mut back = [0xdd; 200];
                // SAFETY: as above.
                unsafe { to_guest(out[1..].as_ptr(), back[skip..].as_mut_ptr(), len) };
                assert_eq!(back[skip..skip + len], source[skip..skip + len]);
                assert_eq!(back[skip + len], 0xdd);
            }
        }
    }
}
