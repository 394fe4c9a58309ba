// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A pointer that readers follow inside sections and a writer replaces.

use std::sync::atomic::Ordering::{AcqRel, Acquire};

use crate::sync::AtomicPtr;

/// Never null. What it names is freed a grace period after it was replaced (M2).
pub(crate) struct Published<T>(AtomicPtr<T>);

impl<T> Published<T> {
    pub(crate) fn new(value: Box<T>) -> Published<T> {
        Published(AtomicPtr::new(Box::into_raw(value)))
    }

    /// The current value.
    ///
    /// # Safety
    /// The caller is in a read section, opened before this call, that lasts as long as `'r`.
    #[inline(always)]
    pub(crate) unsafe fn get<'r>(&self) -> &'r T {
        // SAFETY: made by `Box::into_raw`, and freed only after a grace period that waits for
        // the caller's section (M2).
        unsafe { &*self.0.load(Acquire) }
    }

    /// The current value's address.
    pub(crate) fn as_ptr(&self) -> *const T {
        self.0.load(Acquire)
    }

    /// Replaces the value. The old one must live until after a grace period.
    pub(crate) fn replace(&self, value: Box<T>) -> Box<T> {
        let old = self.0.swap(Box::into_raw(value), AcqRel);
        // SAFETY: made by `Box::into_raw` here or in `new`, and not reachable from here any more.
        unsafe { Box::from_raw(old) }
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        // Whoever drops it has taken the last value out, or knows that there are no readers.
        // SAFETY: made by `Box::into_raw`, owned by nobody else.
        drop(unsafe { Box::from_raw(self.0.load(Acquire)) });
    }
}
