// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The data of commands and events. Names and shapes are QEMU 10.0's; `ebbtide` holds what Ebbtide adds.

pub mod acpi;
pub mod block;
pub mod blockdev;
pub mod chardev;
pub mod device;
pub mod ebbtide;
pub mod events;
pub mod introspection;
pub mod memory;
pub mod monitor;
pub mod net;
pub mod pci;
pub mod qom;
pub mod run_state;

#[cfg(test)]
pub(crate) mod tests;
