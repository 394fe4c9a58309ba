// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty rings, on this machine's KVM: what they do that bitmaps do not.

mod flat;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_hypervisor::kvm::{DEFAULT_PATH, Kvm, VmOptions};
use ebbtide_hypervisor::{Exit, Kicker, Vcpu, probe};
use ebbtide_memory::DirtyClient::Migration;
use ebbtide_memory::{RamBlock, Region};
use flat::{Guest, LIMIT, MIB, kvm, skipped};

const PLACE: u64 = 0x1000_0000;
const PAGE: u64 = 4096;
const PAGES: u64 = 8 * MIB / PAGE;
/// A quarter of what the guests write.
const ENTRIES: u32 = 1024;

program!(
    writes_all_pages_then_reports,
    "2: mov ebx, 0x10000000",
    "3: inc qword ptr [rbx]",
    "add ebx, 0x1000",
    "cmp ebx, 0x10800000",
    "jb 3b",
    "mov al, 7",
    "out 0xe0, al",
    "jmp 2b",
);

program!(
    writes_all_pages_for_ever,
    "2: mov ebx, 0x10000000",
    "3: lock inc qword ptr [rbx]",
    "add ebx, 0x1000",
    "cmp ebx, 0x10800000",
    "jb 3b",
    "jmp 2b",
);

/// A machine with rings and its block at `PLACE`; `None`, said aloud, where there are none, and where KVM emulates: it
/// then writes more in one go than a ring holds.
fn guest(kvm: &Kvm, program: &[u8], cpus: u8) -> Option<(Guest, Arc<RamBlock>)> {
    let report = probe::run(DEFAULT_PATH, LIMIT);
    if !report.can_run_guest {
        skipped(&report.reason);
        return None;
    }
    let options = VmOptions {
        dirty_ring_entries: Some(ENTRIES),
    };
    let guest = Guest::with_options(kvm, program, cpus, &options);
    if guest.vm.dirty_ring_entries() != Some(ENTRIES) {
        skipped("this kvm has no dirty rings");
        return None;
    }
    let block = guest.block("dimm", 8 * MIB, None);
    guest.map(&Region::ram("dimm", &block), PLACE);
    Some((guest, block))
}

/// Pages that have become dirty.
fn written(guest: &Guest, block: &RamBlock) -> Vec<u64> {
    guest.memory.dirty_log().sync().unwrap();
    taken(block)
}

fn taken(block: &RamBlock) -> Vec<u64> {
    let snapshot = block.snapshot_and_clear(Migration, 0..u64::MAX).unwrap();
    let pages = snapshot.ranges().flat_map(|r| r.start / PAGE..r.end / PAGE);
    pages.collect()
}

#[test]
fn a_full_ring_is_emptied_by_its_processor() {
    let Some(kvm) = kvm() else { return };
    let Some((mut guest, block)) = guest(&kvm, writes_all_pages_then_reports(), 1) else {
        return;
    };
    guest.memory.dirty_log().start(Migration).unwrap();
    assert_eq!(written(&guest, &block).len() as u64, PAGES, "all is new");
    for _ in 0..3 {
        assert_eq!(guest.report(), 7);
        // More than the ring holds is in the log before anybody asks.
        let mut pages: BTreeSet<_> = taken(&block).into_iter().collect();
        let before = pages.len() as u64;
        assert!(before >= PAGES - u64::from(ENTRIES), "{before}");
        // A page whose entry filled the ring is noted again when its write is tried again.
        pages.extend(written(&guest, &block));
        assert_eq!(pages, (0..PAGES).collect());
        assert!(written(&guest, &block).is_empty());
    }
}

#[test]
fn entries_of_a_slot_that_has_gone_hurt_nobody() {
    let Some(kvm) = kvm() else { return };
    let Some((mut guest, block)) = guest(&kvm, writes_all_pages_then_reports(), 1) else {
        return;
    };
    let memory = Arc::clone(&guest.memory);
    memory.dirty_log().start(Migration).unwrap();
    written(&guest, &block);
    guest.report();
    // In its ring are entries of a slot whose number goes to a smaller one.
    let all = guest.system_space.sections().unwrap();
    let dimm = all.iter().find(|s| s.range.start == PLACE).unwrap();
    let dimm = Arc::clone(&dimm.region);
    memory.update(|t| t.remove(&dimm)).unwrap();
    let small = guest.block("small", PAGE, None);
    guest.map(&Region::ram("small", &small), 2 * PLACE);
    assert_eq!(taken(&small), [0], "new");
    assert_eq!(written(&guest, &block).len() as u64, PAGES);
    // Nothing wrote to it; an entry of page 0 may stand for it by mistake.
    assert!(taken(&small).len() <= 1);
    memory
        .update(|t| t.add(&guest.system, &dimm, PLACE, 0))
        .unwrap();
    assert!(written(&guest, &block).is_empty());
    guest.report();
    assert_eq!(written(&guest, &block).len() as u64, PAGES);
}

/// Runs a processor until it is told to stop.
fn run(mut vcpu: Box<dyn Vcpu>, stop: &AtomicBool) -> Box<dyn Vcpu> {
    vcpu.bind_thread().unwrap();
    while !stop.load(Ordering::SeqCst) {
        let exit = vcpu.run().unwrap();
        assert!(matches!(exit, Exit::Interrupted), "{exit:x?}");
    }
    vcpu
}

/// What a migration relies on: who copies what is dirty, again and again, has everything in the end.
#[test]
fn who_copies_what_is_dirty_has_all_in_the_end() {
    let Some(kvm) = kvm() else { return };
    let Some((mut guest, block)) = guest(&kvm, writes_all_pages_for_ever(), 2) else {
        return;
    };
    let start = guest.vcpus[0].save().unwrap();
    guest.vcpus[1].restore(&start).unwrap();
    let boot = guest.boot.clone();
    for vcpu in &mut guest.vcpus {
        vcpu.set_boot_state(&boot).unwrap();
    }
    let kickers: Vec<_> = guest.vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
    guest.memory.dirty_log().start(Migration).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = std::mem::take(&mut guest.vcpus)
        .into_iter()
        .map(|vcpu| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || run(vcpu, &stop))
        })
        .collect();
    let count = |page: u64| u64::from_le_bytes(guest.read(PLACE + page * PAGE));
    let mut copies = BTreeMap::new();
    let (mut rounds, mut slowest) = (0, Duration::ZERO);
    let start = Instant::now();
    // Long enough, also where processors are slow.
    while start.elapsed() < Duration::from_secs(2) || count(PAGES - 1) < 3 {
        assert!(start.elapsed() < LIMIT, "the guest hardly runs");
        let began = Instant::now();
        let pages = written(&guest, &block);
        slowest = slowest.max(began.elapsed());
        copies.extend(pages.into_iter().map(|page| (page, count(page))));
        rounds += 1;
    }
    stop.store(true, Ordering::SeqCst);
    kickers.iter().for_each(Kicker::kick);
    let vcpus: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    // A processor that goes leaves nothing in its ring.
    drop(vcpus);
    copies.extend(
        written(&guest, &block)
            .into_iter()
            .map(|page| (page, count(page))),
    );
    let now: BTreeMap<_, _> = (0..PAGES).map(|page| (page, count(page))).collect();
    println!(
        "{rounds} rounds, page 0 written {} times, slowest sync {slowest:?}",
        now[&0]
    );
    assert_eq!(copies, now);
}

#[test]
fn a_number_of_entries_that_is_none_is_refused() {
    let Some(kvm) = kvm() else { return };
    let make = |entries| {
        kvm.create_vm_with(&VmOptions {
            dirty_ring_entries: Some(entries),
        })
    };
    match make(ENTRIES) {
        Ok(vm) if vm.dirty_ring_entries().is_some() => {}
        other => {
            other.unwrap();
            return skipped("this kvm has no dirty rings");
        }
    }
    for entries in [0, 1000, 1 << 30] {
        let error = make(entries).map(drop).unwrap_err().to_string();
        let expected = format!("KVM_ENABLE_CAP for dirty rings of {entries} entries: ");
        assert!(error.starts_with(&expected), "{error}");
    }
}
