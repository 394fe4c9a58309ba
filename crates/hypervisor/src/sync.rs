// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The primitives the kick protocol is built from: std's, or loom's when a model runs it.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU8, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU8, Ordering};
