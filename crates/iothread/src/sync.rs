// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primitives the sleep/wake protocols are built from: std's, or loom's when a model runs it.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};
