// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this machine's KVM has of a machine after its devices came and went: as we count it, and as KVM itself shows. It
//! takes no slot, doorbell or interrupt in the place of one that it still has (EEXIST, EBUSY), so each cycle is in the
//! places of those before.

mod flat;

use std::sync::Arc;

use ebbtide_bus::irq::MsiMessage;
use ebbtide_hypervisor::{Holdings, Vm};
use ebbtide_memory::{Ioeventfd, Mmio, Region};
use flat::{Guest, kvm};

program!(sleeps, "1: hlt", "jmp 1b");

const DEVICES: u64 = 0x1000_0000;
const DEVICE_BYTES: u64 = 0x1000;
const PLACES: u64 = 4;
const CYCLES: u64 = 200;

struct Nobody;

impl Mmio for Nobody {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }
    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

fn doorbell(offset: u64) -> Ioeventfd {
    let (_, fd) = flat::event();
    Ioeventfd {
        offset,
        size: 4,
        datamatch: None,
        fd,
    }
}

/// A device with RAM, doorbells and vectors comes and goes.
fn cycle(guest: &Guest, number: u64) {
    let at = DEVICES + number % PLACES * 0x10_0000;
    let bare = guest.vm.holdings();
    let registers = Region::mmio("registers", DEVICE_BYTES, Arc::new(Nobody));
    guest.map(&registers, at);
    for queue in 0..4 {
        guest
            .memory
            .update(|t| t.add_ioeventfd(&registers, doorbell(queue * 4)))
            .unwrap();
    }
    let ram = guest.add_ram(&format!("ram {number}"), at + 0x8_0000, 0x2000);
    let routes = [0x51, 0x52].map(|data| {
        let route = guest.vm.msi().route().unwrap();
        let address = 0xfee0_0000;
        route.program(Some(MsiMessage { address, data })).unwrap();
        route
    });
    let with = guest.vm.holdings();
    let expected = Holdings {
        slots: bare.slots + 1,
        ioeventfds: bare.ioeventfds + 4,
        irqfds: bare.irqfds + 2,
        messages: 2,
    };
    assert_eq!(with, expected);
    for route in &routes {
        route.program(None).unwrap();
    }
    drop(routes);
    guest
        .memory
        .update(|t| {
            t.remove(&ram)?;
            t.remove(&registers)
        })
        .unwrap();
}

#[test]
fn kvm_has_as_much_after_devices_came_and_went_as_before() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, sleeps());
    let held = guest.vm.holdings();
    for number in 0..CYCLES {
        cycle(&guest, number);
        assert_eq!(guest.vm.holdings(), held, "cycle {number}");
    }
}
