// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Functions: how a guest finds them, and how they come and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_memory::Mmio;

use super::*;
use crate::irq::MsiMessage;
use crate::pci::fakes::DEVICE_IDS;
use crate::pci::{Config, Devfn, PciError};

#[test]
fn a_scan_finds_what_is_there_and_nothing_else() {
    let (machine, ..) = machine();
    assert_eq!(machine.config(0, 8, 4) >> 8, 0x06_00_00, "the host bridge");
    assert_eq!(machine.config(3, 0, 4), 0x5678_1234);
    assert_eq!(machine.config(3, 8, 4), 0x0102_0309);
    assert_eq!(machine.config(3, 0x2c, 4), 0xef01_abcd);
    assert_eq!(machine.config(3, 0x0e, 1), 0, "one function, type 0");
    assert_eq!(machine.config(3, 0x3d, 1), 0, "no interrupt pin");
    let mut found = 0;
    for devfn in 0..0x1_0000_u64 {
        let ids = machine.ecam.read(devfn << 12, 4);
        found += usize::from(ids != 0xffff_ffff);
    }
    assert_eq!(found, 2, "on 256 buses");
    assert_eq!(machine.config(4, 0, 1), 0xff);
    assert_eq!(machine.config(4, 0, 2), 0xffff);
}

#[test]
fn both_ways_lead_to_the_same_space() {
    let (machine, ..) = machine();
    for register in (0..256).step_by(4) {
        machine.ports.write(0, 4, 0x8000_0000 | 3 << 11 | register);
        assert_eq!(machine.ports.read(0, 4), 0x8000_0000 | 3 << 11 | register);
        for (offset, size) in [(0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)] {
            let through_memory = machine.config(3, register + offset, size);
            assert_eq!(
                machine.ports.read(4 + offset, size),
                u64::from(through_memory) & crate::gated::all_ones(size)
            );
        }
    }
    machine.ports.write(0, 4, 0x8000_0000 | 3 << 11 | 0x3c);
    machine.ports.write(4, 1, 0x5a);
    assert_eq!(machine.config(3, 0x3c, 1), 0x5a);
}

#[test]
fn ports_that_select_nothing_read_all_ones() {
    let (machine, ..) = machine();
    machine.ports.write(0, 4, 3 << 11);
    assert_eq!(machine.ports.read(4, 4), 0xffff_ffff, "not enabled");
    machine.ports.write(0, 4, 0x8000_0000 | 1 << 16 | 3 << 11);
    assert_eq!(machine.ports.read(4, 4), 0xffff_ffff, "another bus");
    machine.ports.write(0, 4, 0x8000_0000 | 3 << 11);
    assert_eq!(machine.ports.read(5, 4), 0xffff_ffff, "across dwords");
    assert_eq!(machine.ports.read(0, 1), 0xff, "half of an address");
    machine.ports.write(0, 2, 0);
    assert_eq!(
        machine.ports.read(0, 4),
        0x8000_1800,
        "only whole addresses are taken"
    );
}

#[test]
fn the_reset_register_is_under_the_address_register() {
    struct Reset(AtomicBool);
    impl Mmio for Reset {
        fn read(&self, _offset: u64, _size: u8) -> u64 {
            0x77
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            assert_eq!((offset, size, value), (0, 1, 6));
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let (machine, ..) = machine();
    let reset = Arc::new(Reset(AtomicBool::new(false)));
    let ports = machine.bridge.ports_with_reset(reset.clone());
    ports.write(0, 4, 0x8000_0600);
    assert!(!reset.0.load(Ordering::SeqCst));
    assert_eq!(ports.read(1, 1), 0x77);
    ports.write(1, 1, 6);
    assert!(reset.0.load(Ordering::SeqCst));
    assert_eq!(ports.read(0, 4), 0x8000_0600);
    assert_eq!(machine.ports.read(1, 1), 0xff, "without one");
}

#[test]
fn msix_works_through_the_guests_eyes() {
    let (machine, device, controller) = machine();
    machine.bridge.assign_bars().unwrap();
    assert_ne!(machine.config(3, 6, 2) & 0x10, 0, "a capability list");
    let capability = u64::from(machine.config(3, 0x34, 1));
    assert_eq!(
        machine.config(3, capability, 2),
        0x11,
        "msi-x, the last one"
    );
    assert_eq!(machine.config(3, capability + 2, 2), 2, "three vectors");
    assert_eq!(machine.config(3, capability + 4, 4), 1, "table: bar 1");
    assert_eq!(
        machine.config(3, capability + 8, 4),
        2048 | 1,
        "pending bits: bar 1"
    );
    let table = bar(&machine, 1);
    machine.set_config(3, capability + 2, 2, 0xc000);
    machine.store(table + 16, 8, 0xfee0_0000);
    machine.store(table + 24, 4, 0x41);
    machine.store(table + 28, 4, 0);
    device.config().msix().unwrap().vector(1).unwrap().signal();
    assert_eq!(machine.load(table + 2048, 8), 2, "pending");
    machine.set_config(3, capability + 3, 1, 0x80);
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };
    assert_eq!(controller.route_of(1).delivered(), [message]);
    assert_eq!(machine.load(table + 2048, 4), 0);
    assert_eq!(machine.config(3, capability + 2, 2), 0x8002);
}

#[test]
fn capabilities_are_chained() {
    let mut config = Config::new(&ebbtide_gate::Gate::new("caps"), DEVICE_IDS);
    let first = config
        .add_capability(9, &[0xaa; 15], &[0xff, 0x0f])
        .unwrap();
    let second = config.add_capability(5, &[], &[]).unwrap();
    assert_eq!((first, second), (0x40, 0x54));
    assert_eq!(config.read(0x34, 1), 0x40);
    assert_eq!(config.read(0x40, 2), 0x5409);
    assert_eq!(config.read(0x54, 2), 0x0005);
    config.write(0x40, 4, 0);
    assert_eq!(config.read(0x40, 4), 0xa000_5409);
    config.set(0x44, &[1, 2]);
    assert_eq!(config.read(0x44, 4), 0xaaaa_0201);
    let one = config
        .add_extended_capability(3, 1, &[0; 8], &[0xff; 8])
        .unwrap();
    let two = config
        .add_extended_capability(0x1e, 2, &[0x11; 4], &[])
        .unwrap();
    assert_eq!((one, two), (0x100, 0x10c));
    assert_eq!(config.read(0x100, 4), 0x10c1_0003);
    assert_eq!(config.read(0x10c, 4), 0x0002_001e);
    config.reset();
    assert_eq!(config.read(0x40, 4), 0xaaaa_5409);
    assert!(matches!(
        config.add_capability(9, &[0; 200], &[]),
        Err(PciError::CapabilitySpace { bytes: 202, .. })
    ));
    assert!(
        config
            .add_extended_capability(3, 1, &[0; 4000], &[])
            .is_err()
    );
}

#[test]
fn slots() {
    let (machine, _, controller) = machine();
    let mut taken = vec![0, 3];
    for _ in 0..30 {
        taken.push(
            machine
                .bridge
                .attach(None, Device::new("next", &controller))
                .unwrap(),
        );
    }
    taken.sort_unstable();
    assert_eq!(taken, (0..32).collect::<Vec<_>>());
    let attach = |slot| {
        machine
            .bridge
            .attach(slot, Device::new("more", &controller))
    };
    assert!(matches!(attach(None), Err(PciError::Full)));
    assert!(matches!(attach(Some(3)), Err(PciError::InUse(_))));
    assert!(matches!(attach(Some(32)), Err(PciError::NoSuchSlot(32))));
    assert!(matches!(
        machine.bridge.detach(200),
        Err(PciError::NoSuchSlot(200))
    ));
}

#[test]
fn several_functions_of_one_slot() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    struct Several(Config);
    impl Function for Several {
        fn config(&self) -> &Config {
            &self.0
        }
    }
    let mut config = Config::new(&ebbtide_gate::Gate::new("several"), DEVICE_IDS);
    config.set_multifunction();
    machine
        .bridge
        .attach(Some(5), Arc::new(Several(config)))
        .unwrap();
    machine
        .bridge
        .attach_at(
            Devfn::new(5, 7).unwrap(),
            Device::new("seventh", &controller),
        )
        .unwrap();
    assert_eq!(machine.config(5, 0x0e, 1), 0x80);
    assert_eq!(machine.ecam.read(5 << 15 | 7 << 12, 4), 0x5678_1234);
    assert_eq!(machine.ecam.read(5 << 15 | 6 << 12, 4), 0xffff_ffff);
    machine.bridge.assign_bars().unwrap();
    assert_eq!(machine.bridge.functions().len(), 3);
    assert_ne!(
        machine
            .bridge
            .attach(None, Device::new("next", &controller))
            .unwrap(),
        5
    );
}

#[test]
fn a_closed_gate_is_an_empty_slot_to_the_guest() {
    let (machine, device, _) = machine();
    machine.bridge.assign_bars().unwrap();
    let (address, table) = (bar(&machine, 0), bar(&machine, 1));
    assert!(matches!(
        machine.bridge.detach(3),
        Err(PciError::NotDrained { .. })
    ));
    let lease = device
        .config()
        .gate()
        .enter(ebbtide_gate::Entry::Io)
        .unwrap();
    device.config().gate().close();
    assert_eq!(machine.config(3, 0, 4), u32::MAX);
    machine.set_config(3, 0x10, 4, 0xd000_0000);
    machine.set_config(3, COMMAND, 2, 0);
    assert_eq!(
        machine.load(address, 4),
        0xffff_ffff,
        "its registers are silent"
    );
    assert_eq!(machine.load(table + 12, 4), 0xffff_ffff);
    assert!(device.config().bars()[0].mapped, "until it is unmapped");
    assert!(matches!(
        machine.bridge.detach(3),
        Err(PciError::NotDrained { .. })
    ));
    machine.bridge.unmap(Devfn::new(3, 0).unwrap()).unwrap();
    assert!(device.config().bars().iter().all(|bar| !bar.mapped));
    drop(lease);
    let detached = machine.bridge.detach(3).unwrap();
    assert!(matches!(machine.bridge.detach(3), Err(PciError::Empty(_))));
    drop(device);
    assert_eq!(Arc::strong_count(&detached), 1, "the bus keeps nothing");
}

#[test]
fn a_slot_can_be_used_again() {
    let (machine, device, controller) = machine();
    machine.bridge.assign_bars().unwrap();
    let addresses: Vec<_> = (0..3).map(|index| bar(&machine, index)).collect();
    device.config().gate().close();
    machine.bridge.detach(3).unwrap();
    assert_eq!(machine.load(addresses[0], 4), 0xffff_ffff);
    machine
        .bridge
        .attach(Some(3), Device::new("disk1", &controller))
        .unwrap();
    machine.bridge.assign_bars().unwrap();
    assert_eq!(
        (0..3).map(|index| bar(&machine, index)).collect::<Vec<_>>(),
        addresses
    );
    assert_eq!(machine.load(addresses[0], 4), 0xb0);
}

#[test]
fn reset_is_power_on_and_addresses_are_kept() {
    let (machine, device, controller) = machine();
    let read_all = || {
        (0..4096)
            .step_by(4)
            .map(|register| machine.config(3, register, 4))
            .collect::<Vec<_>>()
    };
    let power_on = read_all();
    machine.bridge.assign_bars().unwrap();
    let assigned = read_all();
    machine
        .bridge
        .attach(Some(1), Device::new("earlier", &controller))
        .unwrap();
    for register in 0..4096 {
        machine.set_config(3, register, 1, 0xff);
    }
    machine.ports.write(0, 4, 0x8000_1800);
    machine.bridge.reset();
    assert_eq!(read_all(), power_on);
    assert_eq!(machine.ports.read(0, 4), 0);
    assert!(device.config().bars().iter().all(|bar| !bar.mapped));
    assert!(!device.config().msix().unwrap().enabled());
    machine.bridge.assign_bars().unwrap();
    assert_eq!(read_all(), assigned);
}

#[test]
fn addresses_of_what_left_are_free_for_others() {
    let (machine, device, controller) = machine();
    machine.bridge.assign_bars().unwrap();
    let first = bar(&machine, 2);
    device.config().gate().close();
    machine.bridge.detach(3).unwrap();
    let slot = machine
        .bridge
        .attach(Some(7), Device::new("disk1", &controller))
        .unwrap();
    machine.bridge.assign_bars().unwrap();
    assert_eq!(
        u64::from(machine.config(slot, 0x1c, 4)) << 32
            | u64::from(machine.config(slot, 0x18, 4) & !15),
        first
    );
}

#[test]
fn a_guest_has_found_what_it_has_asked_for_the_size_of() {
    let (machine, device, _) = machine();
    let is_found = || device.config().enumerated().load(Ordering::Acquire);
    // What firmware does says nothing of the guest, nor what a driver does that takes leave of one that was there before.
    machine.bridge.assign_bars().unwrap();
    for register in 0..64 {
        machine.config(3, 4 * register, 4);
    }
    machine.set_config(3, 4, 2, 0);
    machine.set_config(3, 0x3c, 1, 0xff);
    assert!(!is_found());
    machine.set_config(3, 0x10, 4, u32::MAX);
    assert!(is_found());
}
