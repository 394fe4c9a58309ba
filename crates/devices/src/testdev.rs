// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `pci-testdev`: a function that counts what is written to it, for guests that measure or test register accesses.
//!
//! BAR 0 and BAR 1 are alike, 4 KiB of memory each; a guest that drives the device finds out what they are. They begin with
//! a header, little-endian:
//!
//! ```text
//! 0x00 u8   test     write: starts a test, its count is 0
//! 0x01 u8   width    of the accesses to make: 1, 2 or 4; 0: there is no such test
//! 0x04 u32  offset   where in the BAR to write
//! 0x08 u32  data     what to write
//! 0x0c u32  count    how many such writes came
//! 0x10 ...  name     of the test, ASCII, ends with 0
//! ```
//!
//! Tests are numbered from 0 on: plain registers, an ioeventfd for any value, an ioeventfd for the value of `data`. BAR 2,
//! if asked for, is 64-bit prefetchable memory of any size with nothing in it: it reads 0.

mod bar;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use ebbtide_bus::gated;
use ebbtide_bus::pci::{BarKind, BarSpec, Config, Function, Ids};
use ebbtide_gate::Gate;
use ebbtide_memory::{Memory, Mmio, Region};

use self::bar::TestBar;
use crate::Error;

/// The device's ids; the class is "other".
const IDS: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0005,
    revision: 0,
    class: 0x00_ff_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};
/// Bytes of BAR 0 and BAR 1.
const BAR_BYTES: u64 = 4096;
/// The BAR without anything in it.
const EMPTY_BAR: u8 = 2;

/// The function. Its gate is that of its [`Config`]: who closes it has isolated the device, which does nothing by itself
/// and has nothing in flight.
pub struct TestDevice {
    config: Config,
    bars: [Arc<TestBar>; 2],
}

/// Reads 0, forgets what is written.
struct Nothing;

impl Mmio for Nothing {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

impl TestDevice {
    /// A device called `name`, with a BAR 2 of `empty_bar_bytes` if that is given. Its ioeventfds appear in `memory`.
    ///
    /// # Errors
    /// The size is not a power of two of at least 4096; the host has no eventfd left.
    pub fn new(
        name: &str,
        memory: &Arc<Memory>,
        empty_bar_bytes: Option<u64>,
    ) -> Result<Arc<Self>, Error> {
        let gate = Gate::new(name);
        let mut config = Config::new(&gate, IDS);
        let mut add = |index, kind| {
            let bar = TestBar::new(name, memory, "mem")?;
            let registers = gated::behind(&gate, Arc::clone(&bar) as _);
            let region = Region::mmio(format!("{name}-bar{index}"), BAR_BYTES, registers);
            bar.set_region(&region);
            let size_bytes = BAR_BYTES;
            config.add_bar(index, BarSpec { size_bytes, kind }, region)?;
            Ok::<_, Error>(bar)
        };
        let bars = [add(0, BarKind::Mem32)?, add(1, BarKind::Mem32)?];
        if let Some(size_bytes) = empty_bar_bytes {
            let kind = BarKind::Mem64 { prefetchable: true };
            let registers = gated::behind(&gate, Arc::new(Nothing));
            let region = Region::mmio(format!("{name}-bar2"), size_bytes, registers);
            config.add_bar(EMPTY_BAR, BarSpec { size_bytes, kind }, region)?;
        }
        Ok(Arc::new(Self { config, bars }))
    }
}

impl Function for TestDevice {
    fn config(&self) -> &Config {
        &self.config
    }

    fn reset(&self) {
        for bar in &self.bars {
            bar.stop();
        }
        self.config.reset();
    }
}
