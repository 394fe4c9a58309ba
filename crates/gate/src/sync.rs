// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primitives the protocol is built from: std's, or loom's when a model runs it.
//!
//! `Arc` is std's in both: it only keeps memory alive and no step of the protocol depends on its ordering.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};
