// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kinds of regions, and what changes of the tree can and cannot do.
#![cfg(not(loom))]

mod setup;

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use ebbtide_memory::{
    Access, AccessError, BusMaster, Dma, Error, FlatCoalesced, FlatSection, Gpa, Iommu,
    IommuMapping, IommuNotifier, Listener, ListenerError, Mapping, Region, Registers, SectionKind,
    Transaction, Translation,
};
use setup::{Map, Scratch};

fn registers(size: u64) -> (Arc<Scratch>, Registers) {
    let scratch = Scratch::new(size as usize);
    (Arc::clone(&scratch), Registers::new(scratch))
}

#[test]
fn a_rom_device_is_read_directly_and_written_through_its_registers() {
    let map = Map::new();
    let block = map.block("flash", 0x2000);
    let (chip, ops) = registers(0x2000);
    let flash = Region::rom_device("flash", &block, ops);
    let window = Region::ram("window", &block);
    map.change(|t| {
        t.add(&map.root, &flash, 0x1000, 0)?;
        t.add(&map.root, &window, 0x1_0000, 0)
    });
    let reader = map.memory.register();
    map.space.store(&reader, 0x1_0010, 4, 0x1234_5678);
    assert_eq!(map.space.load(&reader, 0x1010, 4), 0x1234_5678);
    map.space.store(&reader, 0x1010, 4, 0xdead_beef);
    assert_eq!(chip.take_seen(), [(true, 0x10, 4, 0xdead_beef)]);
    assert_eq!(map.space.load(&reader, 0x1010, 4), 0x1234_5678);
    // A device's DMA as well, by value and mapped.
    let dma = Dma::new(&map.space, &ebbtide_gate::Gate::new("nic"));
    dma.write(&reader, Gpa(0x1020), &[1, 2]).unwrap();
    assert_eq!(chip.take_seen(), [(true, 0x20, 2, 0x201)]);
    let reading = dma
        .map(&reader, &[(Gpa(0x1000), 0x100)], Access::Read)
        .unwrap();
    assert!(matches!(reading, Mapping::Direct(_)), "{reading:?}");
    let writing = dma
        .map(&reader, &[(Gpa(0x1000), 2)], Access::Write)
        .unwrap();
    assert!(matches!(writing, Mapping::Bounce(_)), "{writing:?}");
    drop((reading, writing));
    assert!(map.memory.mtree(true).contains("(prio 0, romd): flash"));
    // Switched to commands, loads go to the registers, too; and back.
    map.change(|t| t.set_rom_direct(&flash, false));
    assert!(map.memory.mtree(true).contains("(prio 0, i/o): flash"));
    assert_eq!(map.space.load(&reader, 0x1010, 4), 0xdead_beef);
    assert_eq!(chip.take_seen(), [(false, 0x10, 4, 0xdead_beef)]);
    map.change(|t| t.set_rom_direct(&flash, true));
    assert_eq!(map.space.load(&reader, 0x1010, 4), 0x1234_5678);
    let error = map
        .memory
        .update(|t| t.set_rom_direct(&window, false))
        .unwrap_err();
    assert_eq!(error.to_string(), "region window is not a ROM device");
}

#[test]
fn listeners_see_a_rom_device_change_its_mode() {
    let map = Map::new();
    let (_, ops) = registers(0x1000);
    let flash = Region::rom_device("flash", &map.block("flash", 0x1000), ops);
    map.add(&flash, 0);
    let kind = || map.space.sections().unwrap()[0].kind.clone();
    assert!(matches!(kind(), SectionKind::Ram { readonly: true, .. }));
    let failed = map.memory.update(|t| -> Result<(), Error> {
        t.set_rom_direct(&flash, false)?;
        t.remove(&Region::container("nowhere", 1))
    });
    assert!(failed.is_err());
    assert!(matches!(kind(), SectionKind::Ram { readonly: true, .. }));
    map.change(|t| t.set_rom_direct(&flash, false));
    assert!(matches!(kind(), SectionKind::Mmio));
}

#[test]
fn ram_of_a_device_is_mapped_directly_and_may_lie_over_ram() {
    let map = Map::new();
    let bar = Region::ram_device("bar", &map.block("bar", 0x1000));
    map.add(&map.ram("ram", 0x10_0000), 0);
    map.add(&bar, 0x4000);
    let reader = map.memory.register();
    let dma = Dma::new(&map.space, &ebbtide_gate::Gate::new("nvme"));
    let mapping = dma
        .map(&reader, &[(Gpa(0x3ff0), 0x20)], Access::Write)
        .unwrap();
    assert!(matches!(mapping, Mapping::Direct(_)), "{mapping:?}");
    let sections = map.space.sections().unwrap();
    let devices: Vec<bool> = sections.iter().map(FlatSection::is_ram_device).collect();
    assert_eq!(devices, [false, true, false]);
    assert!(map.memory.mtree(true).contains("ramd): bar"));
}

#[test]
fn an_alias_shows_any_region_at_any_offset() {
    let map = Map::new();
    let bus = Region::container("bus", 0x1_0000);
    let (chip, ops) = registers(0x1000);
    let device = Region::registers("device", 0x1000, ops);
    // The window shows the middle of a window that shows the middle of a container.
    let outer = Region::alias("outer", &bus, 0x800, 0x4000);
    let inner = Region::alias("inner", &outer, 0x400, 0x1000);
    map.change(|t| {
        t.add(&bus, &device, 0x1000, 0)?;
        t.add(&map.root, &inner, 0x10_0000, 0)
    });
    let wanted = vec![(0x10_0400, 0x10_1000, "device".to_owned(), 0)];
    assert_eq!(map.flat(), wanted);
    let reader = map.memory.register();
    map.space.store(&reader, 0x10_0404, 4, 7);
    assert_eq!(chip.take_seen(), [(true, 4, 4, 7)]);
    // What moves behind both windows moves in front.
    map.change(|t| t.set_offset(&device, 0xe00));
    assert_eq!(map.flat(), [(0x10_0200, 0x10_1000, "device".to_owned(), 0)]);
    map.change(|t| t.resize(&outer, 0x1000));
    assert_eq!(map.flat(), [(0x10_0200, 0x10_0c00, "device".to_owned(), 0)]);
}

#[test]
fn priorities_change_and_nested_changes_are_taken_back_alone() {
    let map = Map::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| Region::registers(name, 0x1000, registers(1).1));
    map.change(|t| {
        t.add(&map.root, &a, 0, -1)?;
        t.add(&map.root, &b, 0, 0)
    });
    let front = || map.flat()[0].2.clone();
    assert_eq!(front(), "b");
    map.change(|t| t.set_priority(&a, 1));
    assert_eq!(front(), "a");
    map.change(|t| t.set_priority(&b, 1));
    assert_eq!(front(), "b");
    map.change(|t| {
        t.add(&map.root, &c, 0x2000, 0)?;
        let refused = t.nested(|t| {
            t.remove(&b)?;
            t.set_priority(&a, -5)?;
            t.nested(|t| t.set_offset(&c, 0x3000))?;
            t.remove(&b)
        });
        assert!(matches!(refused, Err(Error::NoParent(_))));
        t.nested(|t| t.set_offset(&a, 0x800))
    });
    let names = |flat: Vec<(u64, u64, String, u64)>| -> Vec<_> {
        flat.into_iter()
            .map(|(start, _, name, _)| (start, name))
            .collect()
    };
    let wanted = [(0, "b"), (0x1000, "a"), (0x2000, "c")].map(|(at, name)| (at, name.to_owned()));
    assert_eq!(names(map.flat()), wanted);
    assert!(map.memory.mtree(false).contains("(prio 1, i/o): a"));
    // A priority is taken back to the very place among its equals.
    let failed = map.memory.update(|t| -> Result<(), Error> {
        t.set_priority(&b, -3)?;
        t.remove(&Region::container("nowhere", 1))
    });
    assert!(failed.is_err());
    assert_eq!(names(map.flat()), wanted);
}

#[test]
fn a_nested_unplug_is_taken_back() {
    let map = Map::new();
    let ram = map.ram("ram", 0x1000);
    map.add(&ram, 0);
    map.change(|t| {
        let refused = t.nested(|t| {
            let ticket = t.unplug(&ram)?;
            t.remove(&ram)?;
            Ok(ticket)
        });
        assert!(refused.is_err());
        Ok(())
    });
    assert_eq!(map.flat(), [(0, 0x1000, "ram".to_owned(), 0)]);
    let ticket = map.change(|t| t.unplug(&ram));
    assert!(map.flat().is_empty());
    drop(ticket);
}

#[test]
fn a_function_sees_memory_only_while_it_is_bus_master() {
    let map = Map::new();
    map.add(&map.ram("ram", 0x10_0000), 0);
    let first = BusMaster::new(&map.memory, "nic", &map.root).unwrap();
    let second = BusMaster::new(&map.memory, "disk", &map.root).unwrap();
    let reader = map.memory.register();
    let dma = Dma::new(first.space(), &ebbtide_gate::Gate::new("nic"));
    let unmapped = Err(AccessError::Unmapped {
        gpa: Gpa(0x100),
        len: 1,
    });
    assert_eq!(dma.write(&reader, Gpa(0x100), &[1]), unmapped);
    first.set_enabled(true).unwrap();
    dma.write(&reader, Gpa(0x100), &[1]).unwrap();
    assert_eq!(map.space.load(&reader, 0x100, 1), 1);
    assert!(second.space().sections().unwrap().is_empty());
    // What is plugged later is seen at once; a pin outlives the switch.
    map.add(&map.ram("dimm", 0x1000), 0x20_0000);
    let pin = first
        .space()
        .read(&reader)
        .pin(Gpa(0x20_0000), 8, Access::Write)
        .unwrap();
    map.change(|t| first.set_enabled_in(t, false));
    assert_eq!(dma.write(&reader, Gpa(0x100), &[1]), unmapped);
    pin.write_at(0, &[9]).unwrap();
    assert_eq!(map.space.load(&reader, 0x20_0000, 1), 9);
}

/// What came (true) and went.
type Told = Arc<Mutex<Vec<(bool, Range<u64>)>>>;

/// Remembers coalesced ranges.
struct Coalesced(Told);

impl Listener for Coalesced {
    fn region_add(&mut self, _: &FlatSection) -> Result<(), ListenerError> {
        Ok(())
    }
    fn region_del(&mut self, _: &FlatSection) {}
    fn coalesced_add(&mut self, coalesced: &FlatCoalesced) -> Result<(), ListenerError> {
        self.0.lock().unwrap().push((true, coalesced.range.clone()));
        if coalesced.range.start == 0xbad010 {
            let (what, reason) = ("coalesced".to_owned(), "no room".to_owned());
            return Err(ListenerError { what, reason });
        }
        Ok(())
    }
    fn coalesced_del(&mut self, coalesced: &FlatCoalesced) {
        let told = (false, coalesced.range.clone());
        self.0.lock().unwrap().push(told);
    }
}

#[test]
fn coalesced_ranges_follow_their_region() {
    let map = Map::new();
    let vga = Region::registers("vga", 0x1000, registers(0x1000).1);
    let told = Arc::new(Mutex::new(Vec::new()));
    let listener = Box::new(Coalesced(Arc::clone(&told)));
    map.space.add_listener(listener, 0).unwrap();
    let take = || std::mem::take(&mut *told.lock().unwrap());
    map.change(|t| {
        t.add(&map.root, &vga, 0x1000, 0)?;
        t.add_coalesced(&vga, 0x10..0x20)?;
        t.add_coalesced(&vga, 0x800..0x1000)
    });
    assert_eq!(take(), [(true, 0x1010..0x1020), (true, 0x1800..0x2000)]);
    let text = map.memory.mtree(true);
    assert!(text.contains("  coalesced 0000000000001010-000000000000101f\n"));
    // Cut by what lies in front.
    let cover = Region::reservation("cover", 0x100);
    map.change(|t| t.add(&map.root, &cover, 0x1900, 1));
    let cut = [
        (false, 0x1800..0x2000),
        (true, 0x1800..0x1900),
        (true, 0x1a00..0x2000),
    ];
    assert_eq!(take(), cut);
    map.change(|t| t.remove(&cover));
    take();
    map.change(|t| t.remove_coalesced(&vga, &(0x800..0x1000)));
    assert_eq!(take(), [(false, 0x1800..0x2000)]);
    // A refusal leaves everything as it was, for the listener as well.
    let refused = map.memory.update(|t| t.set_offset(&vga, 0xbad000));
    assert!(matches!(refused, Err(Error::Listener { .. })));
    assert_eq!(
        take(),
        [
            (false, 0x1010..0x1020),
            (true, 0xbad010..0xbad020),
            (true, 0x1010..0x1020)
        ]
    );
    let error = |f: &dyn Fn(&mut Transaction<'_>) -> Result<(), Error>| {
        map.memory.update(|t| f(t)).unwrap_err().to_string()
    };
    assert_eq!(
        error(&|t| t.add_coalesced(&vga, 0x1f..0x21)),
        "region vga: writes at 0x1f are coalesced already"
    );
    assert!(error(&|t| t.add_coalesced(&vga, 0xfff..0x1001)).contains("not a part"));
    assert!(error(&|t| t.add_coalesced(&cover, 0..1)).contains("device registers"));
    assert_eq!(
        error(&|t| t.remove_coalesced(&vga, &(0..1))),
        "region vga: no coalesced range at 0x0"
    );
}

/// Bad input: each is refused by name, and nothing changes.
#[test]
fn impossible_changes_are_refused_and_change_nothing() {
    let map = Map::new();
    let ram = map.ram("ram", 0x4000);
    let bar = Region::registers("bar", 0x1000, registers(1).1).growing_to(0x4000);
    map.add(&ram, 0x1000);
    map.add(&bar, 0x10_0000);
    let before = map.memory.mtree(false);
    let root = &map.root;
    let error = |f: &dyn Fn(&mut Transaction<'_>) -> Result<(), Error>| {
        let error = map.memory.update(|t| f(t)).unwrap_err().to_string();
        assert_eq!(map.memory.mtree(false), before, "after: {error}");
        error
    };
    let other = map.ram("other", 0x1000);
    let part = Region::alias("part", &other, 0, 0x1000);
    let overlap = "RAM region other at 0x4000 overlaps RAM region ram, both at priority 0";
    assert_eq!(error(&|t| t.add(root, &other, 0x4000, 0)), overlap);
    assert!(error(&|t| t.add(root, &part, 0x4000, 0)).contains("RAM region part at 0x4000"));
    let late = |t: &mut Transaction<'_>| {
        t.add(root, &other, 0x5000, 0)?;
        t.set_offset(&other, 0x4000)
    };
    assert_eq!(error(&late), overlap);
    let later = |t: &mut Transaction<'_>| {
        t.add(root, &other, 0x4000, 1)?;
        t.set_priority(&other, 0)
    };
    assert_eq!(error(&later), overlap);
    let hidden = |t: &mut Transaction<'_>| {
        t.set_enabled(&other, false)?;
        t.add(root, &other, 0x4000, 0)?;
        t.set_enabled(&other, true)
    };
    assert_eq!(error(&hidden), overlap);
    assert!(error(&|t| t.add(root, &other, 0x8001, 0)).contains("a multiple of 4096"));
    assert!(error(&|t| t.set_offset(&ram, 0x1800)).contains("a multiple of 4096"));
    let size = |region: Arc<Region>| error(&|t| t.add(root, &region, 0x20_0000, 0));
    let nothing = "region nothing: 0x0 bytes: a region has at least one byte";
    assert_eq!(size(Region::reservation("nothing", 0)), nothing);
    let huge = "region huge: 0x10000000000000001 bytes: an address space ends at 2^64";
    assert_eq!(size(Region::container("huge", (1 << 64) + 1)), huge);
    let past = Region::alias("past", &ram, u64::MAX, 2);
    assert!(size(past).contains("the alias shows what lies past 2^64"));
    assert!(error(&|t| t.set_offset(&bar, u64::MAX)).contains("ends past 2^64"));
    let big = "region bar: 0x4001 bytes are more than its maximum of 0x4000";
    assert_eq!(error(&|t| t.resize(&bar, 0x4001)), big);
    assert!(error(&|t| t.resize(&bar, 0)).contains("at least one byte"));
    assert!(error(&|t| t.resize(&ram, 0x1000)).contains("is not of a size of its own"));
    assert_eq!(error(&|t| t.remove(&other)), "region other has no parent");
    assert_eq!(
        error(&|t| t.set_offset(&other, 0)),
        "region other has no parent"
    );
    assert_eq!(
        error(&|t| t.set_priority(&other, 0)),
        "region other has no parent"
    );
    // Circles: directly, by an alias, by an alias of an alias.
    let inner = Region::container("inner", 0x1000);
    let alias = Region::alias("alias", root, 0, 0x1000);
    let twice = Region::alias("twice", &alias, 0, 0x1000);
    for region in [&alias, &twice] {
        let circle = |t: &mut Transaction<'_>| {
            t.add(root, &inner, 0x30_0000, 0)?;
            t.add(&inner, region, 0, 0)
        };
        assert!(error(&circle).contains("would contain itself"));
    }
    let upwards = |t: &mut Transaction<'_>| {
        t.add(root, &inner, 0x30_0000, 0)?;
        t.add(&inner, root, 0, 0)
    };
    assert!(error(&upwards).contains("would contain itself"));
    // What is allowed still works.
    map.change(|t| t.resize(&bar, 0x4000));
    map.change(|t| t.add(root, &other, 0x4000, 1));
    let flat: Vec<_> = map
        .flat()
        .into_iter()
        .map(|(s, e, n, _)| (s, e, n))
        .collect();
    let wanted = [
        (0x1000, 0x4000, "ram"),
        (0x4000, 0x5000, "other"),
        (0x10_0000, 0x10_4000, "bar"),
    ];
    assert_eq!(flat, wanted.map(|(s, e, n)| (s, e, n.to_owned())));
}

/// Translates by pages of 4 KiB, as its table says.
struct Table {
    space: Arc<ebbtide_memory::AddressSpace>,
    pages: Mutex<std::collections::BTreeMap<u64, (u64, Access)>>,
}

impl Table {
    fn set(&self, page: u64, target: u64, access: Access) -> IommuMapping {
        self.pages.lock().unwrap().insert(page, (target, access));
        self.mapping(page, target, access)
    }

    fn mapping(&self, page: u64, target: u64, access: Access) -> IommuMapping {
        let (space, len) = (Arc::clone(&self.space), 0x1000);
        IommuMapping {
            range: page << 12..(page + 1) << 12,
            translation: Translation {
                space,
                target: Gpa(target),
                len,
                access,
            },
        }
    }
}

impl Iommu for Table {
    fn translate(&self, offset: u64, _: Access) -> Option<Translation> {
        let (target, access) = *self.pages.lock().unwrap().get(&(offset >> 12))?;
        Some(Translation {
            space: Arc::clone(&self.space),
            target: Gpa(target + offset % 0x1000),
            len: 0x1000 - offset % 0x1000,
            access,
        })
    }

    fn replay(&self, _: Range<u64>, show: &mut dyn FnMut(&IommuMapping)) {
        for (page, (target, access)) in &*self.pages.lock().unwrap() {
            show(&self.mapping(*page, *target, *access));
        }
    }
}

struct Mirror(Told);

impl IommuNotifier for Mirror {
    fn map(&mut self, mapping: &IommuMapping) {
        self.0.lock().unwrap().push((true, mapping.range.clone()));
    }
    fn unmap(&mut self, range: Range<u64>) {
        self.0.lock().unwrap().push((false, range));
    }
}

fn is_ready(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    future.as_mut().poll(&mut cx).is_ready()
}

#[test]
fn an_iommu_translates_dma_and_waits_for_what_is_under_way() {
    let map = Map::new();
    map.add(&map.ram("ram", 0x10_0000), 0);
    let (chip, ops) = registers(0x1000);
    map.add(&Region::registers("chip", 0x1000, ops), 0x20_0000);
    let table = Arc::new(Table {
        space: Arc::clone(&map.space),
        pages: Mutex::default(),
    });
    let region = Region::iommu("iommu", 1 << 32, Arc::clone(&table) as Arc<dyn Iommu>);
    let space = map.memory.address_space("nic", &region).unwrap();
    let domain = region.domain().unwrap();
    table.set(1, 0x5000, Access::ReadWrite);
    let told = Arc::new(Mutex::new(Vec::new()));
    domain.add_notifier(0..1 << 32, Box::new(Mirror(Arc::clone(&told))));
    let elsewhere = Arc::new(Mutex::new(Vec::new()));
    let mirror = Box::new(Mirror(Arc::clone(&elsewhere)));
    let second = domain.add_notifier(0x2000..0x3000, mirror);
    domain.map(&table.set(2, 0x9000, Access::Read));
    domain.map(&table.set(3, 0x20_0000, Access::ReadWrite));
    let reader = map.memory.register();
    let dma = Dma::new(&space, &ebbtide_gate::Gate::new("nic"));
    // Two pages that are apart in RAM, one of them read-only.
    map.space.store(&reader, 0x5ffe, 2, 0x2211);
    map.space.store(&reader, 0x9000, 2, 0x4433);
    let mut bytes = [0; 4];
    dma.read(&reader, Gpa(0x1ffe), &mut bytes).unwrap();
    assert_eq!(bytes, [0x11, 0x22, 0x33, 0x44]);
    let untranslated = |gpa, len| AccessError::Untranslated { gpa: Gpa(gpa), len };
    assert_eq!(
        dma.write(&reader, Gpa(0x1ffe), &bytes),
        Err(untranslated(0x2000, 2))
    );
    assert_eq!(
        dma.map(&reader, &[(Gpa(0x4000), 8)], Access::Read)
            .unwrap_err(),
        untranslated(0x4000, 8)
    );
    // To registers behind it, too.
    dma.write(&reader, Gpa(0x3004), &[7]).unwrap();
    assert_eq!(chip.take_seen(), [(true, 4, 1, 7)]);
    let mapping = dma
        .map(&reader, &[(Gpa(0x1800), 0x800)], Access::ReadWrite)
        .unwrap();
    assert!(matches!(mapping, Mapping::Direct(_)), "{mapping:?}");
    table.pages.lock().unwrap().remove(&1);
    let mut landed = Box::pin(domain.unmap(0x1000..0x2000));
    let mut other = Box::pin(domain.unmap(0x2000..0x3000));
    assert!(is_ready(&mut other));
    assert!(!is_ready(&mut landed), "the mapping is still out");
    assert!(dma.map(&reader, &[(Gpa(0x1800), 8)], Access::Read).is_err());
    mapping.complete(&reader, 0).unwrap();
    assert!(is_ready(&mut landed));
    let wanted = [
        (true, 0x1000..0x2000),
        (true, 0x2000..0x3000),
        (true, 0x3000..0x4000),
        (false, 0x1000..0x2000),
        (false, 0x2000..0x3000),
    ];
    assert_eq!(*told.lock().unwrap(), wanted);
    // The second one was shown all there was, and told of its own part; then of nothing.
    assert!(domain.remove_notifier(second).is_some());
    assert!(domain.remove_notifier(second).is_none());
    drop(domain.unmap(0x2000..0x3000));
    let own = [
        (true, 0x1000..0x2000),
        (true, 0x2000..0x3000),
        (false, 0x2000..0x3000),
    ];
    assert_eq!(*elsewhere.lock().unwrap(), own);
    // A CPU's view of it; a circle ends.
    table.set(8, 0x7000, Access::ReadWrite);
    space.store(&reader, 0x8010, 4, 99);
    assert_eq!(map.space.load(&reader, 0x7010, 4), 99);
    let circle = Arc::new(Table {
        space: Arc::clone(&space),
        pages: Mutex::default(),
    });
    circle.set(0, 0xa000, Access::ReadWrite);
    let back = Region::iommu("back", 0x1000, Arc::clone(&circle) as Arc<dyn Iommu>);
    map.add(&back, 0x30_0000);
    table.set(0xa, 0x30_0000, Access::ReadWrite);
    assert!(matches!(
        dma.read(&reader, Gpa(0xa000), &mut bytes),
        Err(AccessError::Untranslated { .. })
    ));
    assert!(dma.map(&reader, &[(Gpa(0xa000), 4)], Access::Read).is_err());
    assert_eq!(space.load(&reader, 0xa000, 4), 0xffff_ffff);
}
