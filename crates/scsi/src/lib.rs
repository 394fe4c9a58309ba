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
#![forbid(unsafe_code)]

mod absent;
mod attention;
mod cdb;
mod inquiry;
mod lun;
mod mode;
mod parameters;
mod sense;
#[cfg(test)]
mod tests;
mod unit;

pub use absent::begin_absent;
pub use attention::{Attention, Condition};
pub use inquiry::{Identity, IdentityError};
pub use lun::Lun;
pub use parameters::{Effect, Extent, Extents, ParameterList};
pub use sense::{Key, SENSE_BYTES, Sense};
pub use unit::{Geometry, LogicalUnit, Work};

/// SAM status codes, as far as there are.
pub mod status {
    /// The command is done.
    pub const GOOD: u8 = 0x00;
    /// Sense data say what is wrong.
    pub const CHECK_CONDITION: u8 = 0x02;
}

/// The most bytes one UNMAP descriptor or WRITE SAME may cover: a host that zeroes by writing answers in the end.
pub const RANGE_MAX_BYTES: u64 = 1 << 30;
/// The most descriptors of one UNMAP.
pub const UNMAP_DESCRIPTORS_MAX: usize = 32;
