// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bus as firmware, a driver and a hostile guest use it.

mod bars;
mod bridges;
mod enumerator;
mod functions;
mod hostile;
mod legacy;
mod ports;
mod remnants;

use std::sync::Arc;

use std::sync::atomic::{AtomicU16, Ordering};

use super::fakes::{Device, Ejects, FakeController, Machine};
use super::{Function, Port, PortModel, PortSpec};

const COMMAND: u64 = 4;
const MEMORY: u32 = 2;

/// A machine with one device in slot 3, BARs not assigned.
fn machine() -> (Machine, Arc<Device>, FakeController) {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let device = Device::new("disk0", &controller);
    assert_eq!(machine.bridge.attach(Some(3), device.clone()).unwrap(), 3);
    (machine, device, controller)
}

/// A function as a guest addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At(u8, u8);

impl At {
    fn read(self, machine: &Machine, register: u64, size: u8) -> u32 {
        machine.ecam.read(self.address(register), size) as u32
    }

    fn write(self, machine: &Machine, register: u64, size: u8, value: u32) {
        machine
            .ecam
            .write(self.address(register), size, value.into());
    }

    fn address(self, register: u64) -> u64 {
        u64::from(self.0) << 20 | u64::from(self.1) << 12 | register
    }

    /// Where a capability is.
    fn capability(self, machine: &Machine, id: u32) -> u64 {
        let mut at = self.read(machine, 0x34, 1);
        while self.read(machine, at.into(), 1) != id {
            at = self.read(machine, u64::from(at) + 1, 1);
            assert_ne!(at, 0, "{self:?} has no capability {id:#x}");
        }
        at.into()
    }
}

/// A port that tells `ejects` of ejects.
fn port(
    machine: &Machine,
    name: &str,
    model: PortModel,
    ejects: Option<&Arc<Ejects>>,
    controller: &FakeController,
) -> Arc<Port> {
    static SLOT_NUMBER: AtomicU16 = AtomicU16::new(0);
    let spec = PortSpec {
        name: name.to_owned(),
        model,
        slot_number: SLOT_NUMBER.fetch_add(1, Ordering::Relaxed) & 0x1fff,
        hotplug: ejects.map(|ejects| Arc::clone(ejects) as _),
        reservation: None,
    };
    Port::new(&machine.bridge, spec, controller).unwrap()
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
