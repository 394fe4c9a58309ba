// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bus as firmware, a driver and a hostile guest use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_memory::{FlatIoeventfd, FlatSection, Listener, ListenerError, Mmio, Region};

use super::fakes::{Device, FakeController, Machine, Signature, windows};
use super::*;
use crate::irq::MsiMessage;

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
fn bars_tell_their_sizes() {
    let (machine, ..) = machine();
    for index in 0..6 {
        machine.set_config(3, 0x10 + 4 * index, 4, u32::MAX);
    }
    let sizes: Vec<_> = (0..6)
        .map(|index| machine.config(3, 0x10 + 4 * index, 4))
        .collect();
    assert_eq!(
        sizes,
        [0xffff_e000, 0xffff_f000, 0xfff0_000c, 0xffff_ffff, 0, 0]
    );
    for index in 0..6 {
        machine.set_config(3, 0x10 + 4 * index, 4, 0);
    }
    let types: Vec<_> = (0..6)
        .map(|index| machine.config(3, 0x10 + 4 * index, 4))
        .collect();
    assert_eq!(types, [0, 0, 0xc, 0, 0, 0]);
}

#[test]
fn firmware_places_every_bar_and_the_map_shows_it() {
    let (machine, device, _) = machine();
    machine.bridge.assign_bars().unwrap();
    for info in device.config().bars() {
        let window = if info.spec.kind.is_64bit() {
            windows().mmio64
        } else {
            windows().mmio32
        };
        assert!(info.mapped && window.contains(&info.address), "{info:?}");
        assert_eq!(bar(&machine, info.index.into()), info.address);
    }
    assert_eq!(machine.config(3, COMMAND, 2), MEMORY);
    assert_eq!(machine.load(bar(&machine, 0) + 8188, 4), 0xb0);
    assert_eq!(machine.load(bar(&machine, 2) + 0xf_fff8, 8), 0xb2);
    assert_eq!(machine.load(bar(&machine, 1) + 12, 4), 1, "a masked vector");
    assert_eq!(machine.load(bar(&machine, 2) + (1 << 20), 4), 0xffff_ffff);
}

#[test]
fn a_bar_is_where_the_guest_put_it_when_the_write_returns() {
    let (machine, ..) = machine();
    machine.bridge.assign_bars().unwrap();
    let (old, new) = (bar(&machine, 0), 0xd000_0000);
    machine.set_config(3, 0x10, 4, new as u32);
    assert_eq!(machine.load(old, 4), 0xffff_ffff);
    assert_eq!(machine.load(new, 4), 0xb0);
    machine.set_config(3, COMMAND, 2, 0);
    assert_eq!(machine.load(new, 4), 0xffff_ffff);
    machine.set_config(3, COMMAND, 1, MEMORY);
    assert_eq!(machine.load(new, 4), 0xb0);
    // A 64-bit BAR moves with either half.
    let high = (1 << 36) + (5 << 32);
    set_bar(&machine, 2, high);
    assert_eq!(machine.load(high, 4), 0xb2);
    machine.set_config(3, 0x18, 4, 0x0010_0000);
    assert_eq!(machine.load(high, 4), 0xffff_ffff);
    assert_eq!(machine.load(high + (1 << 20), 4), 0xb2);
    // Byte by byte.
    machine.set_config(3, 0x13, 1, 0xc8);
    assert_eq!(machine.load(0xc800_0000, 4), 0xb0);
}

#[test]
fn sizing_with_decoding_on_moves_a_bar_away_and_back() {
    let (machine, ..) = machine();
    machine.bridge.assign_bars().unwrap();
    for index in [0, 2] {
        let address = bar(&machine, index);
        let before = machine.load(address, 4);
        set_bar(&machine, index, u64::MAX);
        assert_eq!(machine.load(address, 4), 0xffff_ffff);
        set_bar(&machine, index, address);
        assert_eq!(machine.load(address, 4), before);
    }
}

#[test]
fn outside_of_the_windows_nothing_is_decoded() {
    let (machine, device, _) = machine();
    machine.bridge.assign_bars().unwrap();
    for address in [
        0,
        0x10_0000,
        0xbfff_f000,
        0xbfff_e000,
        0xdfff_f000 + 0x1000,
        0xfec0_0000,
        0xffff_e000,
    ] {
        set_bar(&machine, 0, address);
        assert!(!device.config().bars()[0].mapped, "{address:#x}");
        assert_eq!(
            machine.load(address & !0x1fff, 4),
            0xffff_ffff,
            "{address:#x}"
        );
    }
    for address in [0, (1 << 36) - (1 << 20), 1 << 37, u64::MAX & !0xf_ffff] {
        set_bar(&machine, 2, address);
        assert_eq!(machine.load(address, 4), 0xffff_ffff, "{address:#x}");
    }
    // A 64-bit BAR may be in the 32-bit window.
    set_bar(&machine, 2, 0xc010_0000);
    assert_eq!(machine.load(0xc010_0000, 4), 0xb2);
}

#[test]
fn what_the_platform_has_hides_a_bar() {
    let (machine, ..) = machine();
    let platform = Region::mmio("platform", 4096, Arc::new(Signature(0x77)));
    machine
        .memory
        .update(|change| change.add(&machine.root, &platform, 0xd000_0000, 0))
        .unwrap();
    machine.bridge.assign_bars().unwrap();
    set_bar(&machine, 0, 0xd000_0000);
    assert_eq!(machine.load(0xd000_0000, 4), 0x77);
    assert_eq!(machine.load(0xd000_1000, 4), 0xb0);
}

#[test]
fn two_bars_in_one_place_are_harmless() {
    let (machine, ..) = machine();
    machine.bridge.assign_bars().unwrap();
    set_bar(&machine, 0, 0xd000_0000);
    set_bar(&machine, 2, 0xd000_0000);
    assert!([0xb0, 0xb2].contains(&machine.load(0xd000_0000, 4)));
    set_bar(&machine, 2, 0);
    assert_eq!(machine.load(0xd000_0000, 4), 0xb0);
}

/// Refuses sections in one place while it is told to.
struct Picky {
    refuse: Arc<AtomicBool>,
    at: u64,
}

impl Listener for Picky {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        if self.refuse.load(Ordering::SeqCst) && section.range.contains(&self.at) {
            let (what, reason) = ("picky".to_owned(), "no slot left".to_owned());
            return Err(ListenerError { what, reason });
        }
        Ok(())
    }
    fn region_del(&mut self, _section: &FlatSection) {}
    fn ioeventfd_add(&mut self, _ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        Ok(())
    }
    fn ioeventfd_del(&mut self, _ioeventfd: &FlatIoeventfd) {}
}

#[test]
fn a_bar_the_map_refuses_stays_out_and_the_others_come() {
    let (machine, device, _) = machine();
    machine.bridge.assign_bars().unwrap();
    let address = bar(&machine, 0);
    machine.set_config(3, COMMAND, 2, 0);
    let refuse = Arc::new(AtomicBool::new(true));
    machine
        .space
        .add_listener(
            Box::new(Picky {
                refuse: refuse.clone(),
                at: address,
            }),
            0,
        )
        .unwrap();
    machine.set_config(3, COMMAND, 2, MEMORY);
    let mapped: Vec<_> = device
        .config()
        .bars()
        .iter()
        .map(|bar| bar.mapped)
        .collect();
    assert_eq!(mapped, [false, true, true]);
    assert_eq!(machine.load(address, 4), 0xffff_ffff);
    assert_eq!(machine.load(bar(&machine, 2), 4), 0xb2);
    refuse.store(false, Ordering::SeqCst);
    machine.set_config(3, COMMAND, 2, MEMORY);
    assert_eq!(machine.load(address, 4), 0xb0);
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
    let mut config = Config::new(&ebbtide_gate::Gate::new("caps"), super::fakes::DEVICE_IDS);
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
fn impossible_bars_are_refused() {
    let mut config = Config::new(&ebbtide_gate::Gate::new("bars"), super::fakes::DEVICE_IDS);
    let mut add = |index, size_bytes, kind, region_bytes| {
        let region = Region::mmio("bar", region_bytes, Arc::new(Signature(0)));
        config
            .add_bar(index, BarSpec { size_bytes, kind }, region)
            .map_err(|error| error.to_string())
    };
    let wide = BarKind::Mem64 {
        prefetchable: false,
    };
    add(1, 4096, wide, 4096).unwrap();
    for (index, size, kind, region) in [
        (1, 4096, BarKind::Mem32, 4096),
        (2, 4096, BarKind::Mem32, 4096),
        (0, 4096, wide, 4096),
        (5, 4096, wide, 4096),
        (6, 4096, BarKind::Mem32, 4096),
        (255, 4096, BarKind::Mem32, 4096),
        (3, 12288, BarKind::Mem32, 12288),
        (3, 2048, BarKind::Mem32, 2048),
        (3, 1 << 32, BarKind::Mem32, 1 << 32),
        (3, 8192, BarKind::Mem32, 4096),
    ] {
        let error = add(index, size, kind, region).unwrap_err();
        assert!(
            error.contains(&format!("bar {index} of {size:#x}")),
            "{error}"
        );
    }
    add(0, 4096, BarKind::Mem32, 4096).unwrap();
    add(3, 4096, BarKind::Mem32, 4096).unwrap();
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
    let mut config = Config::new(
        &ebbtide_gate::Gate::new("several"),
        super::fakes::DEVICE_IDS,
    );
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

/// A generator good enough to reach every corner.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn disturb(machine: &Machine, random: &mut Random, rounds: usize) {
    for _ in 0..rounds {
        let (choice, value) = (random.next(), random.next());
        let size = [1, 2, 4, 8, 4, 2, 1, 3][choice as usize % 8];
        // The device's own space most of the time, its header half of that, anything at all now and then.
        let offset = match choice >> 60 {
            0..=6 => 3 << 15 | choice >> 8 & 0x3f,
            7..=12 => 3 << 15 | choice >> 8 & 0xfff,
            13 => choice >> 8 & 0xfff,
            _ => choice >> 8 & 0x0fff_ffff,
        };
        match choice >> 56 & 7 {
            0 | 1 => drop(machine.ecam.read(offset, size)),
            2 => machine
                .ports
                .write(0, 4, 0x8000_0000 | (offset >> 4 & 0xff00) | offset & 0xfc),
            3 => machine.ports.write(choice >> 16 & 7, size, value),
            4 => drop(machine.ports.read(choice >> 16 & 7, size)),
            5 => machine.store(value & 0x1_ffff_fffc, 4, choice),
            _ => machine.ecam.write(offset, size, value),
        }
    }
}

#[test]
fn every_register_takes_every_write() {
    let (machine, device, _) = machine();
    let read_all = || {
        (0..4096)
            .step_by(4)
            .map(|register| machine.config(3, register, 4))
            .collect::<Vec<_>>()
    };
    let power_on = read_all();
    for register in 0..4096 {
        for size in [1, 2, 4, 8] {
            for value in [0, u64::MAX, 0x5555_5555_5555_5555, 0xc000_0000_d000_0006] {
                machine.ecam.write(3 << 15 | register, size, value);
                machine.ecam.read(3 << 15 | register, size);
            }
        }
    }
    disturb(&machine, &mut Random(1), 20_000);
    for info in device.config().bars() {
        let decoded =
            windows().mmio32.contains(&info.address) || windows().mmio64.contains(&info.address);
        assert_eq!(
            info.mapped,
            decoded && device.config().command().memory(),
            "{info:?}"
        );
    }
    machine.bridge.reset();
    assert_eq!(read_all(), power_on);
}

#[test]
fn many_cpus_at_once() {
    let (machine, device, _) = machine();
    machine.bridge.assign_bars().unwrap();
    std::thread::scope(|scope| {
        for seed in 1..=3 {
            let machine = &machine;
            scope.spawn(move || disturb(machine, &mut Random(seed << 20 | 1), 5_000));
        }
        scope.spawn(|| {
            let vector = device.config().msix().unwrap().vector(2).unwrap();
            (0..5_000).for_each(|_| vector.signal());
        });
    });
    machine.bridge.reset();
    machine.bridge.assign_bars().unwrap();
    assert_eq!(machine.load(bar(&machine, 0), 4), 0xb0);
}
