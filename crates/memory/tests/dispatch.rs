// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What becomes of accesses to registers: rules, gates, and regions that move meanwhile.
#![cfg(not(loom))]

mod setup;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_gate::{Entry, Gate};
use ebbtide_memory::{
    Access, AccessError, AccessRules, Dma, Endian, Gpa, Mmio, Reader, Region, Registers,
};
use setup::{Map, Scratch};

/// 64 bytes of registers at 0x1000 with these rules.
fn with_rules(rules: AccessRules) -> (Map, Arc<Scratch>, Reader) {
    let map = Map::new();
    let scratch = Scratch::new(64);
    let registers = Registers::new(Arc::clone(&scratch) as Arc<dyn Mmio>).rules(rules);
    map.add(&Region::registers("device", 64, registers), 0x1000);
    let reader = map.memory.register();
    (map, scratch, reader)
}

#[test]
fn large_accesses_are_split_for_the_device() {
    let (map, device, reader) = with_rules(AccessRules {
        impl_max: 2,
        ..AccessRules::default()
    });
    map.space.store(&reader, 0x1008, 8, 0x8877_6655_4433_2211);
    let parts = [
        (true, 8, 2, 0x2211),
        (true, 10, 2, 0x4433),
        (true, 12, 2, 0x6655),
        (true, 14, 2, 0x8877),
    ];
    assert_eq!(device.take_seen(), parts);
    assert_eq!(map.space.load(&reader, 0x1008, 8), 0x8877_6655_4433_2211);
    assert_eq!(
        device.take_seen(),
        parts.map(|part| (false, part.1, part.2, part.3))
    );
}

#[test]
fn small_accesses_are_served_from_the_bytes_around_them() {
    let (map, device, reader) = with_rules(AccessRules {
        impl_min: 4,
        ..AccessRules::default()
    });
    map.space.store(&reader, 0x1004, 4, 0x4433_2211);
    device.take_seen();
    assert_eq!(map.space.load(&reader, 0x1006, 1), 0x33);
    assert_eq!(device.take_seen(), [(false, 4, 4, 0x4433_2211)]);
    map.space.store(&reader, 0x1006, 2, 0xbbaa);
    let changed = [(false, 4, 4, 0x4433_2211), (true, 4, 4, 0xbbaa_2211)];
    assert_eq!(device.take_seen(), changed);
}

#[test]
fn unaligned_accesses_go_through_where_the_rules_allow_them() {
    let (map, device, reader) = with_rules(AccessRules {
        unaligned: true,
        ..AccessRules::default()
    });
    map.space.store(&reader, 0x1003, 4, 0x4433_2211);
    assert_eq!(device.take_seen(), [(true, 3, 4, 0x4433_2211)]);
    // Over the border of two containers: both are changed.
    let (map, device, reader) = with_rules(AccessRules {
        unaligned: true,
        impl_min: 4,
        impl_max: 4,
        ..AccessRules::default()
    });
    map.space.store(&reader, 0x1003, 2, 0x2211);
    let changed = [
        (false, 0, 4, 0),
        (true, 0, 4, 0x1100_0000),
        (false, 4, 4, 0),
        (true, 4, 4, 0x22),
    ];
    assert_eq!(device.take_seen(), changed);
    assert_eq!(map.space.load(&reader, 0x1003, 2), 0x2211);
}

#[test]
fn big_endian_registers_see_the_lowest_address_first() {
    let (map, device, reader) = with_rules(AccessRules {
        endian: Endian::Big,
        impl_max: 4,
        ..AccessRules::default()
    });
    // Bytes 11 22 33 44 55 66 77 88, by address.
    map.space.store(&reader, 0x1000, 8, 0x8877_6655_4433_2211);
    let parts = [(true, 0, 4, 0x1122_3344), (true, 4, 4, 0x5566_7788)];
    assert_eq!(device.take_seen(), parts);
    assert_eq!(map.space.load(&reader, 0x1000, 8), 0x8877_6655_4433_2211);
}

#[test]
fn accesses_against_the_rules_are_refused() {
    let (map, device, reader) = with_rules(AccessRules {
        min_size: 4,
        max_size: 4,
        access: Access::Write,
        ..AccessRules::default()
    });
    map.space.store(&reader, 0x1000, 8, 0x2_0000_0001);
    assert_eq!(device.take_seen(), [(true, 0, 4, 1), (true, 4, 4, 2)]);
    map.space.store(&reader, 0x1000, 2, 7);
    map.space.store(&reader, 0x1002, 4, 7);
    assert_eq!(map.space.load(&reader, 0x1000, 4), 0xffff_ffff);
    assert_eq!(device.take_seen(), []);
    // A device is told.
    let dma = Dma::new(&map.space, &Gate::new("other"));
    let refused = |len| {
        Err(AccessError::Refused {
            gpa: Gpa(0x1000),
            len,
        })
    };
    assert_eq!(dma.write(&reader, Gpa(0x1000), &[0; 2]), refused(2));
    assert_eq!(dma.read(&reader, Gpa(0x1000), &mut [0; 4]), refused(4));
    let error = |rules| {
        let registers = Registers::new(Scratch::new(1) as Arc<dyn Mmio>).rules(rules);
        let region = Region::registers("odd", 64, registers);
        let result = map.memory.update(|t| t.add(&map.root, &region, 0x2000, 0));
        result.unwrap_err().to_string()
    };
    let odd = AccessRules {
        impl_max: 3,
        ..AccessRules::default()
    };
    assert_eq!(
        error(odd),
        "region odd: access sizes are 1, 2, 4 or 8 bytes"
    );
    let crossed = AccessRules {
        min_size: 8,
        max_size: 4,
        ..AccessRules::default()
    };
    assert!(error(crossed).contains("larger than the largest"));
}

#[test]
fn a_closed_gate_gives_all_ones_and_drops_stores() {
    let map = Map::new();
    let scratch = Scratch::new(64);
    let gate = Gate::new("device");
    let registers = Registers::new(Arc::clone(&scratch) as Arc<dyn Mmio>).gate(&gate);
    map.add(&Region::registers("device", 64, registers), 0x1000);
    let reader = map.memory.register();
    map.space.store(&reader, 0x1000, 4, 5);
    gate.close();
    scratch.take_seen();
    map.space.store(&reader, 0x1000, 4, 6);
    assert_eq!(map.space.load(&reader, 0x1000, 2), 0xffff);
    assert_eq!(map.space.load(&reader, 0x1000, 8), u64::MAX);
    let dma = Dma::new(&map.space, &Gate::new("other"));
    let refused = AccessError::Refused {
        gpa: Gpa(0x1000),
        len: 4,
    };
    assert_eq!(dma.write(&reader, Gpa(0x1000), &[0; 4]), Err(refused));
    assert_eq!(scratch.take_seen(), []);
    assert!(gate.is_drained(), "dispatch left the gate each time");
}

#[test]
fn unplugged_memory_gives_all_ones_byte_by_byte() {
    let map = Map::new();
    let spec = ebbtide_memory::RamSpec {
        name: "vmem".to_owned(),
        size_bytes: 0x3_0000,
        max_size_bytes: 0x3_0000,
        backing: ebbtide_memory::Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: Some(0x1_0000),
    };
    let block = map.memory.ram().add(spec).unwrap();
    block.plug(0..0x1_0000, false).unwrap();
    block.plug(0x2_0000..0x3_0000, false).unwrap();
    map.add(&Region::ram("vmem", &block), 0);
    let reader = map.memory.register();
    // Over the end of what is plugged, and over its beginning.
    map.space.store(&reader, 0xfffd, 8, 0x8877_6655_4433_2211);
    assert_eq!(map.space.load(&reader, 0xfffd, 8), 0xffff_ffff_ff33_2211);
    assert_eq!(map.space.load(&reader, 0xfffd, 2), 0x2211);
    map.space.store(&reader, 0x1_fffd, 8, 0x8877_6655_4433_2211);
    assert_eq!(map.space.load(&reader, 0x1_fffd, 8), 0x8877_6655_44ff_ffff);
    assert_eq!(map.space.load(&reader, 0x1_8000, 4), 0xffff_ffff);
    let dma = Dma::new(&map.space, &Gate::new("disk"));
    let mut bytes = [0; 8];
    let unplugged = |len| AccessError::Unplugged {
        gpa: Gpa(0x1_0000),
        len,
    };
    let result = dma.read(&reader, Gpa(0xfffd), &mut bytes);
    assert_eq!(
        (result, &bytes[..3]),
        (Err(unplugged(5)), &[0x11, 0x22, 0x33][..])
    );
    let mapped = dma.map(&reader, &[(Gpa(0x1_0000), 8)], Access::Read);
    let gpa = Gpa(0x1_0000);
    assert!(matches!(mapped, Err(AccessError::Unplugged { gpa: at, .. }) if at == gpa));
}

/// Answers with its number, counts who is inside, and notes the gate's state.
struct Bar {
    number: u64,
    gate: Arc<Gate>,
    after_drain: Arc<AtomicBool>,
}

impl Mmio for Bar {
    fn read(&self, _: u64, _: u8) -> u64 {
        if self.gate.is_drained() {
            self.after_drain.store(true, Ordering::SeqCst);
        }
        self.number
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

/// One thread less that moves, also when it fails.
struct Moved<'a>(&'a AtomicU64);

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Four threads move a BAR each, within its own window, while all of them and two more read all
/// of them: the first access after the write that moved a BAR hits it in its new place, and not
/// in the old one, and no access is torn. A fifth device comes, is closed under the reads, and goes.
#[test]
fn four_threads_move_bars_while_others_read_them() {
    const WINDOW: u64 = 1 << 20;
    const BAR: u64 = 0x1000;
    let map = Map::new();
    let after_drain = Arc::new(AtomicBool::new(false));
    let bar = |number: u64| {
        let (gate, after_drain) = (Gate::new(format!("bar{number}")), Arc::clone(&after_drain));
        let bar = Bar {
            number,
            gate: Arc::clone(&gate),
            after_drain,
        };
        let registers = Registers::new(Arc::new(bar)).gate(&gate);
        (
            Region::registers(format!("bar{number}"), BAR, registers),
            gate,
        )
    };
    let bars: Vec<_> = (0..4).map(|number| bar(number).0).collect();
    for (number, region) in bars.iter().enumerate() {
        map.add(region, number as u64 * WINDOW);
    }
    let (moving, hits) = (AtomicU64::new(4), AtomicU64::new(0));
    thread::scope(|scope| {
        for (number, region) in bars.iter().enumerate() {
            let (map, moving) = (&map, &moving);
            scope.spawn(move || {
                let _moved = Moved(moving);
                let reader = map.memory.register();
                let base = number as u64 * WINDOW;
                let (mut at, mut step) = (base, number as u64 + 1);
                for _ in 0..500 {
                    step = step.wrapping_mul(6364136223846793005).wrapping_add(1);
                    let to = base + (step >> 40) % (WINDOW / BAR) * BAR;
                    map.change(|t| t.set_offset(region, to));
                    assert_eq!(map.space.load(&reader, to + 8, 8), number as u64);
                    if at != to {
                        assert_eq!(map.space.load(&reader, at + 8, 8), u64::MAX, "old place");
                    }
                    at = to;
                }
            });
        }
        for _ in 0..2 {
            let (map, moving, hits) = (&map, &moving, &hits);
            scope.spawn(move || {
                let reader = map.memory.register();
                let mut address = 0;
                while moving.load(Ordering::SeqCst) > 0 {
                    address = (address + BAR) % (5 * WINDOW);
                    let value = map.space.load(&reader, address, 8);
                    let wanted = [address / WINDOW, u64::MAX];
                    assert!(wanted.contains(&value), "{value:#x} at {address:#x}");
                    hits.fetch_add(u64::from(value != u64::MAX), Ordering::Relaxed);
                }
            });
        }
        let reader = map.memory.register();
        while moving.load(Ordering::SeqCst) > 0 {
            let (region, gate) = bar(4);
            map.add(&region, 4 * WINDOW);
            assert_eq!(map.space.load(&reader, 4 * WINDOW, 8), 4);
            gate.close();
            assert_eq!(map.space.load(&reader, 4 * WINDOW, 8), u64::MAX);
            gate.drain_blocking(Instant::now() + Duration::from_secs(60))
                .unwrap();
            assert!(gate.enter(Entry::Mmio).is_none());
            map.change(|t| t.remove(&region));
        }
    });
    assert!(
        !after_drain.load(Ordering::SeqCst),
        "a drained device was entered"
    );
    assert!(hits.into_inner() > 0, "the readers never hit anything");
}
