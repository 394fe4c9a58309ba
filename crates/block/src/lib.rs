// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented,
        clippy::indexing_slicing
    )
)]

mod abandon;
mod aligned;
mod blkdev;
mod buffer;
mod direct;
mod disk;
mod error;
mod failure;
pub mod fault;
mod file;
mod image;
mod lock;
mod null;
mod op;
mod operation;
mod spec;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_null;
mod transfer;
mod zeroes;

pub use abandon::{Abandoned, InFlight};
pub use buffer::{Buffer, OwnedBuffer};
pub use disk::{Disk, Features, LocalDisk};
pub use error::Error;
pub use failure::Failure;
pub use fault::Faults;
pub use null::NullSpec;
pub use op::{Op, OpKind};
pub use operation::Operation;
pub use spec::{Cache, Discard, DiskSpec};
