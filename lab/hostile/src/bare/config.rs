// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space on boards without ECAM.

use super::Processor;
use crate::{Board, Width, map};

/// Configuration mechanism #1 (PCI 3.0, 3.2.2.3.2).
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;
/// ECAM's bytes for 256 buses; of each function's, the mechanism reaches the first 256.
const ECAM_BYTES: u64 = 256 << 20;

/// A processor that reaches what others find in ECAM through two ports. Only one at a time may do so.
#[derive(Debug)]
pub struct ConfigPorts(pub Processor);

impl ConfigPorts {
    /// Says which register is meant; the port it is at then. `None`: `at` is not in ECAM.
    fn select(&mut self, at: u64) -> Option<u16> {
        let inside = at.checked_sub(map::ECAM).filter(|it| *it < ECAM_BYTES)?;
        let (function, register) = ((inside >> 12) as u32, (inside & 0xff) as u32);
        let address = ENABLE | function << 8 | register & 0xfc;
        self.0.port_write(ADDRESS, Width::Dword, address);
        Some(DATA + (register & 3) as u16)
    }
}

impl Board for ConfigPorts {
    fn port_read(&mut self, port: u16, width: Width) -> u32 {
        self.0.port_read(port, width)
    }

    fn port_write(&mut self, port: u16, width: Width, value: u32) {
        self.0.port_write(port, width, value);
    }

    fn read(&mut self, at: u64, width: Width) -> u64 {
        match self.select(at) {
            Some(port) => self.0.port_read(port, width).into(),
            None => self.0.read(at, width),
        }
    }

    fn write(&mut self, at: u64, width: Width, value: u64) {
        match self.select(at) {
            Some(port) => self.0.port_write(port, width, value as u32),
            None => self.0.write(at, width, value),
        }
    }

    fn fault(&mut self) {
        self.0.fault();
    }
}
