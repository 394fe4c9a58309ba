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

pub mod chardev;
pub mod dimm;
mod error;
pub mod i6300esb;
pub mod ivshmem;
pub mod legacy;
pub mod reset;
pub mod serial;
pub mod serial_pci;
mod sync;
pub mod testdev;

pub use error::Error;
