// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that write anything anywhere.

use super::*;
use crate::pci::fakes::windows;

/// A generator good enough to reach every corner.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
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
