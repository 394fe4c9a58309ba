// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine: assembles memory, buses, devices, vCPUs and monitor, and runs them.
//!
//! ```text
//! MachineConfig ─ build ─▶ Machine ── start ─▶ run: serves lifecycle::Request until the VM ends
//!                            ▲  ▲
//!                 monitor ───┘  └─── vCPU threads, signals, devices (requests through a channel)
//! ```
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented
    )
)]

#[cfg(test)]
mod allocations;
pub mod boot;
mod build;
pub mod config;
mod confine;
mod cpus;
mod error;
mod guest_ram;
pub mod host;
mod hotplug;
pub mod layout;
pub mod lifecycle;
mod machine;
pub mod monitor;
mod platform;
mod provision;
mod reset;
mod size_events;

pub use build::{Built, Prepared};
pub use confine::{ConfinementConfig, Seccomp, confine_launcher};
pub use cpus::CpuEvent;
pub use ebbtide_memory::Backing;
pub use ebbtide_net::{Launcher, serve_launcher};
pub use error::Error;
pub use hotplug::drivers::{check_driver, driver_names};
pub use hotplug::{MEMORY_BACKENDS, memory_backing};
pub use machine::{Machine, MemorySlot};
pub use size_events::report_sizes;
