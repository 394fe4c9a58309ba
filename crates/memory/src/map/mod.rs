// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA to whatever the guest names: RAM directly, registers through a bounce buffer.
//!
//! ```text
//!               all of it RAM ──────────────────────────► Mapping::Direct   (pins)
//!   Dma::map ──►some of it registers ──budget has room──► Mapping::Bounce   (pins and a buffer)
//!                                    ──no room──────────► Mapping::Wait ──await──► grant ──► again
//! ```
//!
//! A mapping is what one request holds: pieces to read from or write to, valid on any thread
//! until [`Mapping::complete`], which says how many bytes were really transferred and writes what
//! was bounced to where it belongs. A mapping that is dropped writes nothing.

mod bounce;
mod budget;
mod dma;
mod plan;

pub use bounce::Bounced;
pub(crate) use budget::Budget;
pub use budget::{BounceGrant, BounceWait};
pub use dma::{BusMaster, DirectMapping, Dma, Mapping};
