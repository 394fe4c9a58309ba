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

pub mod balloon;
pub mod blk;
pub mod console;
mod control;
mod device;
pub mod features;
mod flights;
mod interrupt;
pub mod mem;
pub mod net;
mod pci;
mod removal;
mod reset;
pub mod rng;
pub mod scsi;
mod select;
mod service;
pub mod status;
mod sync;
pub mod virtq;

pub use control::{Change, Link, TransportControl};
pub use device::{ActivateError, Activation, ActiveQueue, InFlight, PinnedList, VirtioDevice};
#[cfg(loom)]
#[doc(hidden)]
pub use flights::modelled;
pub use interrupt::{Interrupts, QueueInterrupt};
pub use pci::{TransportError, VirtioPci};
pub use removal::{Removal, Removed};
pub use reset::Reset;
