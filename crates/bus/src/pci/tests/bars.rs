// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! BARs: sizing, moving, decoding, what the map refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_memory::{FlatIoeventfd, FlatSection, Listener, ListenerError, Region};

use super::*;
use crate::pci::fakes::{DEVICE_IDS, Signature, windows};
use crate::pci::{BarKind, BarSpec, Config};

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
    for address in [0, (1 << 36) - (1 << 20), 1 << 37, !0xf_ffff] {
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
fn impossible_bars_are_refused() {
    let mut config = Config::new(&ebbtide_gate::Gate::new("bars"), DEVICE_IDS);
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
