// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region tree, and how changes of it become views.
//!
//! ```text
//!   Transaction ──ops──► dirty windows ──render──► deltas ──► listeners ──► views published
//!        └───────────────── undone in reverse on any error ◄──────┘
//! ```

mod commit;
mod delta;
mod edit;
mod fixture;
mod log;
mod mtree;
mod region;
mod registers;
mod render;
mod transaction;

pub(crate) use commit::Tree;
pub(crate) use region::RegionKind;
pub use region::{Ioeventfd, Region};
pub(crate) use registers::Refused;
pub use registers::{AccessRules, Endian, Mmio, Registers};
pub use transaction::Transaction;
