// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region tree, and how changes of it become views.
//!
//! ```text
//!   Transaction ──ops──► dirty windows ──render──► deltas ──► listeners ──► views published
//!        └───────────────── undone in reverse on any error ◄──────┘
//! ```

mod commit;
mod log;
mod mtree;
mod region;
mod render;
mod transaction;

pub(crate) use commit::Tree;
pub(crate) use region::RegionKind;
pub use region::{Ioeventfd, Mmio, Region};
pub use transaction::Transaction;
