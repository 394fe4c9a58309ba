// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The RAM list while it changes: readers without locks, notifiers in order, look-ups against a
//! naive search.
#![cfg(not(loom))]

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, Weak};

use ebbtide_memory::{Backing, Error, Memory, MemoryConfig, RamBlock, RamNotifier, RamSpec};
use proptest::prelude::*;

const PAGE: u64 = 4096;

fn memory() -> Arc<Memory> {
    Memory::new(MemoryConfig {
        arena_bytes: 64 << 30,
    })
    .unwrap()
}

fn spec(name: &str, size_bytes: u64, max_size_bytes: u64) -> RamSpec {
    RamSpec {
        name: name.into(),
        size_bytes,
        max_size_bytes,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: None,
    }
}

fn remove(memory: &Memory, block: &Arc<RamBlock>) {
    let mut ticket = Some(memory.update(|t| t.retire(block)).unwrap());
    while let Some(still) = ticket.take() {
        ticket = still.destroy().err().map(|(ticket, _)| ticket);
        std::thread::yield_now();
    }
}

/// Keeps the sizes by host address, from what it is told; looks the list up each time.
struct Follower {
    memory: Weak<Memory>,
    sizes: Arc<Mutex<BTreeMap<usize, (u64, u64)>>>,
}

impl Follower {
    fn look(&self, host: NonNull<u8>, there: bool) {
        let Some(memory) = self.memory.upgrade() else {
            return;
        };
        let found = memory.ram().by_host(host.as_ptr());
        assert_eq!(found.is_some(), there, "what is told is what is published");
        let reader = memory.register();
        let guard = memory.ram().read(&reader);
        assert_eq!(guard.by_host(host.as_ptr()).is_some(), there);
        assert_eq!(guard.version(), memory.ram().version());
    }
}

impl RamNotifier for Follower {
    fn added(&mut self, host: NonNull<u8>, used: u64, max: u64) {
        self.look(host, true);
        let before = self
            .sizes
            .lock()
            .unwrap()
            .insert(host.addr().get(), (used, max));
        assert_eq!(before, None);
    }

    fn removed(&mut self, host: NonNull<u8>, used: u64, max: u64) {
        self.look(host, false);
        let before = self.sizes.lock().unwrap().remove(&host.addr().get());
        assert_eq!(before, Some((used, max)));
        // Still mapped: whoever registered it elsewhere can take that back.
        // SAFETY: memory of the block, which nobody else uses any more.
        unsafe { host.as_ptr().read_volatile() };
    }

    fn resized(&mut self, host: NonNull<u8>, old: u64, new: u64) {
        self.look(host, true);
        let mut sizes = self.sizes.lock().unwrap();
        let entry = sizes.get_mut(&host.addr().get()).unwrap();
        assert_eq!(entry.0, old);
        entry.0 = new;
    }
}

fn follow(memory: &Arc<Memory>) -> Arc<Mutex<BTreeMap<usize, (u64, u64)>>> {
    let sizes = Arc::default();
    memory.ram().add_notifier(Box::new(Follower {
        memory: Arc::downgrade(memory),
        sizes: Arc::clone(&sizes),
    }));
    sizes
}

fn sizes_of(memory: &Memory) -> BTreeMap<usize, (u64, u64)> {
    let blocks = memory.ram().snapshot();
    let size = |block: &Arc<RamBlock>| {
        let host = block.host().addr().get();
        (host, (block.size_bytes(), block.max_size_bytes()))
    };
    blocks.iter().map(size).collect()
}

#[test]
fn a_walk_is_not_disturbed_and_notices_the_change() {
    let memory = memory();
    let blocks: Vec<_> = (0..10u64)
        .map(|at| {
            let bytes = (10 - at) * PAGE;
            memory
                .ram()
                .add(spec(&format!("b{at}"), bytes, bytes))
                .unwrap()
        })
        .collect();
    let reader = memory.register();
    let guard = memory.ram().read(&reader);
    let kept = memory.ram().snapshot();
    let mut walked = Vec::new();
    for (at, block) in guard.iter().enumerate() {
        walked.push(block.name().to_owned());
        if at == 3 {
            // Others change the list while this section is open; a destroy waits for no section.
            std::thread::scope(|scope| {
                let memory = &memory;
                scope.spawn(move || {
                    memory.ram().add(spec("new", PAGE, PAGE)).unwrap();
                });
            });
            assert_ne!(guard.version(), memory.ram().version());
        }
    }
    assert_eq!(
        walked,
        (0..10).map(|at| format!("b{at}")).collect::<Vec<_>>()
    );
    assert!(guard.by_name("new").is_none() && memory.ram().by_name("new").is_some());
    drop(guard);
    blocks.iter().for_each(|block| remove(&memory, block));
    assert_eq!((memory.ram().snapshot().len(), kept.len()), (1, 10));
    assert_eq!(memory.ram().version(), 21);
    assert_eq!(memory.ram().read(&reader).version(), 21);
}

#[test]
fn readers_and_late_notifiers_while_blocks_come_and_go() {
    let memory = memory();
    let stop = AtomicBool::new(false);
    let followers: Mutex<Vec<_>> = Mutex::default();
    std::thread::scope(|scope| {
        let (memory, stop, followers) = (&memory, &stop, &followers);
        let changers: Vec<_> = (0..2u64)
            .map(|changer| {
                scope.spawn(move || {
                    for round in 0..150u64 {
                        let bytes = (1 + round % 5) * PAGE;
                        let name = format!("{changer}-{round}");
                        let block = memory.ram().add(spec(&name, bytes, 8 * PAGE)).unwrap();
                        memory.ram().grow(&block, 8 * PAGE).unwrap();
                        if round % 3 != 0 {
                            remove(memory, &block);
                        }
                    }
                })
            })
            .collect();
        scope.spawn(move || {
            let reader = memory.register();
            let mut version = 0;
            while !stop.load(Relaxed) {
                let guard = memory.ram().read(&reader);
                assert!(guard.version() >= version, "versions go forwards");
                version = guard.version();
                for block in &*guard {
                    let host = block.host().as_ptr().wrapping_add(100);
                    let (found, offset) = guard.by_host(host).unwrap();
                    assert!(Arc::ptr_eq(found, block) && offset == 100);
                    let (found, _) = guard.by_ram_offset(block.ram_offset()).unwrap();
                    assert!(Arc::ptr_eq(found, block));
                    assert!(Arc::ptr_eq(guard.by_name(block.name()).unwrap(), block));
                }
            }
        });
        scope.spawn(move || {
            while !stop.load(Relaxed) && followers.lock().unwrap().len() < 50 {
                let sizes = follow(memory);
                followers.lock().unwrap().push(sizes);
            }
        });
        let changed: Vec<_> = changers.into_iter().map(|changer| changer.join()).collect();
        // Also when one failed: the others would go on for ever.
        stop.store(true, Relaxed);
        changed.into_iter().for_each(|changer| changer.unwrap());
    });
    let wanted = sizes_of(&memory);
    assert_eq!(wanted.len(), 100);
    for sizes in followers.into_inner().unwrap() {
        assert_eq!(*sizes.lock().unwrap(), wanted);
    }
}

#[test]
fn a_notifier_that_is_removed_hears_nothing_more() {
    let memory = memory();
    let sizes = Arc::default();
    let id = memory.ram().add_notifier(Box::new(Follower {
        memory: Weak::new(),
        sizes: Arc::clone(&sizes),
    }));
    memory.ram().add(spec("one", PAGE, PAGE)).unwrap();
    memory.ram().remove_notifier(id);
    memory.ram().remove_notifier(id);
    memory.ram().add(spec("two", PAGE, PAGE)).unwrap();
    assert_eq!(sizes.lock().unwrap().len(), 1);
    assert_eq!(Arc::strong_count(&sizes), 1);
}

/// A stale entry of a walk is harmless: its addresses are inaccessible, and still known as its own.
#[test]
fn a_block_that_is_gone_says_so() {
    let memory = memory();
    let block = memory.ram().add(spec("ram", PAGE, PAGE)).unwrap();
    let kept = memory.ram().snapshot();
    remove(&memory, &block);
    let (stale, _) = kept.by_host(block.host().as_ptr()).unwrap();
    assert!(stale.dump().contains("state      gone"), "{}", stale.dump());
    assert!(memory.ram().by_host(block.host().as_ptr()).is_none());
    let error = memory.ram().grow(&block, PAGE).unwrap_err();
    assert!(matches!(error, Error::Unplugged(_)), "{error}");
    // The name is free again, the offset too, the address is not.
    let again = memory.ram().add(spec("ram", PAGE, PAGE)).unwrap();
    assert_eq!(again.ram_offset(), block.ram_offset());
    assert_ne!(again.host(), block.host());
}

#[derive(Clone, Debug)]
enum Step {
    Add(u8, u64, u64),
    Remove(usize),
    Grow(usize, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..40u8, 1..200u64, 0..100u64).prop_map(|(name, used, more)| Step::Add(name, used, more)),
        2 => any::<usize>().prop_map(Step::Remove),
        2 => (any::<usize>(), 0..300u64).prop_map(|(at, pages)| Step::Grow(at, pages)),
    ];
    proptest::collection::vec(step, 1..80)
}

/// All look-ups, against a search through what the test holds.
fn check(memory: &Arc<Memory>, model: &[Arc<RamBlock>], probes: &[u64]) {
    let reader = memory.register();
    let list = memory.ram().read(&reader);
    assert_eq!(list.len(), model.len());
    assert!(
        list.iter()
            .zip(list.iter().skip(1))
            .all(|(a, b)| a.max_size_bytes() >= b.max_size_bytes())
    );
    let offsets = model.iter().map(|block| block.ram_offset());
    let ends = model
        .iter()
        .map(|block| block.ram_offset() + block.max_size_bytes());
    for at in offsets
        .chain(ends)
        .flat_map(|at| [at.wrapping_sub(1), at])
        .chain(probes.iter().copied())
    {
        let naive = model.iter().find_map(|block| {
            let offset = at.checked_sub(block.ram_offset())?;
            (offset < block.max_size_bytes()).then(|| (block.name(), offset))
        });
        let found = list.by_ram_offset(at);
        assert_eq!(found.map(|(block, offset)| (block.name(), offset)), naive);
    }
    for block in model {
        let host = block.host().as_ptr();
        for offset in [0, 1, block.max_size_bytes() - 1] {
            let found = list.by_host(host.wrapping_add(offset as usize)).unwrap();
            assert!(Arc::ptr_eq(found.0, block) && found.1 == offset);
        }
        // Blocks lie apart: neither side of one belongs to another.
        assert!(list.by_host(host.wrapping_sub(1)).is_none());
        assert!(
            list.by_host(host.wrapping_add(block.max_size_bytes() as usize))
                .is_none()
        );
        assert!(Arc::ptr_eq(list.by_name(block.name()).unwrap(), block));
    }
    for name in 0..40u8 {
        let there = model.iter().any(|block| block.name() == name.to_string());
        assert_eq!(list.by_name(&name.to_string()).is_some(), there);
    }
    assert_eq!(list.dump().lines().count(), model.len() + 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn look_ups_find_what_a_search_finds(steps in steps(), probes in proptest::collection::vec(0..1u64 << 30, 8)) {
        let memory = memory();
        let early = follow(&memory);
        let mut model: Vec<Arc<RamBlock>> = Vec::new();
        let mut version = 0;
        for step in &steps {
            match step {
                Step::Add(name, used, more) => {
                    let taken = model.iter().any(|block| block.name() == name.to_string());
                    let added = memory.ram().add(spec(&name.to_string(), used * PAGE, (used + more) * PAGE));
                    assert_eq!(matches!(added, Err(Error::DuplicateName(_))), taken);
                    if let Ok(block) = added {
                        assert!(block.ram_offset().is_multiple_of(64 * PAGE));
                        let end = block.ram_offset() + block.max_size_bytes();
                        assert!(model.iter().all(|other| {
                            other.ram_offset() >= end
                                || other.ram_offset() + other.max_size_bytes() <= block.ram_offset()
                        }));
                        model.push(block);
                        version += 1;
                    }
                }
                Step::Remove(at) if !model.is_empty() => {
                    let block = model.swap_remove(at % model.len());
                    remove(&memory, &block);
                    version += 1;
                }
                Step::Grow(at, pages) if !model.is_empty() => {
                    let block = &model[at % model.len()];
                    let (before, bytes) = (block.size_bytes(), pages * PAGE);
                    let allowed = (before..=block.max_size_bytes()).contains(&bytes);
                    assert_eq!(memory.ram().grow(block, bytes).is_ok(), allowed);
                    assert_eq!(block.size_bytes(), if allowed { bytes } else { before });
                    version += u64::from(allowed && bytes != before);
                }
                Step::Remove(_) | Step::Grow(..) => {}
            }
            assert_eq!(memory.ram().version(), version);
        }
        check(&memory, &model, &probes);
        let late = follow(&memory);
        let wanted = sizes_of(&memory);
        assert_eq!(*early.lock().unwrap(), wanted);
        assert_eq!(*late.lock().unwrap(), wanted);
    }
}
