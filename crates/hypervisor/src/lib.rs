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

#[cfg(not(loom))]
mod error;
mod kick;
#[cfg(not(loom))]
pub mod kvm;
#[cfg(not(loom))]
pub mod probe;
mod ring;
#[cfg(not(loom))]
pub mod sim;
mod sync;
#[cfg(not(loom))]
mod vcpu;
#[cfg(not(loom))]
mod vm;

#[cfg(not(loom))]
pub use error::Error;
#[cfg(not(loom))]
pub use vcpu::{
    BOOT_CS, BOOT_DS, BOOT_TSS, BootState, Exit, FLAT_GDT, Kicker, SystemEventKind, Vcpu, VcpuState,
};
#[cfg(not(loom))]
pub use vm::{ChipState, Holdings, Limits, Vm};

/// The protocols the concurrency models run.
#[cfg(loom)]
#[doc(hidden)]
pub mod models {
    pub use crate::kick::{after_interruption, before_entry, kick, without_guest};
    pub use crate::ring::{Crossing, Entry, Resets, Ring, Written, harvest};
}
