// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::sync::Arc;

use ebbtide_bus::pci::{Function, Windows};
use ebbtide_devices::testdev::TestDevice;
use ebbtide_memory::{AddressSpace, Memory, MemoryConfig, Region};

use super::*;

const MMIO32: u64 = 0xc000_0000;
/// Offset of BAR 0 in configuration space (PCI 3.0, 6.2.5).
const BAR0: u16 = 0x10;
const BAR2: u16 = 0x18;

fn bar(function: &Arc<TestDevice>, register: u16) -> u64 {
    u64::from(function.config().read(register, 4) & !0xf)
}

fn is_there(space: &AddressSpace, memory: &Arc<Memory>, at: u64) -> bool {
    // What nobody answers is all ones.
    space.load(&memory.register(), at, 1) != 0xff
}

/// More was plugged since the start than there are addresses for: the guest that comes after the reset has the rest.
#[test]
fn what_has_no_addresses_after_a_reset_keeps_them_from_nobody_else() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let root = Region::container("system", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let windows = Windows {
        mmio32: MMIO32..MMIO32 + (1 << 20),
        mmio64: 1 << 32..(1 << 32) + (1 << 20),
        io: 0..0,
    };
    let bridge = HostBridge::new(&memory, windows).unwrap();
    memory
        .update(|t| t.add(&root, bridge.container(), 0, HostBridge::PRIORITY))
        .unwrap();
    let small = TestDevice::new("small", &memory, None).unwrap();
    let large = TestDevice::new("large", &memory, Some(1 << 30)).unwrap();
    bridge.attach(None, Arc::clone(&small) as _).unwrap();
    bridge.assign_bars().unwrap();
    bridge.attach(None, Arc::clone(&large) as _).unwrap();
    bridge
        .assign_bars()
        .expect_err("a BAR larger than its window has an address");

    power_on(&bridge);
    for function in [&small, &large] {
        let at = bar(function, BAR0);
        assert!(at >= MMIO32 && is_there(&space, &memory, at), "{at:#x}");
    }
    assert_eq!(bar(&large, BAR2), 0);
}
