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

mod error;
mod vcpu;
mod vm;

pub use error::Error;
pub use vcpu::{
    BOOT_CS, BOOT_DS, BOOT_TSS, BootState, Exit, FLAT_GDT, Kicker, SystemEventKind, Vcpu, VcpuState,
};
pub use vm::{ChipState, Limits, Vm};
