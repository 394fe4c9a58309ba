// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registered readers.

use std::marker::PhantomData;

/// A thread's right to open read sections. One row per thread; neither `Send` nor `Sync`.
pub struct Reader {
    _not_send: PhantomData<*const ()>,
}
