// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primitives the protocols are written with: std's, or loom's when they are model-checked, or
//! in unit tests ones that record what is stored to.

use std::sync::TryLockError;

#[cfg(all(test, not(loom)))]
pub(crate) use crate::counted::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64};
#[cfg(loom)]
pub(crate) use loom::{
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence},
    sync::{Condvar, Mutex, MutexGuard},
};
#[cfg(not(any(test, loom)))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64};
#[cfg(not(loom))]
pub(crate) use std::{
    sync::atomic::{Ordering, fence},
    sync::{Condvar, Mutex, MutexGuard},
};

/// Locks unless somebody else has the lock; as [`lock`] in everything else.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    #[cfg(all(test, not(loom)))]
    crate::counted::note(mutex, true);
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Locks, also after a panic elsewhere: every critical section here leaves its data consistent
/// before it runs code that can panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    #[cfg(all(test, not(loom)))]
    crate::counted::note(mutex, true);
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What the calling thread finds in a word that it alone writes. A plain load, which the compiler may
/// make part of what uses it.
///
/// # Safety
/// No other thread stores to it at the same time.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) unsafe fn load_own(atomic: &AtomicU64) -> u64 {
    // SAFETY: other threads load it, atomically; none stores, by the caller's promise.
    unsafe { atomic.as_ptr().read() }
}

/// See above; loom checks the promise.
#[cfg(loom)]
pub(crate) unsafe fn load_own(atomic: &AtomicU64) -> u64 {
    // SAFETY: as for this function.
    unsafe { atomic.unsync_load() }
}
