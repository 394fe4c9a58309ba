// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The traits of the vm-memory crate.
//!
//! | trait | type | what it is |
//! |---|---|---|
//! | `GuestMemory` | [`SectionView`] | a device's view within one read section: free, not `Send` |
//! | `GuestMemory` | [`DmaView`] | a device's view that pins what is looked up: `Send`, for I/O |
//! | `GuestMemoryBackend` | [`PinnedRam`] | all RAM of one moment: loaders, vhost |
//! | `GuestMemoryRegion` | [`PinnedRegion`] | one contiguous piece of it |
//! | `GuestAddressSpace` | [`LocalSpace`], [`DmaSpace`], [`RamSpace`] | what gives the three |
//! | `Bitmap` | [`Written`], [`Marks`] | marks what was written, tells a [`WriteLog`] |
//!
//! The views refuse writes to ROM, which a `GuestMemoryBackend` cannot.

mod dma;
mod guarded;
mod marks;
mod pieces;
mod pinned;
mod section;

pub use dma::{DmaMemory, DmaSpace, DmaView};
pub use marks::{Marks, WriteLog, Written};
pub use pinned::{PinnedRam, PinnedRegion, RamSpace};
pub use section::{LocalSpace, LocalView, SectionView};
