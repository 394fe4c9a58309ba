// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primitives the eject protocol is built from: std's, or loom's when a model runs it.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex,
    atomic::{AtomicPtr, AtomicU8, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex,
    atomic::{AtomicPtr, AtomicU8, Ordering},
};
