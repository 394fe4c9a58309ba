// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What cannot be is refused with an error that says what it is, and nothing has changed then:
//! neither the tree, nor the flat views, nor the list of blocks.
#![cfg(not(loom))]

mod setup;

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ebbtide_memory::{Backing, Error, Ioeventfd, RamSpec, Region, Transaction};
use setup::{Map, Scratch};

const MIB: u64 = 1 << 20;

/// Everything that is known of a memory.
fn dump(map: &Map) -> String {
    let memory = &map.memory;
    let blocks = memory.ram().snapshot();
    let each: String = blocks.iter().map(|block| block.dump()).collect();
    let version = memory.ram().version();
    let dump = memory.ram().dump();
    format!(
        "{}{}{dump}{each}{version}",
        memory.mtree(false),
        memory.mtree(true)
    )
}

/// Tries each, and looks that nothing has changed.
struct Refusals<'a>(&'a Map);

impl Refusals<'_> {
    fn refused<T>(
        &self,
        what: &str,
        wanted: fn(&Error) -> bool,
        f: impl FnOnce() -> Result<T, Error>,
    ) {
        let before = dump(self.0);
        let Err(error) = f() else {
            panic!("{what} is taken");
        };
        assert!(wanted(&error), "{what}: {error:?}");
        assert_eq!(dump(self.0), before, "{what}: {error}");
    }

    fn change<T>(
        &self,
        what: &str,
        wanted: fn(&Error) -> bool,
        f: impl FnOnce(&mut Transaction<'_>) -> Result<T, Error>,
    ) {
        self.refused(what, wanted, || self.0.memory.update(f));
    }
}

fn spec(name: &str, size_bytes: u64, backing: Backing) -> RamSpec {
    RamSpec {
        name: name.into(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault: false,
        block_size_bytes: None,
    }
}

fn registers(name: &str, bytes: u64) -> Arc<Region> {
    Region::mmio(name, bytes, Scratch::new(16))
}

#[test]
fn what_cannot_be_placed_or_moved_changes_nothing() {
    let map = Map::new();
    let (ram, bar) = (
        map.ram("ram", MIB),
        registers("bar", 0x1000).growing_to(0x4000),
    );
    map.add(&ram, 0);
    map.add(&bar, 1 << 40);
    let (root, other) = (&map.root, map.ram("other", MIB));
    let refuse = Refusals(&map);
    refuse.change(
        "RAM over RAM at one priority",
        |e| matches!(e, Error::Overlap { .. }),
        |t| t.add(root, &other, MIB - 0x1000, 0),
    );
    refuse.change(
        "an alias of RAM over RAM",
        |e| matches!(e, Error::Overlap { .. }),
        |t| t.add(root, &Region::alias("part", &other, 0, 0x1000), 0, 0),
    );
    refuse.change(
        "RAM not at a page",
        |e| matches!(e, Error::BadPlacement { .. }),
        |t| t.add(root, &other, 2 * MIB + 1, 0),
    );
    refuse.change(
        "RAM moved off its page",
        |e| matches!(e, Error::BadPlacement { .. }),
        |t| t.set_offset(&ram, 0x800),
    );
    refuse.change(
        "an end past 2^64",
        |e| matches!(e, Error::BadPlacement { .. }),
        |t| t.add(root, &other, u64::MAX - 0xfff, 0),
    );
    refuse.change(
        "a move past 2^64",
        |e| matches!(e, Error::BadPlacement { .. }),
        |t| t.set_offset(&bar, u64::MAX),
    );
    refuse.change(
        "a region of more than 2^64 bytes",
        |e| matches!(e, Error::BadSize { .. }),
        |t| t.add(root, &Region::container("huge", u128::MAX), 0, 0),
    );
    refuse.change(
        "an alias of what lies past 2^64",
        |e| matches!(e, Error::BadSize { .. }),
        |t| t.add(root, &Region::alias("past", &ram, u64::MAX, 2), 2 * MIB, 0),
    );
    for nothing in [
        Region::container("nothing", 0),
        Region::reservation("nothing", 0),
        Region::alias("nothing", &ram, 0, 0),
        registers("nothing", 0),
    ] {
        refuse.change(
            "a region of no bytes",
            |e| matches!(e, Error::BadSize { .. }),
            |t| t.add(root, &nothing, 2 * MIB, 0),
        );
    }
    refuse.change(
        "a region grown past its maximum",
        |e| matches!(e, Error::PastMaximum { .. }),
        |t| t.resize(&bar, 0x4001),
    );
    refuse.change(
        "a region shrunk to nothing",
        |e| matches!(e, Error::BadSize { .. }),
        |t| t.resize(&bar, 0),
    );
    let alias = Region::alias("alias", root, 0, 0x1000);
    let twice = Region::alias("twice", &alias, 0, 0x1000);
    for region in [root, &alias, &twice] {
        refuse.change(
            "a circle",
            |e| matches!(e, Error::Cycle(_) | Error::HasParent(_)),
            |t| {
                let inner = Region::container("inner", 0x1000);
                t.add(root, &inner, 1 << 41, 0)?;
                t.add(&inner, region, 0, 0)
            },
        );
    }
    // What was tried can still be had.
    map.add(&other, MIB);
}

#[test]
fn what_is_not_there_cannot_be_removed() {
    let map = Map::new();
    let (ram, bar, absent) = (
        map.ram("ram", MIB),
        registers("bar", 16),
        registers("absent", 16),
    );
    map.add(&ram, 0);
    map.add(&bar, 1 << 40);
    let refuse = Refusals(&map);
    let no_parent = |e: &Error| matches!(e, Error::NoParent(name) if name == "absent");
    refuse.change("a region", no_parent, |t| t.remove(&absent));
    refuse.change("its place", no_parent, |t| t.set_offset(&absent, 0));
    refuse.change("its priority", no_parent, |t| t.set_priority(&absent, 1));
    let twice = |t: &mut Transaction<'_>| {
        t.remove(&bar)?;
        t.remove(&bar)
    };
    refuse.change("a region twice", |e| matches!(e, Error::NoParent(_)), twice);
    refuse.change(
        "RAM that is none",
        |e| matches!(e, Error::WrongKind { .. }),
        |t| t.unplug(&bar).map(drop),
    );
    let fd = Arc::new(fs::File::open("/dev/null").unwrap().into());
    let ioeventfd = Ioeventfd {
        offset: 0,
        size: 4,
        datamatch: None,
        fd,
    };
    refuse.change(
        "an ioeventfd",
        |e| matches!(e, Error::NoIoeventfd { .. }),
        |t| t.remove_ioeventfd(&bar, &ioeventfd),
    );
    refuse.change(
        "a coalesced range",
        |e| matches!(e, Error::NoCoalesced { .. }),
        |t| t.remove_coalesced(&bar, &(0..8)),
    );
    let other = Map::new();
    let foreign = other.ram("foreign", MIB);
    refuse.change(
        "the RAM of another memory",
        |e| matches!(e, Error::Foreign(_)),
        |t| t.retire(foreign.ram_block().unwrap()).map(drop),
    );
    // Its regions neither.
    let theirs = registers("theirs", 16);
    other.add(&foreign, 0);
    other.add(&theirs, 1 << 40);
    other.change(|t| t.add_ioeventfd(&theirs, ioeventfd.clone()));
    other.change(|t| t.add_coalesced(&theirs, 8..16));
    let before = dump(&other);
    type Step = fn(&mut Transaction<'_>, &Arc<Region>) -> Result<(), Error>;
    let steps: [(&str, Step); 4] = [
        ("remove", |t, region| t.remove(region)),
        ("set_offset", |t, region| t.set_offset(region, 1 << 30)),
        ("set_priority", |t, region| t.set_priority(region, 1)),
        ("remove_coalesced", |t, region| {
            t.remove_coalesced(region, &(8..16))
        }),
    ];
    for (what, step) in steps {
        refuse.change(
            what,
            |e| matches!(e, Error::Foreign(_)),
            |t| step(t, &theirs),
        );
    }
    refuse.change(
        "an ioeventfd of another memory",
        |e| matches!(e, Error::Foreign(_)),
        |t| t.remove_ioeventfd(&theirs, &ioeventfd),
    );
    refuse.change(
        "the unplug of another memory's RAM",
        |e| matches!(e, Error::Foreign(_)),
        |t| t.unplug(&foreign).map(drop),
    );
    assert_eq!(dump(&other), before);
}

/// Who adds memory must not wait for somebody to write into a pipe, for ever.
#[test]
fn a_pipe_named_by_mistake_is_refused_at_once() {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let map = Map::new();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let name = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a path with its end.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for readonly in [true, false] {
            let (path, share) = (path.clone(), true);
            let backing = Backing::File {
                path,
                share,
                readonly,
            };
            let refused = map.memory.ram().add(spec("pipe", MIB, backing));
            tell.send(refused.map(drop).unwrap_err().to_string())
                .unwrap();
        }
    });
    for _ in 0..2 {
        let refused = told.recv_timeout(Duration::from_secs(60));
        let refused = refused.expect("it waits for a writer");
        assert!(refused.contains("pipe"), "{refused}");
    }
}

#[test]
fn memory_that_the_host_does_not_have_changes_nothing() {
    let map = Map::new();
    map.add(&map.ram("ram", MIB), 0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, [1; 5000]).unwrap();
    let backed = |share, readonly| Backing::File {
        path: path.clone(),
        share,
        readonly,
    };
    let refuse = Refusals(&map);
    let add = |spec| map.memory.ram().add(spec);
    refuse.refused(
        "a file too short",
        |e| matches!(e, Error::BackingTooShort { bytes: 5000, .. }),
        || add(spec("short", MIB, backed(true, false))),
    );
    refuse.refused(
        "a file that cannot be written to",
        |e| matches!(e, Error::BackingUnwritable { .. }),
        || {
            let path = dir.path().to_owned();
            let (share, readonly) = (true, false);
            add(spec(
                "folder",
                MIB,
                Backing::File {
                    path,
                    share,
                    readonly,
                },
            ))
        },
    );
    refuse.refused(
        "huge pages that no host has",
        |e| matches!(e, Error::NoHugePages { .. }),
        || {
            let page_size_bytes = 8 * MIB;
            add(spec("odd", 8 * MIB, Backing::Hugetlb { page_size_bytes }))
        },
    );
    refuse.refused(
        "no bytes",
        |e| matches!(e, Error::BadSpec { .. }),
        || add(spec("none", 0, Backing::Anon { thp: false })),
    );
    refuse.refused(
        "a name that is taken",
        |e| matches!(e, Error::DuplicateName(_)),
        || add(spec("ram", MIB, Backing::Anon { thp: false })),
    );
    refuse.refused(
        "more than the reservation has",
        |e| matches!(e, Error::ArenaFull { .. } | Error::NoHostMemory { .. }),
        || add(spec("large", 1 << 45, Backing::Anon { thp: false })),
    );
    // A file that is cut short later.
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4 * MIB)
        .unwrap();
    let mut growing = spec("growing", MIB, backed(true, false));
    growing.max_size_bytes = 4 * MIB;
    let block = add(growing).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(MIB)
        .unwrap();
    let grow = |bytes| map.memory.ram().grow(&block, bytes);
    refuse.refused(
        "what was cut off",
        |e| matches!(e, Error::BackingTooShort { .. }),
        || grow(2 * MIB),
    );
    refuse.refused(
        "more than the maximum",
        |e| matches!(e, Error::BadResize { .. }),
        || grow(4 * MIB + 4096),
    );
    refuse.refused(
        "less than there is",
        |e| matches!(e, Error::BadResize { .. }),
        || grow(4096),
    );
}
