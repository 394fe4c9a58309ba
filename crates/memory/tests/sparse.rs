// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sparse RAM: plug, seal, discard, and what the host sees of it.
#![cfg(not(loom))]

use std::fs;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use ebbtide_memory::{
    Access, AccessError, AddressSpace, Backing, Error, Gpa, Memory, MemoryConfig, Phase, Plugged,
    RamBlock, RamSpec, Region,
};

const BLOCK: u64 = 2 << 20;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait<T>(future: impl Future<Output = T>, limit: Duration) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    let end = Instant::now() + limit;
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(value);
        }
        thread::park_timeout(end.checked_duration_since(Instant::now())?);
    }
}

fn sparse(
    memory: &Memory,
    name: &str,
    blocks: u64,
    backing: Backing,
) -> Result<Arc<RamBlock>, Error> {
    memory.ram().add(RamSpec {
        name: name.into(),
        size_bytes: blocks * BLOCK,
        max_size_bytes: blocks * BLOCK,
        backing,
        prefault: false,
        block_size_bytes: Some(BLOCK),
    })
}

fn setup(blocks: u64, backing: Backing) -> (Arc<Memory>, Arc<AddressSpace>, Arc<RamBlock>) {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 64 << 30,
    })
    .unwrap();
    let root = Region::container("root", 1 << 48);
    let space = memory.address_space("memory", &root).unwrap();
    let block = sparse(&memory, "vmem0", blocks, backing).unwrap();
    memory
        .update(|t| t.add(&root, &Region::ram("vmem0", &block), 0, 0))
        .unwrap();
    (memory, space, block)
}

/// The mappings of a block: permissions and resident KiB of each.
fn mappings(block: &RamBlock) -> Vec<(String, u64)> {
    let start = block.host().as_ptr() as u64;
    let end = start + block.max_size_bytes();
    let mut found = Vec::new();
    let mut inside = false;
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let (from, to) = (
                u64::from_str_radix(from, 16).unwrap(),
                u64::from_str_radix(to, 16).unwrap(),
            );
            inside = from < end && to > start;
            if inside {
                found.push((words.next().unwrap().to_owned(), 0));
            }
        } else if inside && first == "Rss:" {
            found.last_mut().unwrap().1 = words.next().unwrap().parse().unwrap();
        }
    }
    found
}

fn resident_kib(block: &RamBlock) -> u64 {
    mappings(block).iter().map(|(_, kib)| kib).sum()
}

fn backings() -> Vec<Backing> {
    vec![
        Backing::Anon { thp: true },
        Backing::Anon { thp: false },
        Backing::Memfd { thp: false },
    ]
}

#[test]
fn what_is_unplugged_holds_nothing_and_cannot_be_reached() {
    for backing in backings() {
        let (memory, space, block) = setup(16, backing.clone());
        let reader = memory.register();
        assert_eq!(
            (block.plugged_bytes(), resident_kib(&block)),
            (0, 0),
            "{backing:?}"
        );
        assert!(
            mappings(&block)
                .iter()
                .all(|(permissions, _)| permissions.starts_with("---"))
        );
        assert_eq!(space.load(&reader, 0, 8), u64::MAX);
        block.plug(2 * BLOCK..5 * BLOCK, true).unwrap();
        assert_eq!(block.plugged_bytes(), 3 * BLOCK);
        assert_eq!(resident_kib(&block), 3 * BLOCK / 1024, "{backing:?}");
        assert_eq!(block.plugged(0..BLOCK), Plugged::None);
        assert_eq!(block.plugged(2 * BLOCK..5 * BLOCK), Plugged::All);
        assert_eq!(block.plugged(4 * BLOCK..6 * BLOCK), Plugged::Mixed);
        assert_eq!(block.plugged(100 * BLOCK..101 * BLOCK), Plugged::None);
        assert_eq!(space.load(&reader, 3 * BLOCK, 8), 0);
        space.store(&reader, 3 * BLOCK, 8, 42);
        // Half of a load in unplugged memory.
        assert_eq!(space.load(&reader, 5 * BLOCK - 4, 8), 0xffff_ffff_0000_0000);
        let seal = block.seal(3 * BLOCK..4 * BLOCK).unwrap();
        assert_eq!(block.plugged_bytes(), 2 * BLOCK);
        assert_eq!(space.load(&reader, 3 * BLOCK, 8), u64::MAX);
        assert!(block.plug(3 * BLOCK..4 * BLOCK, false).is_err());
        wait(seal.drained(), Duration::from_secs(60)).unwrap();
        seal.undo();
        assert_eq!(space.load(&reader, 3 * BLOCK, 8), 42);
        let seal = block.seal(2 * BLOCK..4 * BLOCK).unwrap();
        wait(seal.drained(), Duration::from_secs(60)).unwrap();
        seal.discard()
            .unwrap_or_else(|(_, error)| panic!("{error}"));
        assert_eq!(resident_kib(&block), BLOCK / 1024, "{backing:?}");
        block.plug(3 * BLOCK..4 * BLOCK, false).unwrap();
        assert_eq!(space.load(&reader, 3 * BLOCK, 8), 0, "{backing:?}");
        assert_eq!(block.plugged_bytes(), 2 * BLOCK);
    }
}

#[test]
fn a_seal_waits_for_pins_of_its_bank_only() {
    let (memory, space, block) = setup(16, Backing::Anon { thp: true });
    let reader = memory.register();
    block.plug(0..16 * BLOCK, false).unwrap();
    let pin = space
        .read(&reader)
        .pin(Gpa(BLOCK), 4096, Access::Write)
        .unwrap();
    let seal = block.seal(0..2 * BLOCK).unwrap();
    let refused = space
        .read(&reader)
        .pin(Gpa(BLOCK), 8, Access::Write)
        .unwrap_err();
    assert_eq!(
        refused,
        AccessError::Unplugged {
            gpa: Gpa(BLOCK),
            len: 8
        }
    );
    assert!(wait(seal.drained(), Duration::from_millis(50)).is_none());
    // Load on the rest of the block does not hold the seal up.
    let busy = space
        .read(&reader)
        .pin(Gpa(8 * BLOCK), 4096, Access::Read)
        .unwrap();
    let (seal, error) = seal.discard().unwrap_err();
    let name = thread::current().name().unwrap().to_owned();
    let wanted = format!("range 0x0..0x400000 of RAM block vmem0 is not drained: 2 pins of {name}");
    assert_eq!(error.to_string(), wanted);
    // A clone counts as well, wherever it is dropped.
    let clone = pin.clone();
    thread::spawn(move || drop(pin)).join().unwrap();
    assert!(wait(seal.drained(), Duration::from_millis(50)).is_none());
    clone.write_at(0, b"late").unwrap();
    drop(clone);
    wait(seal.drained(), Duration::from_secs(60)).unwrap();
    seal.discard()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
    drop(busy);
}

/// Nobody looks every now and then only.
#[test]
fn the_last_unpin_of_a_range_is_noticed_soon() {
    let (memory, space, block) = setup(8, Backing::Anon { thp: true });
    block.plug(0..8 * BLOCK, false).unwrap();
    let reader = memory.register();
    // A host may let any of them wait.
    let soon = (0..20).any(|_| {
        let pin = space.read(&reader).pin(Gpa(0), 8, Access::Read).unwrap();
        let seal = block.seal(0..BLOCK).unwrap();
        assert!(wait(seal.drained(), Duration::from_millis(20)).is_none());
        let let_go = Instant::now();
        drop(pin);
        wait(seal.drained(), Duration::from_secs(60)).unwrap();
        seal.undo();
        let_go.elapsed() < Duration::from_millis(500)
    });
    assert!(soon);
}

#[test]
fn seals_at_once_share_fences_and_all_end() {
    let (memory, space, block) = setup(64, Backing::Anon { thp: true });
    let reader = memory.register();
    block.plug(0..64 * BLOCK, false).unwrap();
    let first_pin = space
        .read(&reader)
        .pin(Gpa(63 * BLOCK), 8, Access::Read)
        .unwrap();
    let first = block.seal(0..BLOCK).unwrap();
    assert!(wait(first.drained(), Duration::from_millis(30)).is_none());
    // These wait for the running fence, then for one of their own.
    let second_pin = space
        .read(&reader)
        .pin(Gpa(63 * BLOCK), 8, Access::Read)
        .unwrap();
    let later: Vec<_> = (1..10)
        .map(|at| block.seal(at * BLOCK..(at + 1) * BLOCK).unwrap())
        .collect();
    assert!(wait(later[0].drained(), Duration::from_millis(30)).is_none());
    drop(first_pin);
    wait(first.drained(), Duration::from_secs(60)).unwrap();
    assert!(wait(later[8].drained(), Duration::from_millis(30)).is_none());
    drop(second_pin);
    for seal in &later {
        wait(seal.drained(), Duration::from_secs(60)).unwrap();
    }
    later.into_iter().for_each(|seal| {
        seal.discard()
            .unwrap_or_else(|(_, error)| panic!("{error}"))
    });
    first.undo();
    assert_eq!(block.plugged_bytes(), 55 * BLOCK);
}

#[test]
fn a_seal_cannot_starve_under_load() {
    let (memory, space, block) = setup(8, Backing::Anon { thp: true });
    block.plug(0..8 * BLOCK, false).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let pinner = {
        let (memory, space, stop) = (Arc::clone(&memory), Arc::clone(&space), Arc::clone(&stop));
        thread::spawn(move || {
            let reader = memory.register();
            let mut held = std::collections::VecDeque::new();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // There is always a pin out.
                held.push_back(space.read(&reader).pin(Gpa(0), 8, Access::Read).unwrap());
                if held.len() > 4 {
                    held.pop_front();
                }
            }
        })
    };
    for _ in 0..50 {
        let seal = block.seal(BLOCK..2 * BLOCK).unwrap();
        wait(seal.drained(), Duration::from_secs(60)).expect("a seal starves");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    pinner.join().unwrap();
}

#[test]
fn mappings_merge_whatever_the_order_of_plugs() {
    for backing in backings() {
        let (memory, space, block) = setup(64, backing.clone());
        let reader = memory.register();
        let touch = |at: u64| space.store(&reader, at * BLOCK, 8, at);
        let plug = |at: u64| {
            block.plug(at * BLOCK..(at + 1) * BLOCK, false).unwrap();
            touch(at);
        };
        (0..64).filter(|at| at % 2 == 0).for_each(plug);
        (0..64).filter(|at| at % 4 == 1).for_each(plug);
        for at in [8, 20, 21] {
            let seal = block.seal(at * BLOCK..(at + 1) * BLOCK).unwrap();
            wait(seal.drained(), Duration::from_secs(60)).unwrap();
            seal.discard()
                .unwrap_or_else(|(_, error)| panic!("{error}"));
            plug(at);
        }
        (0..64).filter(|at| at % 4 == 3).for_each(plug);
        let found = mappings(&block);
        assert_eq!(found.len(), 1, "{backing:?}: {found:?}");
    }
}

#[test]
fn ranges_and_states_are_checked() {
    let (memory, _space, block) = setup(4, Backing::Anon { thp: true });
    let error = |result: Result<(), Error>| result.unwrap_err().to_string();
    let text = error(block.plug(0..BLOCK / 2, false));
    assert_eq!(
        text,
        "RAM block vmem0: range 0x0..0x100000 is not made of whole 0x200000-byte blocks inside it"
    );
    assert!(block.plug(0..0, false).is_err());
    assert!(block.plug(3 * BLOCK..5 * BLOCK, false).is_err());
    block.plug(BLOCK..2 * BLOCK, false).unwrap();
    let text = error(block.plug(0..4 * BLOCK, false));
    assert_eq!(
        text,
        "RAM block vmem0: range 0x0..0x800000 is plugged, at least in part"
    );
    let text = error(block.seal(0..2 * BLOCK).map(drop));
    assert_eq!(
        text,
        "RAM block vmem0: range 0x0..0x400000 is not plugged, at least in part"
    );
    assert_eq!(block.plugged_bytes(), BLOCK);
    let spec = |block_size_bytes, size_bytes, backing: Backing| RamSpec {
        name: "bad".into(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault: false,
        block_size_bytes,
    };
    let anon = Backing::Anon { thp: true };
    for bad in [
        spec(Some(3 << 20), 6 << 20, anon.clone()),
        spec(Some(2 << 20), 3 << 20, anon.clone()),
        spec(Some(512), 1 << 20, anon.clone()),
        spec(None, 0, anon.clone()),
        spec(None, 100, anon),
        spec(
            None,
            4 << 20,
            Backing::Hugetlb {
                page_size_bytes: 3000,
            },
        ),
    ] {
        let result = memory.ram().add(bad.clone());
        assert!(
            matches!(result, Err(Error::BadSpec { .. })),
            "{bad:?}: {result:?}"
        );
    }
    let plain = memory
        .ram()
        .add(spec(None, 1 << 20, Backing::Anon { thp: true }))
        .unwrap();
    assert_eq!(
        error(plain.plug(0..BLOCK, false)),
        "RAM block bad is not sparse"
    );
    assert_eq!(plain.plugged(0..2 << 20), Plugged::Mixed);
}

#[test]
fn a_failed_populate_is_taken_back() {
    // More than the host has: address space costs nothing, the pages are refused.
    let blocks =
        (ebbtide_memory::HostMemory::read().total_bytes / BLOCK + 1024).next_power_of_two();
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 4 * blocks * BLOCK,
    })
    .unwrap();
    let block = sparse(&memory, "vmem0", blocks, Backing::Anon { thp: true }).unwrap();
    let error = block.plug(0..blocks * BLOCK, true).unwrap_err();
    assert!(matches!(error, Error::NoHostMemory { .. }), "{error}");
    assert!(error.to_string().contains("available"), "{error}");
    assert_eq!((block.plugged_bytes(), resident_kib(&block)), (0, 0));
    assert_eq!(block.plugged(0..blocks * BLOCK), Plugged::None);
    assert!(
        mappings(&block)
            .iter()
            .all(|(permissions, _)| permissions.starts_with("---"))
    );
    block.plug(0..BLOCK, true).unwrap();
}

/// Huge pages: with a pool, populate refuses what the pool lacks; without, the block is refused.
#[test]
fn huge_pages_are_refused_with_the_figures() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 64 << 30,
    })
    .unwrap();
    match sparse(
        &memory,
        "huge",
        1 << 10,
        Backing::Hugetlb {
            page_size_bytes: 2 << 20,
        },
    ) {
        Ok(block) => match block.plug(0..block.size_bytes(), true) {
            Ok(()) => assert_eq!(block.plugged_bytes(), block.size_bytes()),
            Err(error) => {
                assert!(
                    error.to_string().contains("pool of 2048 KiB pages"),
                    "{error}"
                );
                assert_eq!(block.plugged_bytes(), 0);
            }
        },
        Err(error) => assert!(error.to_string().contains("2048 KiB pages"), "{error}"),
    }
    let spec = RamSpec {
        name: "boot".into(),
        size_bytes: 1 << 40,
        max_size_bytes: 1 << 40,
        backing: Backing::Hugetlb {
            page_size_bytes: 2 << 20,
        },
        prefault: false,
        block_size_bytes: None,
    };
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 4 << 40,
    })
    .unwrap();
    let error = memory.ram().add(spec).unwrap_err().to_string();
    assert!(error.contains("2048 KiB pages"), "{error}");
}

/// A block that has drained and is gone while a fence of it has not begun: the next block must not share its counters.
#[test]
fn a_fence_under_way_keeps_its_slot_from_the_next_block() {
    const LONG: Duration = Duration::from_secs(60);
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 64 << 30,
    })
    .unwrap();
    let root = Region::container("root", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let show = |block: &Arc<RamBlock>| {
        let region = Region::ram(block.name(), block);
        memory.update(|t| t.add(&root, &region, 0, 0)).unwrap();
        region
    };
    let reader = memory.register();
    let pin = || space.read(&reader).pin(Gpa(0), 64, Access::Write).unwrap();
    let block = |name| {
        let block = sparse(&memory, name, 4, Backing::Anon { thp: false }).unwrap();
        block.plug(0..4 * BLOCK, false).unwrap();
        block
    };
    let old = block("old");
    let region = show(&old);
    let held = pin();
    let ticket = memory.update(|t| t.unplug(&region)).unwrap();
    drop(region);
    assert!(ticket.wait(Phase::Draining, LONG));
    // A grace period that does not end before this section does: no fence begins meanwhile.
    let section = space.read(&reader);
    let grace = memory.grace();
    while wait(memory.grace(), Duration::from_millis(20)).is_some() {}
    drop(old.seal(0..BLOCK).unwrap());
    drop(held);
    assert!(ticket.wait(Phase::Drained, LONG));
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    let refused = old.seal(BLOCK..2 * BLOCK).err();
    assert!(matches!(refused, Some(Error::Unplugged(_))), "{refused:?}");

    let new = block("new");
    let _region = show(&new);
    let held = pin();
    drop(section);
    wait(grace, LONG).unwrap();
    (0..3).for_each(|_| memory.synchronize());
    let seal = new.seal(0..BLOCK).unwrap();
    (0..3).for_each(|_| memory.synchronize());
    assert!(!seal.is_drained(), "drained under a pin");
    drop(held);
    assert!(seal.wait(LONG));
    // Now the fence is over, and the slot serves again.
    assert_eq!((old.pins(), old.dump().contains("pins ")), (0, false));
    seal.discard().map_err(|(_, error)| error).unwrap();
}
