// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the host does not provide: an error for whoever copies, the end for whoever follows
//! a wild pointer.
#![cfg(all(not(loom), target_arch = "x86_64"))]

use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_memory::{
    Access, AccessError, AddressSpace, Backing, CachedMap, Error, Gpa, Memory, MemoryConfig,
    PinList, RamBlock, RamSpec, Region,
};

const SIZE: u64 = 1 << 20;
/// What is left of the file.
const CUT: u64 = 64 << 10;

struct World {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    block: Arc<RamBlock>,
    dir: tempfile::TempDir,
}

impl World {
    /// RAM at 0 behind a file.
    fn new(share: bool) -> World {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 4 << 30,
        })
        .unwrap();
        let spec = RamSpec {
            name: "file".into(),
            size_bytes: SIZE,
            max_size_bytes: 2 * SIZE,
            backing: Backing::File {
                path: dir.path().join("ram"),
                share,
                readonly: false,
            },
            prefault: false,
            block_size_bytes: None,
        };
        let block = memory.ram().add(spec).unwrap();
        let root = Region::container("root", 1 << 40);
        let space = memory.address_space("memory", &root).unwrap();
        memory
            .update(|t| t.add(&root, &Region::ram("ram", &block), 0, 0))
            .unwrap();
        World {
            memory,
            space,
            block,
            dir,
        }
    }

    fn cut(&self) {
        set_len(&self.dir.path().join("ram"), CUT);
    }

    fn extend(&self) {
        set_len(&self.dir.path().join("ram"), 2 * SIZE);
    }
}

fn set_len(path: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

fn fault(gpa: u64, len: u64) -> AccessError {
    AccessError::HostFault { gpa: Gpa(gpa), len }
}

#[test]
fn a_file_cut_short_under_the_guest_is_an_error_of_each_access() {
    for share in [true, false] {
        let world = World::new(share);
        let reader = world.memory.register();
        let pin = world
            .space
            .read(&reader)
            .pin(Gpa(CUT - 16), 256, Access::ReadWrite)
            .unwrap();
        let mut list = PinList::new();
        let ranges = [(Gpa(0), 8), (Gpa(CUT - 8), 128)];
        let access = Access::ReadWrite;
        let pinned = world
            .space
            .read(&reader)
            .pin_list(&ranges, access, &mut list);
        pinned.unwrap();
        let ring = CachedMap::new(&world.space, Gpa(CUT), 4096, Access::ReadWrite);
        world.cut();
        {
            let guard = world.space.read(&reader);
            let mut bytes = vec![0x77; 8192];
            assert_eq!(
                guard.read_bytes(Gpa(CUT - 100), &mut bytes),
                Err(fault(CUT, 8092))
            );
            assert_eq!(bytes[..100], [0; 100]);
            assert_eq!(bytes[100..], [0x77; 8092]);
            assert_eq!(
                guard.write_bytes(Gpa(CUT - 100), &bytes),
                Err(fault(CUT, 8092))
            );
            assert_eq!(guard.read::<u8>(Gpa(CUT)), Err(fault(CUT, 1)));
            assert_eq!(guard.read::<u64>(Gpa(CUT + 3)), Err(fault(CUT + 3, 8)));
            assert_eq!(guard.write(Gpa(CUT + 8), 5u32), Err(fault(CUT + 8, 4)));
            let slice = ring.get(&guard).unwrap();
            assert_eq!(slice.load_u16(2, Ordering::Acquire), Err(fault(CUT + 2, 2)));
            assert_eq!(
                slice.store_u16(2, 1, Ordering::Release),
                Err(fault(CUT + 2, 2))
            );
            assert_eq!(
                slice.store_u32(4, 1, Ordering::SeqCst),
                Err(fault(CUT + 4, 4))
            );
            assert_eq!(slice.read::<[u8; 16]>(16), Err(fault(CUT + 16, 16)));
            assert_eq!(slice.copy_from(0, &bytes[..200]), Err(fault(CUT, 200)));
        }
        assert_eq!(pin.write_at(8, &[1; 100]), Err(fault(CUT, 92)));
        assert_eq!(pin.read_at(0, &mut [0; 256]), Err(fault(CUT, 240)));
        assert_eq!(list.copy_to(4, &mut [0; 100]), Err(fault(16, 88)));
        assert_eq!(list.copy_from(4, &[9; 100]), Err(fault(16, 88)));
        assert_eq!(world.space.load(&reader, CUT, 4), 0xffff_ffff);
        world.space.store(&reader, CUT, 4, 7);
        // The host's own look at it is an error, too.
        let error = world.memory.ram().grow(&world.block, 2 * SIZE).unwrap_err();
        assert!(
            matches!(error, Error::BackingTooShort { bytes: CUT, needed, .. } if needed == 2 * SIZE),
            "{error}"
        );
        assert_eq!(world.block.size_bytes(), SIZE);
        // What is there again can be used again.
        world.extend();
        assert_eq!(world.space.read(&reader).write(Gpa(CUT), 0x1234u32), Ok(()));
        assert_eq!(world.space.load(&reader, CUT, 4), 0x1234);
        world.memory.ram().grow(&world.block, 2 * SIZE).unwrap();
    }
}

#[test]
fn faults_come_from_many_threads_at_once() {
    let world = World::new(true);
    world.cut();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let world = &world;
            scope.spawn(move || {
                let reader = world.memory.register();
                for round in 0..2000u64 {
                    let at = CUT - 8 + (round % 4) * 8;
                    let guard = world.space.read(&reader);
                    let there = at < CUT;
                    assert_eq!(guard.write(Gpa(at), thread).is_ok(), there);
                    assert_eq!(guard.read::<u64>(Gpa(at)).is_ok(), there);
                }
            });
        }
    });
}

#[test]
fn a_file_is_cut_and_extended_under_those_who_use_it() {
    let world = World::new(true);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (world, stop) = (&world, &stop);
        let users: Vec<_> = (0..2u64)
            .map(|user| {
                scope.spawn(move || {
                    let reader = world.memory.register();
                    let (mut there, mut missing) = (0u64, 0u64);
                    let mut bytes = vec![0; 64 << 10];
                    while !stop.load(Ordering::Relaxed) || there == 0 || missing == 0 {
                        let guard = world.space.read(&reader);
                        let written = guard.write(Gpa(2 * CUT), user);
                        let read = guard.read_bytes(Gpa(CUT / 2), &mut bytes);
                        drop(guard);
                        let expected = |result: Result<(), AccessError>| match result {
                            Ok(()) => true,
                            Err(AccessError::HostFault { gpa, .. }) => {
                                assert!(gpa >= Gpa(CUT));
                                false
                            }
                            Err(error) => panic!("{error}"),
                        };
                        for result in [written, read] {
                            *(if expected(result) {
                                &mut there
                            } else {
                                &mut missing
                            }) += 1;
                        }
                    }
                })
            })
            .collect();
        for _ in 0..300 {
            world.cut();
            std::thread::yield_now();
            world.extend();
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        // Whoever has not yet seen both sees them now.
        while users.iter().any(|user| !user.is_finished()) {
            world.cut();
            std::thread::yield_now();
            world.extend();
            std::thread::yield_now();
        }
    });
}

/// Freed RAM is inaccessible: who kept a pointer gets nothing, and the next block lies elsewhere.
#[test]
fn addresses_of_freed_ram_are_dead_and_not_used_again() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 4 << 30,
    })
    .unwrap();
    let mut seen: Vec<(u64, u64)> = Vec::new();
    for round in 0..20u64 {
        let bytes = (1 + round % 3) << 20;
        let spec = RamSpec {
            name: "ram".into(),
            size_bytes: bytes,
            max_size_bytes: bytes,
            backing: Backing::Anon { thp: false },
            prefault: true,
            block_size_bytes: None,
        };
        let block = memory.ram().add(spec).unwrap();
        let start = block.host().as_ptr() as u64;
        assert!(
            seen.iter()
                .all(|(from, to)| start >= *to || start + bytes <= *from)
        );
        seen.push((start, start + bytes));
        let mut ticket = Some(memory.update(|t| t.retire(&block)).unwrap());
        while let Some(still) = ticket.take() {
            ticket = still.destroy().err().map(|(ticket, _)| ticket);
        }
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for (from, to) in seen {
        let inside = maps.lines().filter(|line| {
            let (range, _) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            number(start) < to && number(end) > from
        });
        inside.for_each(|line| assert!(line.contains("---p"), "{line}"));
    }
}

/// Runs one of the tests below in a process of its own.
fn child(name: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("EBBTIDE_FAULT_CHILD", "1")
        .output()
        .unwrap()
}

fn is_child() -> bool {
    std::env::var_os("EBBTIDE_FAULT_CHILD").is_some()
}

fn wild_write() {
    // SAFETY: none: it is to end the process.
    unsafe { std::ptr::without_provenance_mut::<u8>(64).write_volatile(1) };
}

#[test]
fn child_follows_a_wild_pointer() {
    if is_child() {
        let _memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        wild_write();
    }
}

#[test]
fn a_wild_pointer_still_ends_the_process() {
    let output = child("child_follows_a_wild_pointer");
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
}

extern "C" fn before(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel's siginfo of a fault, and calls that may be made in a signal's receiver.
    unsafe {
        let expected = (*info).si_addr() as usize == 64;
        libc::_exit(if expected { 42 } else { 43 });
    }
}

#[test]
fn child_was_there_before() {
    if !is_child() {
        return;
    }
    // SAFETY: registers a receiver of the kind its flags say.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = before as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()),
            0
        );
    }
    let world = World::new(true);
    world.cut();
    let reader = world.memory.register();
    assert!(world.space.read(&reader).read::<u8>(Gpa(CUT)).is_err());
    wild_write();
}

#[test]
fn who_received_the_signal_before_gets_what_is_not_ours() {
    let output = child("child_was_there_before");
    assert_eq!(output.status.code(), Some(42), "{output:?}");
}

#[test]
fn child_is_sent_the_signal() {
    if !is_child() {
        return;
    }
    // std's own receiver would let it pass.
    // SAFETY: sets the default action.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    let _memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    // SAFETY: sends a signal to this process.
    unsafe { libc::raise(libc::SIGBUS) };
}

#[test]
fn a_signal_that_was_sent_is_no_fault() {
    let output = child("child_is_sent_the_signal");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
}
