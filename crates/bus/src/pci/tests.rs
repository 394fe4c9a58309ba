// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bus as firmware, a driver and a hostile guest use it.

mod bars;
mod functions;
mod hostile;
mod legacy;

use std::sync::Arc;

use super::Function;
use super::fakes::{Device, FakeController, Machine};

const COMMAND: u64 = 4;
const MEMORY: u32 = 2;

/// A machine with one device in slot 3, BARs not assigned.
fn machine() -> (Machine, Arc<Device>, FakeController) {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let device = Device::new("disk0", &controller);
    assert_eq!(machine.bridge.attach(Some(3), device.clone()).unwrap(), 3);
    (machine, device, controller)
}

/// The address in a BAR of slot 3.
fn bar(machine: &Machine, index: u64) -> u64 {
    let dword = |index: u64| u64::from(machine.config(3, 0x10 + 4 * index, 4));
    let low = dword(index);
    if low & 4 != 0 {
        dword(index + 1) << 32 | low & !15
    } else {
        low & !15
    }
}

fn set_bar(machine: &Machine, index: u64, address: u64) {
    machine.set_config(3, 0x10 + 4 * index, 4, address as u32);
    if machine.config(3, 0x10 + 4 * index, 4) & 4 != 0 {
        machine.set_config(3, 0x14 + 4 * index, 4, (address >> 32) as u32);
    }
}
