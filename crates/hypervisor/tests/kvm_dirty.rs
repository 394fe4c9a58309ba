// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log of what guests write, on this machine's KVM: with its bitmaps, and with its rings.

mod flat;

use std::sync::Arc;

use ebbtide_hypervisor::kvm::{Kvm, VmOptions};
use ebbtide_memory::DirtyClient::{Display, Migration};
use ebbtide_memory::{DirtyClient, RamBlock, Region};
use flat::{Guest, MIB, kvm, skipped};

/// Where the guests write.
const PLACE: u64 = 0x1000_0000;
const PAGE: u64 = 4096;
/// How far apart, in pages.
const STRIDE: u64 = 3;
/// Where in its block the memory at `PLACE` starts: not at a word of the log.
const SKIP: u64 = 5;

program!(
    writes_one_page_for_each_report,
    "mov ebx, 0x10000000",
    "2: inc byte ptr [rbx]",
    "mov al, [rbx]",
    "out 0xe0, al",
    "add ebx, 0x3000",
    "jmp 2b",
);

/// Bitmaps, and rings where this KVM has them.
fn each_tracking(test: impl Fn(&Kvm, &VmOptions)) {
    let Some(kvm) = kvm() else { return };
    test(&kvm, &VmOptions::default());
    let rings = VmOptions {
        dirty_ring_entries: Some(1024),
    };
    let vm = kvm.create_vm_with(&rings).unwrap();
    if vm.dirty_ring_entries().is_none() {
        return skipped("this kvm has no dirty rings");
    }
    test(&kvm, &rings);
}

/// A guest with 1 MiB of a block at `PLACE`.
fn guest(kvm: &Kvm, options: &VmOptions) -> (Guest, Arc<RamBlock>, Arc<Region>) {
    let guest = Guest::with_options(kvm, writes_one_page_for_each_report(), 1, options);
    assert_eq!(guest.vm.dirty_ring_entries(), options.dirty_ring_entries);
    let block = guest.block("dimm", 2 * MIB, None);
    let part = Region::alias("part", &Region::ram("dimm", &block), SKIP * PAGE, MIB);
    guest.map(&part, PLACE);
    (guest, block, part)
}

/// Pages that have become dirty, counted from `PLACE`.
fn written(guest: &Guest, block: &RamBlock, client: DirtyClient) -> Vec<u64> {
    guest.memory.dirty_log().sync().unwrap();
    let snapshot = block.snapshot_and_clear(client, 0..u64::MAX).unwrap();
    let pages = snapshot.ranges().flat_map(|r| r.start / PAGE..r.end / PAGE);
    pages.map(|page| page.wrapping_sub(SKIP)).collect()
}

#[test]
fn what_a_guest_writes_is_known_after_a_sync() {
    each_tracking(known_after_a_sync);
}

fn known_after_a_sync(kvm: &Kvm, options: &VmOptions) {
    let (mut guest, block, _part) = guest(kvm, options);
    let log = |guest: &Guest| Arc::clone(&guest.memory);
    assert_eq!(guest.report(), 1);
    log(&guest).dirty_log().start(Migration).unwrap();
    assert_eq!(written(&guest, &block, Migration).len(), 512, "all is new");
    assert!(written(&guest, &block, Migration).is_empty());
    for n in 1..9 {
        assert_eq!(guest.report(), 1);
        let pages = written(&guest, &block, Migration);
        assert_eq!(pages, [n * STRIDE]);
    }
    guest.write(PLACE + 7 * PAGE, &[1]);
    guest.report();
    guest.report();
    log(&guest)
        .dirty_log()
        .start_block(Display, &block)
        .unwrap();
    let pages = written(&guest, &block, Migration);
    assert_eq!(pages, [7, 9 * STRIDE, 10 * STRIDE]);
    assert_eq!(written(&guest, &block, Display).len(), 512, "all is new");

    // The last client to go takes KVM's log with it, and not the first.
    log(&guest).dirty_log().stop(Migration).unwrap();
    guest.report();
    assert_eq!(written(&guest, &block, Display), [11 * STRIDE]);
    log(&guest).dirty_log().stop_block(Display, &block).unwrap();
    guest.report();
    log(&guest).dirty_log().start(Migration).unwrap();
    written(&guest, &block, Migration);
    guest.report();
    assert_eq!(written(&guest, &block, Migration), [13 * STRIDE]);
}

#[test]
fn a_slot_that_goes_leaves_its_pages_dirty_and_one_that_comes_is_logged() {
    each_tracking(slots_come_and_go);
}

fn slots_come_and_go(kvm: &Kvm, options: &VmOptions) {
    let (mut guest, block, part) = guest(kvm, options);
    let memory = Arc::clone(&guest.memory);
    memory.dirty_log().start(Migration).unwrap();
    written(&guest, &block, Migration);
    guest.report();
    memory.update(|t| t.remove(&part)).unwrap();
    assert_eq!(guest.vm.slots_in_use(), 1);
    let all: Vec<u64> = (0..MIB / PAGE).collect();
    assert_eq!(written(&guest, &block, Migration), all);
    guest.map(&part, PLACE);
    assert_eq!(guest.vm.slots_in_use(), 2);
    assert!(written(&guest, &block, Migration).is_empty());
    assert_eq!(guest.report(), 1);
    assert_eq!(written(&guest, &block, Migration), [STRIDE]);
}

#[test]
fn rom_is_not_logged_and_does_not_stand_in_the_way() {
    each_tracking(rom_is_not_logged);
}

fn rom_is_not_logged(kvm: &Kvm, options: &VmOptions) {
    let (mut guest, block, _part) = guest(kvm, options);
    let rom = guest.block("rom", MIB, None);
    guest.map(&Region::rom("rom", &rom), 2 * PLACE);
    let memory = Arc::clone(&guest.memory);
    memory.dirty_log().start(Migration).unwrap();
    let late = guest.block("late", MIB, None);
    guest.map(&Region::rom("late", &late), 3 * PLACE);
    written(&guest, &block, Migration);
    guest.report();
    assert_eq!(written(&guest, &block, Migration), [0]);
    memory.dirty_log().stop(Migration).unwrap();
}
