// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The board's registers as a vCPU's thread reaches them.

use ebbtide_bus::pci::Windows;
use ebbtide_hypervisor::sim::SimVm;
use ebbtide_iothread::{LaterEvent, channel, run};
use ebbtide_memory::{AddressSpace, MemoryConfig, Reader};

use super::*;
use crate::allocations;
use crate::layout::{ECAM, PCI_IO, PCI_MMIO32};

/// Slots for DIMMs.
const DIMMS: u16 = 4;
/// Read and written at every width, from each on.
const PORTS: [Range<u16>; 4] = [
    PCI_HOTPLUG_PORTS,
    MEMORY_HOTPLUG_PORTS,
    EVENT_PORT..REGISTER_PORTS.end,
    0xcf8..0xcf9,
];
const VALUES: [u64; 4] = [0, 1, 8, u64::MAX];

fn touch(space: &Arc<AddressSpace>, reader: &Reader, at: u64) {
    for size in [1, 2, 4] {
        space.load(reader, at, size);
        for value in VALUES {
            space.store(reader, at, size, value);
        }
    }
}

/// What changes the map does allocate, a new view for one; nothing here does.
#[test]
fn accesses_of_hot_plug_registers_and_configuration_space_allocate_nothing() {
    let lived = run("control", |local: Local| async move {
        let arena_bytes = 1 << 30;
        let memory = Memory::new(MemoryConfig { arena_bytes }).unwrap();
        let root = Region::container("memory", 1 << 64);
        let ports = Region::container("I/O", 1 << 16);
        let windows = Windows {
            mmio32: PCI_MMIO32,
            mmio64: 1 << 33..1 << 34,
            io: PCI_IO,
        };
        let bridge = HostBridge::new(&memory, windows).unwrap();
        let ecam = Region::mmio("pcie-ecam", ECAM.end - ECAM.start, bridge.ecam());
        memory
            .update(|t| t.add(&root, &ecam, ECAM.start, 0))
            .unwrap();
        let vm = SimVm::new();
        let board = Board {
            vm: &*vm,
            memory: &memory,
            ports: &ports,
            bridge: &bridge,
        };
        let (sender, _incoming) = channel();
        let (_ejected, notifier) = LaterEvent::new(std::time::Duration::from_millis(1)).unwrap();
        let ejector = Ejector::new(notifier);
        let requests = Requests::new(sender);
        let _platform = Platform::new(
            &SerialConfig::Off,
            DIMMS,
            &board,
            &requests,
            &ejector,
            &local,
        )
        .unwrap();
        let spaces = (
            memory.address_space("memory", &root).unwrap(),
            memory.address_space("I/O", &ports).unwrap(),
        );
        // A thread of its own, as each vCPU has one.
        let vcpu = std::thread::spawn(move || {
            let (system, ports) = spaces;
            let reader = system.memory().register();
            let all = || {
                for range in PORTS {
                    range.for_each(|port| touch(&ports, &reader, port.into()));
                }
                for at in (ECAM.start..ECAM.start + 0x2000).step_by(3) {
                    touch(&system, &reader, at);
                }
            };
            // The first time fills what threads keep for themselves.
            all();
            allocations::of(all)
        });
        vcpu.join().unwrap()
    });
    assert_eq!(lived.unwrap(), 0);
    // It does count.
    assert!(allocations::of(|| drop(Box::new(1u64))) > 0);
}
