// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Slots, and what guests see where there is none, on this machine's KVM.

mod flat;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_hypervisor::{Exit, Vm};
use ebbtide_memory::{Ioeventfd, Mmio, Phase, Region};
use flat::{Guest, LIMIT, MIB, kvm};
use vmm_sys_util::eventfd::EventFd;

/// Where the tests put what they look at: inside the first 4 GiB, which are mapped.
const PLACE: u64 = 0x1000_0000;

/// Registers that nobody asks: the tests look at the exits.
struct Nobody;

impl Mmio for Nobody {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }
    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

program!(
    reads_and_writes_every_width,
    "mov ebx, 0x10000000",
    "mov al, [rbx + 1]",
    "mov ax, [rbx + 2]",
    "mov eax, [rbx + 4]",
    "mov rax, [rbx + 8]",
    "mov [rbx + 16], rax",
    "mov [rbx + 24], eax",
    "mov [rbx + 28], ax",
    "mov [rbx + 31], al",
    "hlt",
);

#[test]
fn accesses_without_a_slot_exit_with_address_and_width() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reads_and_writes_every_width());
    for (offset, width) in [(1, 1), (2, 2), (4, 4), (8, 8)] {
        match guest.exit() {
            Exit::MmioRead { gpa, data } => {
                assert_eq!((gpa, data.len()), (PLACE + offset, width));
                let value = 0x1122_3344_5566_7788u64.to_le_bytes();
                data.copy_from_slice(&value[..width]);
            }
            other => panic!("{other:x?}"),
        }
    }
    for (offset, width) in [(16, 8), (24, 4), (28, 2), (31, 1)] {
        match guest.exit() {
            Exit::MmioWrite { gpa, data } => {
                assert_eq!((gpa, data.len()), (PLACE + offset, width));
                assert_eq!(data, &0x1122_3344_5566_7788u64.to_le_bytes()[..width]);
            }
            other => panic!("{other:x?}"),
        }
    }
}

program!(
    adds_one_for_each_report,
    "mov ebx, 0x10000000",
    "2: inc dword ptr [rbx]",
    "mov al, [rbx]",
    "out 0xe0, al",
    "jmp 2b",
);

#[test]
fn ram_comes_and_goes_under_a_guest() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, adds_one_for_each_report());
    assert_eq!(guest.vm.slots_in_use(), 1);
    for round in 0..3 {
        let dimm = guest.add_ram("dimm", PLACE, 4 * MIB);
        assert_eq!(guest.vm.slots_in_use(), 2, "round {round}");
        // A read that exited in the round before was answered with ones.
        let first = guest.report();
        assert!(first == 1 || round > 0, "{first}");
        let next = guest.report();
        assert_eq!(next, first.wrapping_add(1));
        assert_eq!(guest.read::<1>(PLACE), [next]);
        guest.write(PLACE, &[40]);
        assert_eq!(guest.report(), 41);

        let ticket = guest.memory.update(|t| t.unplug(&dimm)).unwrap();
        assert_eq!(guest.vm.slots_in_use(), 1, "round {round}");
        drop(dimm);
        // Drains only if the slot's hold is gone with the slot.
        let began = Instant::now();
        while ticket.phase() != Phase::Drained {
            assert!(began.elapsed() < LIMIT, "{:?}", ticket.holders());
            thread::sleep(Duration::from_millis(1));
        }
        ticket.destroy().map_err(|(_, error)| error).unwrap();
        match guest.exit() {
            Exit::MmioRead { gpa: PLACE, data } => data.fill(0xff),
            other => panic!("{other:x?}"),
        }
        match guest.exit() {
            Exit::MmioWrite { gpa: PLACE, data } => assert_eq!(data, [0; 4]),
            other => panic!("{other:x?}"),
        }
        match guest.exit() {
            Exit::MmioRead { gpa: PLACE, data } => data.fill(7),
            other => panic!("{other:x?}"),
        }
        assert_eq!(guest.report(), 7);
    }
}

#[test]
fn slot_numbers_are_recycled() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, adds_one_for_each_report());
    let blocks: Vec<_> = (0..8)
        .map(|n| Region::ram(format!("r{n}"), &guest.block(&format!("r{n}"), MIB, None)))
        .collect();
    for _ in 0..20 {
        guest
            .memory
            .update(|t| {
                let mut at = PLACE;
                blocks.iter().try_for_each(|region| {
                    at += 2 * MIB;
                    t.add(&guest.system, region, at, 0)
                })
            })
            .unwrap();
        assert_eq!(guest.vm.slots_in_use(), 9);
        guest
            .memory
            .update(|t| blocks.iter().try_for_each(|region| t.remove(region)))
            .unwrap();
        assert_eq!(guest.vm.slots_in_use(), 1);
    }
}

program!(
    reads_then_writes,
    "mov ebx, 0x10000000",
    "mov al, [rbx]",
    "out 0xe0, al",
    "mov byte ptr [rbx], 9",
    "mov al, [rbx]",
    "out 0xe0, al",
    "hlt",
);

#[test]
fn writes_to_rom_exit_and_reads_do_not() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reads_then_writes());
    let block = guest.block("rom", MIB, None);
    // SAFETY: the block was just made, is a MiB long, and nobody else has it.
    unsafe { block.host().write(5) };
    guest.map(&Region::rom("rom", &block), PLACE);
    assert_eq!(guest.report(), 5);
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: PLACE,
            data: &[9]
        }
    );
    assert_eq!(guest.report(), 5);
}

#[test]
fn a_piece_of_a_page_is_served_by_exits() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reads_then_writes());
    let whole = Region::ram("pieces", &guest.block("pieces", MIB, None));
    guest.map(&Region::alias("piece", &whole, 0x800, 0x400), PLACE);
    assert_eq!(guest.vm.slots_in_use(), 1);
    match guest.exit() {
        Exit::MmioRead { gpa: PLACE, data } => data.fill(3),
        other => panic!("{other:x?}"),
    }
    assert_eq!(guest.report(), 3);
}

#[test]
fn ram_beyond_the_physical_address_bits_is_refused_with_the_figures() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, reads_then_writes());
    let bits = guest.vm.limits().phys_bits;
    let end = 1u64 << bits;
    let region = Region::ram("far", &guest.block("far", 2 * MIB, None));
    let refused = guest
        .memory
        .update(|t| t.add(&guest.system, &region, end - MIB, 0))
        .expect_err("a slot across the end of the address space")
        .to_string();
    for part in [
        &format!("{:#x}", end - MIB),
        "0x200000",
        "far",
        &format!("{bits} physical"),
    ] {
        assert!(refused.contains(part), "{part} in {refused}");
    }
    // Nothing of it is left.
    assert_eq!(guest.vm.slots_in_use(), 1);
    guest.map(&region, PLACE);
    assert_eq!(guest.vm.slots_in_use(), 2);
}

program!(
    touches,
    "mov ebx, 0x10000000",
    "mov al, 1",
    "out 0xe0, al",
    "mov al, [rbx]",
    "out 0xe0, al",
    "mov [rbx], al",
    "out 0xe0, al",
    "hlt",
);

#[test]
fn an_inaccessible_page_of_a_slot_is_a_memory_fault_and_can_be_repaired() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, touches());
    let block = guest.block("vmem", 8 * MIB, Some(2 * MIB));
    guest.map(&Region::ram("vmem", &block), PLACE);
    assert_eq!(guest.vm.slots_in_use(), 2);
    assert_eq!(guest.report(), 1);
    for _ in 0..2 {
        match guest.exit() {
            Exit::MmioRead { gpa: PLACE, .. } => {
                return flat::skipped(
                    "this KVM emulates loads: it takes inaccessible memory for no memory",
                );
            }
            Exit::MemoryFault { gpa, rip } => {
                assert!(gpa.is_none_or(|gpa| gpa & !0xfff == PLACE), "{gpa:x?}");
                let load = flat::PROGRAM + 9;
                assert_eq!(rip, load, "the instruction has not been executed");
            }
            other => panic!("{other:x?}"),
        }
    }
    block.plug(0..2 * MIB, false).unwrap();
    assert_eq!(guest.report(), 0);
    assert_eq!(guest.report(), 0);
}

program!(
    rings,
    "mov ebx, 0x10000000",
    "mov dword ptr [rbx + 8], 3",
    "mov word ptr [rbx + 8], 3",
    "mov dword ptr [rbx + 8], 4",
    "mov dword ptr [rbx + 12], 3",
    "mov al, 1",
    "out 0xe0, al",
    "mov dword ptr [rbx + 8], 3",
    "hlt",
);

fn doorbell(datamatch: Option<u64>, size: u8) -> (EventFd, Ioeventfd) {
    let (event, fd) = flat::event();
    (
        event,
        Ioeventfd {
            offset: 8,
            size,
            datamatch,
            fd,
        },
    )
}

#[test]
fn an_ioeventfd_takes_exactly_its_writes() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, rings());
    let registers = Region::mmio("registers", 0x1000, Arc::new(Nobody));
    guest.map(&registers, PLACE);
    let (event, ioeventfd) = doorbell(Some(3), 4);
    guest
        .memory
        .update(|t| t.add_ioeventfd(&registers, ioeventfd.clone()))
        .unwrap();
    let at = PLACE + 8;
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: at,
            data: &[3, 0]
        },
        "another width"
    );
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: at,
            data: &[4, 0, 0, 0]
        },
        "another value"
    );
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: at + 4,
            data: &[3, 0, 0, 0]
        },
        "another address"
    );
    assert_eq!(guest.report(), 1);
    guest
        .memory
        .update(|t| t.remove_ioeventfd(&registers, &ioeventfd))
        .unwrap();
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: at,
            data: &[3, 0, 0, 0]
        },
        "removed"
    );
    assert!(event.read().is_err());
}

program!(
    rings_wide_and_narrow,
    "mov ebx, 0x10000000",
    "mov dword ptr [rbx + 8], 77",
    "mov word ptr [rbx + 8], 5",
    "mov al, 1",
    "out 0xe0, al",
    "hlt",
);

#[test]
fn an_ioeventfd_of_any_value_keeps_its_width() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, rings_wide_and_narrow());
    let registers = Region::mmio("registers", 0x1000, Arc::new(Nobody));
    guest.map(&registers, PLACE);
    let (event, ioeventfd) = doorbell(None, 4);
    guest
        .memory
        .update(|t| t.add_ioeventfd(&registers, ioeventfd))
        .unwrap();
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: PLACE + 8,
            data: &[5, 0]
        }
    );
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(guest.report(), 1);
}

#[test]
fn an_ioeventfd_of_any_width_takes_all() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, rings_wide_and_narrow());
    let registers = Region::mmio("registers", 0x1000, Arc::new(Nobody));
    guest.map(&registers, PLACE);
    let (event, ioeventfd) = doorbell(None, 0);
    guest
        .memory
        .update(|t| t.add_ioeventfd(&registers, ioeventfd))
        .unwrap();
    assert_eq!(guest.report(), 1);
    assert_eq!(event.read().unwrap(), 2);
    // Moving the region moves its doorbell.
    guest
        .memory
        .update(|t| t.set_offset(&registers, PLACE + MIB))
        .unwrap();
    let boot = guest.boot.clone();
    guest.vcpu().set_boot_state(&boot).unwrap();
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: PLACE + 8,
            data: &[77, 0, 0, 0]
        }
    );
    assert_eq!(
        guest.exit(),
        Exit::MmioWrite {
            gpa: PLACE + 8,
            data: &[5, 0]
        }
    );
    assert_eq!(guest.report(), 1);
}
