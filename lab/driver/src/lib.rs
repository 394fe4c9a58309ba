// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

pub mod blk;
mod board;
mod device;
mod interrupts;
pub mod mem;
mod pci;
mod port;
mod queue;
mod ram;
mod random;
pub mod scsi;
mod time;
mod wait;

pub use board::Board;
pub use device::{Registers, VirtioDriver, common};
pub use interrupts::{Interrupts, Level};
pub use pci::{Capability, PciDevice};
pub use port::{PortDriver, SlotEvents};
pub use queue::{DriverQueue, Layout, Part, Used};
pub use ram::GuestRam;
pub use random::Random;
pub use wait::{LIMIT, block_on, poll};
