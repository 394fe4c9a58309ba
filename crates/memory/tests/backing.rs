// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where RAM comes from, what the host is told about it, and what it cannot give.
#![cfg(not(loom))]

mod setup;

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use ebbtide_memory::{
    AccessError, Backing, Error, Gpa, HostMemory, Memory, NumaPolicy, RamBlock, RamPolicy, RamSpec,
    Region,
};
use setup::{memory, spec};

const MIB: u64 = 1 << 20;
const ARENA: u64 = 8 << 40;

fn file(path: &Path, share: bool, readonly: bool) -> Backing {
    Backing::File {
        path: path.to_owned(),
        share,
        readonly,
    }
}

/// One field of the block's first mapping in smaps.
fn smaps(block: &RamBlock, field: &str) -> String {
    let start = format!("{:x}-", block.host().as_ptr() as u64);
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    let line = lines.find(|line| line.starts_with(field)).unwrap();
    line[field.len()..].trim().to_owned()
}

/// The block's line in numa_maps.
fn numa_maps(block: &RamBlock) -> String {
    let start = format!("{:x} ", block.host().as_ptr() as u64);
    let text = fs::read_to_string("/proc/self/numa_maps").unwrap();
    let line = text.lines().find(|line| line.starts_with(&start));
    line.unwrap().to_owned()
}

fn gone(memory: &Memory, block: Arc<RamBlock>) {
    let mut ticket = Some(memory.update(|t| t.retire(&block)).unwrap());
    while let Some(still) = ticket.take() {
        ticket = still.destroy().err().map(|(ticket, _)| ticket);
    }
}

/// A refusal leaves no block, no version, no room taken.
fn refused(memory: &Memory, spec: RamSpec, policy: &RamPolicy) -> Error {
    let state = || {
        (
            memory.ram().version(),
            memory.ram().dump(),
            memory.mtree(true),
        )
    };
    let before = state();
    let error = memory.ram().add_with(spec, policy).unwrap_err();
    assert_eq!(state(), before, "{error}");
    error
}

#[test]
fn files_are_made_when_missing_or_empty_and_never_touched_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let memory = memory(ARENA);
    let (missing, empty) = (dir.path().join("missing"), dir.path().join("empty"));
    fs::write(&empty, []).unwrap();
    for (name, path) in [("missing", &missing), ("empty", &empty)] {
        let mut spec = spec(name, MIB, file(path, true, false));
        spec.max_size_bytes = 3 * MIB;
        let block = memory.ram().add(spec).unwrap();
        assert_eq!(fs::metadata(path).unwrap().len(), 3 * MIB);
        memory.ram().grow(&block, 2 * MIB).unwrap();
        gone(&memory, block);
        assert_eq!(fs::metadata(path).unwrap().len(), 3 * MIB);
    }
    let longer = dir.path().join("longer");
    fs::write(&longer, vec![7; 3 * MIB as usize]).unwrap();
    let block = memory
        .ram()
        .add(spec("longer", MIB, file(&longer, true, false)));
    gone(&memory, block.unwrap());
    assert_eq!(fs::read(&longer).unwrap(), vec![7; 3 * MIB as usize]);
}

#[test]
fn a_file_too_short_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("short");
    fs::write(&path, [5; 5000]).unwrap();
    let memory = memory(ARENA);
    for (share, readonly) in [(true, false), (false, false), (true, true), (false, true)] {
        let spec = spec("short", MIB, file(&path, share, readonly));
        let error = refused(&memory, spec, &RamPolicy::default());
        assert!(
            matches!(&error, Error::BackingTooShort { path: p, bytes: 5000, needed: MIB, .. } if *p == path),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .ends_with("short has 5000 bytes, 1048576 are needed")
        );
    }
    assert_eq!(fs::read(&path).unwrap(), [5; 5000]);
}

#[test]
fn a_file_that_no_longer_provides_its_memory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let memory = memory(ARENA);
    let anon = memory.ram().add(spec("anon", MIB, setup::ANON)).unwrap();
    anon.check_provided().unwrap();

    let path = dir.path().join("cut");
    let cut = spec("cut", MIB, file(&path, true, false));
    let cut = memory.ram().add(cut).unwrap();
    cut.check_provided().unwrap();
    let cut_short = fs::File::options().write(true).open(&path).unwrap();
    cut_short.set_len(5000).unwrap();
    let error = cut.check_provided().unwrap_err();
    assert!(
        matches!(&error, Error::BackingTooShort { path: p, bytes: 5000, needed: MIB, .. } if *p == path),
        "{error}"
    );

    // All of it holes, and more than a filesystem for temporary files has room for.
    const VAST: u64 = 4 << 40;
    let path = dir.path().join("vast");
    let vast = spec("vast", VAST, file(&path, true, false));
    let error = refused(&memory, vast, &RamPolicy::default());
    assert!(
        matches!(&error, Error::BackingWithoutRoom { path: p, missing: VAST, .. } if *p == path),
        "{error}"
    );
    assert!(error.to_string().contains("is full"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_file_made_for_a_block_that_came_to_nothing_goes_again() {
    let dir = tempfile::tempdir().unwrap();
    let (missing, empty) = (dir.path().join("missing"), dir.path().join("empty"));
    fs::write(&empty, []).unwrap();
    let memory = memory(ARENA);
    // Not a number of pages; and no such node.
    let nowhere = RamPolicy {
        numa: Some(NumaPolicy::Preferred(1000)),
        ..RamPolicy::default()
    };
    for path in [&missing, &empty] {
        refused(
            &memory,
            spec("odd", 5000, file(path, true, false)),
            &RamPolicy::default(),
        );
        refused(
            &memory,
            spec("node", MIB, file(path, true, false)),
            &nowhere,
        );
        // More than the arena has.
        refused(
            &memory,
            spec("large", 1 << 50, file(path, true, false)),
            &RamPolicy::default(),
        );
        // Made, mapped, and then the host lacks the memory.
        let host = HostMemory::read().total_bytes.next_multiple_of(1 << 30);
        let mut all = spec("all", host, file(path, false, false));
        all.prefault = true;
        let error = refused(&memory, all, &RamPolicy::default());
        assert!(matches!(error, Error::NoHostMemory { .. }), "{error}");
    }
    assert!(!missing.exists());
    assert_eq!(fs::metadata(&empty).unwrap().len(), 0);
}

/// A pipe is no memory, and opening one can take until somebody opens its other end.
#[test]
fn what_is_no_file_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a terminated string and a mode.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    for (share, readonly) in [(true, true), (false, true), (true, false), (false, false)] {
        let (said, says) = mpsc::channel();
        let backing = file(&path, share, readonly);
        thread::spawn(move || {
            let memory = memory(ARENA);
            let error = refused(&memory, spec("ram", MIB, backing), &RamPolicy::default());
            said.send(error).unwrap();
        });
        let error = says.recv_timeout(Duration::from_secs(60));
        let error = error.expect("it waits for the other end of the pipe");
        assert!(matches!(error, Error::Host { .. }), "{error}");
        assert!(error.to_string().contains("pipe"), "{error}");
    }
    // Another thing that is there and can be opened, but not mapped.
    let spec = spec("ram", MIB, file(Path::new("/dev/null"), true, false));
    let error = refused(&memory(ARENA), spec, &RamPolicy::default());
    assert!(error.to_string().contains("/dev/null"), "{error}");
}

#[test]
fn what_cannot_be_written_to_is_named() {
    let memory = memory(ARENA);
    let dir = tempfile::tempdir().unwrap();
    // Nobody may open a directory, or this file of the kernel's, for writing.
    for path in [
        dir.path().to_owned(),
        PathBuf::from("/sys/kernel/uevent_seqnum"),
    ] {
        let spec = spec("ram", MIB, file(&path, true, false));
        let error = refused(&memory, spec, &RamPolicy::default());
        assert!(
            matches!(&error, Error::BackingUnwritable { path: p, .. } if *p == path),
            "{error:?}"
        );
    }
    let absent = spec("ram", MIB, file(&dir.path().join("absent"), true, true));
    let error = refused(&memory, absent, &RamPolicy::default());
    assert!(matches!(error, Error::Host { .. }), "{error}");
    assert!(!dir.path().join("absent").exists());
}

#[test]
fn a_file_that_is_only_read_is_rom_when_shared_and_a_template_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, vec![0x42; MIB as usize]).unwrap();
    let memory = memory(ARENA);
    let root = Region::container("root", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let reader = memory.register();
    for (share, at) in [(true, 0), (false, 2 * MIB)] {
        let mut spec = spec(&format!("image-{share}"), MIB, file(&path, share, true));
        spec.prefault = true;
        let block = memory.ram().add(spec).unwrap();
        assert_eq!(block.is_readonly(), share);
        let region = Region::ram("image", &block);
        memory.update(|t| t.add(&root, &region, at, 0)).unwrap();
        let written = space.read(&reader).write(Gpa(at + 8), 1u8);
        let readonly = AccessError::ReadOnly {
            gpa: Gpa(at + 8),
            len: 1,
        };
        assert_eq!(written, if share { Err(readonly) } else { Ok(()) });
        space.store(&reader, at + 16, 1, 1);
        let shown = if share { 0x42 } else { 1 };
        assert_eq!(space.load(&reader, at + 16, 1), shown);
        assert!(
            block
                .dump()
                .contains(if share { "read-only" } else { "private" })
        );
    }
    let dump = memory.ram().dump();
    assert_eq!(
        dump.lines().filter(|line| line.ends_with(" ro")).count(),
        1,
        "{dump}"
    );
    assert_eq!(fs::read(&path).unwrap(), vec![0x42; MIB as usize]);
    let mut sparse = spec("sparse", MIB, file(&path, true, true));
    sparse.block_size_bytes = Some(1 << 16);
    let error = refused(&memory, sparse, &RamPolicy::default());
    assert!(matches!(error, Error::BadSpec { .. }), "{error}");
}

#[test]
fn sizes_that_cannot_be_are_refused_for_every_backing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    let memory = memory(ARENA);
    let backings = [
        Backing::Anon { thp: true },
        Backing::Memfd { thp: false },
        Backing::Hugetlb {
            page_size_bytes: 2 * MIB,
        },
        file(&path, true, false),
    ];
    for backing in backings {
        for (size, max) in [
            (0, 0),
            (2 * MIB, MIB),
            (100, 4 * MIB),
            (2 * MIB, 2 * MIB + 1),
            (u64::MAX, u64::MAX),
            (2 * MIB, u64::MAX - 4095),
            (1 << 63, 1 << 63),
            // Would end past 2^64 were it placed behind anything.
            (2 * MIB, u64::MAX - (2 * MIB - 1)),
        ] {
            let mut spec = spec("bad", size, backing.clone());
            spec.max_size_bytes = max;
            let error = refused(&memory, spec, &RamPolicy::default());
            assert!(
                matches!(error, Error::BadSpec { .. } | Error::NoHostMemory { .. }),
                "{backing:?} {size} {max}: {error}"
            );
        }
    }
    assert!(!path.exists());
}

#[test]
fn a_resize_stays_within_its_bounds() {
    let memory = memory(ARENA);
    let mut growing = spec("growing", MIB, Backing::Memfd { thp: false });
    growing.max_size_bytes = 4 * MIB;
    let block = memory.ram().add(growing).unwrap();
    let version = memory.ram().version();
    for bytes in [
        0,
        MIB - 4096,
        MIB + 1,
        4 * MIB + 4096,
        u64::MAX,
        u64::MAX - 4095,
    ] {
        let error = memory.ram().grow(&block, bytes).unwrap_err();
        assert!(
            matches!(error, Error::BadResize { used: MIB, max, bytes: b, .. } if max == 4 * MIB && b == bytes),
            "{error}"
        );
    }
    assert_eq!((block.size_bytes(), memory.ram().version()), (MIB, version));
    memory.ram().grow(&block, 4 * MIB).unwrap();
    let stranger = self::memory(ARENA);
    let error = stranger.ram().grow(&block, 4 * MIB).unwrap_err();
    assert!(matches!(error, Error::Foreign(_)), "{error}");
}

#[test]
fn huge_pages_are_used_or_their_lack_is_told() {
    let memory = memory(ARENA);
    // No machine has pages of this size.
    let odd = Backing::Hugetlb {
        page_size_bytes: 8 * MIB,
    };
    let error = refused(&memory, spec("odd", 8 * MIB, odd), &RamPolicy::default());
    assert!(matches!(error, Error::NoHugePages { .. }), "{error}");
    assert!(
        error.to_string().contains("no pool of 8192 KiB pages"),
        "{error}"
    );
    // A pool of that many pages neither.
    let backing = Backing::Hugetlb {
        page_size_bytes: 2 * MIB,
    };
    let error = refused(
        &memory,
        spec("all", 60 << 30, backing.clone()),
        &RamPolicy::default(),
    );
    assert!(
        matches!(error, Error::NoHugePages { bytes, .. } if bytes == 60 << 30),
        "{error}"
    );
    // Refusals use no address space up: these together have more than there is.
    for _ in 0..200 {
        let spec = spec("all", 60 << 30, backing.clone());
        let error = memory.ram().add(spec).unwrap_err();
        assert!(matches!(error, Error::NoHugePages { .. }), "{error}");
    }
    let mut some = spec("some", 4 * MIB, backing);
    some.prefault = true;
    match memory.ram().add(some) {
        Ok(block) => {
            assert_eq!(block.page_size_bytes(), 2 * MIB);
            assert_eq!(smaps(&block, "KernelPageSize:"), "2048 kB");
        }
        Err(error) => {
            assert!(matches!(error, Error::NoHugePages { .. }), "{error}");
            assert!(error.to_string().contains("2048 KiB pages"), "{error}");
        }
    }
}

#[test]
fn prefaulted_memory_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let memory = memory(ARENA);
    for (name, backing, bytes) in [
        ("anon", Backing::Anon { thp: true }, 192 * MIB),
        ("memfd", Backing::Memfd { thp: false }, 132 * MIB),
        ("file", file(&dir.path().join("ram"), true, false), 8 * MIB),
    ] {
        for prefault_threads in [0, 1, 3] {
            let mut spec = spec(name, bytes, backing.clone());
            spec.prefault = true;
            let policy = RamPolicy {
                prefault_threads,
                ..RamPolicy::default()
            };
            let block = memory.ram().add_with(spec, &policy).unwrap();
            assert_eq!(
                smaps(&block, "Rss:"),
                format!("{} kB", bytes / 1024),
                "{name}"
            );
            gone(&memory, block);
        }
    }
}

#[test]
fn the_host_is_told_of_merge_and_dump() {
    let memory = memory(ARENA);
    let policy = RamPolicy {
        merge: true,
        dump: false,
        ..RamPolicy::default()
    };
    let flags = |block: &RamBlock| {
        let flags = smaps(block, "VmFlags:");
        let has = |flag: &str| flags.split(' ').any(|f| f == flag);
        (has("mg"), has("dd"))
    };
    let mut growing = spec("growing", 2 * MIB, Backing::Anon { thp: true });
    growing.max_size_bytes = 8 * MIB;
    let block = memory.ram().add_with(growing, &policy).unwrap();
    assert_eq!(flags(&block), (true, true));
    memory.ram().grow(&block, 8 * MIB).unwrap();
    assert_eq!(smaps(&block, "Size:"), "8192 kB", "the grown part differs");
    let mut sparse = spec("sparse", 8 * MIB, Backing::Anon { thp: false });
    sparse.block_size_bytes = Some(2 * MIB);
    let block = memory.ram().add_with(sparse, &policy).unwrap();
    block.plug(0..2 * MIB, true).unwrap();
    assert_eq!(flags(&block), (true, true));
    let plain = memory
        .ram()
        .add(spec("plain", MIB, Backing::Anon { thp: true }))
        .unwrap();
    assert_eq!(flags(&plain), (false, false));
    assert!(plain.dump().contains("merge off, dump on"));
    let shared = spec("shared", MIB, Backing::Memfd { thp: false });
    let error = refused(&memory, shared, &policy);
    assert!(
        error.to_string().contains("merges private memory only"),
        "{error}"
    );
}

#[test]
fn numa_policies_reach_the_host() {
    let memory = memory(ARENA);
    let policy = |numa| RamPolicy {
        numa: Some(numa),
        ..RamPolicy::default()
    };
    let backings = [Backing::Anon { thp: false }, Backing::Memfd { thp: false }];
    for (at, backing) in backings.into_iter().enumerate() {
        for (numa, shown) in [
            (NumaPolicy::Bind(vec![0]), "bind:0"),
            (NumaPolicy::Preferred(0), "prefer:0"),
            (NumaPolicy::Interleave(vec![0]), "interleave:0"),
        ] {
            let mut spec = spec(&format!("{shown}-{at}"), 2 * MIB, backing.clone());
            spec.max_size_bytes = 4 * MIB;
            spec.prefault = true;
            let block = memory.ram().add_with(spec, &policy(numa.clone())).unwrap();
            memory.ram().grow(&block, 4 * MIB).unwrap();
            let line = numa_maps(&block);
            assert!(line.contains(shown), "{line}");
            assert_eq!(block.policy().numa, Some(numa));
            let shown = shown.replace("prefer:", "preferred ").replace(':', " ");
            assert!(block.dump().contains(&shown), "{}", block.dump());
        }
    }
    for numa in [NumaPolicy::Bind(vec![0, 700]), NumaPolicy::Preferred(700)] {
        let spec = spec("far", MIB, Backing::Anon { thp: false });
        let error = refused(&memory, spec, &policy(numa));
        assert!(matches!(error, Error::NoNode { node: 700, .. }), "{error}");
    }
    let nowhere = spec("nowhere", MIB, Backing::Anon { thp: false });
    let error = refused(&memory, nowhere, &policy(NumaPolicy::Bind(vec![])));
    assert!(matches!(error, Error::BadSpec { .. }), "{error}");
}
