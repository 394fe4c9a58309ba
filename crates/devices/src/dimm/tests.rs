// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DIMMs in a memory map, with the guest played by writes to the registers.

use std::pin::pin;
use std::sync::Mutex;
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use ebbtide_bus::acpi::{DimmEjectSink, EventDevice};
use ebbtide_bus::irq::IrqLine;
use ebbtide_memory::{
    Access, AddressSpace, Backing, CachedMap, Gpa, Memory, MemoryConfig, Mmio, RamSpec, Reader,
};
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const AREA: Range<u64> = 4 * GIB..12 * GIB;
const SLOTS: u16 = 4;
const PRIORITY: i32 = 10;

fn area(range: Range<u64>, unit_bytes: u64) -> DimmArea {
    DimmArea {
        range,
        unit_bytes,
        priority: PRIORITY,
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Whether `future` is ready within `limit`.
fn ready(future: impl Future<Output = ()>, limit: Duration) -> bool {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    let end = Instant::now() + limit;
    let mut context = Context::from_waker(&waker);
    while future.as_mut().poll(&mut context).is_pending() {
        let Some(left) = end.checked_duration_since(Instant::now()) else {
            return false;
        };
        thread::park_timeout(left);
    }
    true
}

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(40);

struct NoLine;
impl IrqLine for NoLine {
    fn set(&self, _high: bool) {}
}

#[derive(Default)]
struct Ejected(Mutex<Vec<u16>>);
impl DimmEjectSink for Ejected {
    fn eject(&self, slot: u16) {
        self.0.lock().unwrap().push(slot);
    }
    fn ost(&self, _slot: u16, _source: u32, _status: u32) {}
    fn refused(&self, _slot: u16) {}
}

struct Machine {
    memory: Arc<Memory>,
    root: Arc<Region>,
    space: Arc<AddressSpace>,
    reader: Reader,
    bank: Arc<DimmBank>,
    ejected: Arc<Ejected>,
}

impl Machine {
    fn new() -> Machine {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 40,
        })
        .unwrap();
        let root = Region::container("system", 1 << 48);
        let space = memory.address_space("memory", &root).unwrap();
        let events = Arc::new(EventDevice::new(Arc::new(NoLine)));
        let ejected = Arc::new(Ejected::default());
        let registers = Arc::new(MemoryHotplug::new(SLOTS, events, ejected.clone()).unwrap());
        let bank = DimmBank::new(&memory, &root, &registers, area(AREA, SECTION_BYTES)).unwrap();
        let reader = memory.register();
        Machine {
            memory,
            root,
            space,
            reader,
            bank,
            ejected,
        }
    }

    fn block(&self, name: &str, size_bytes: u64) -> Arc<RamBlock> {
        self.backend(name, size_bytes, size_bytes, None)
    }

    fn backend(
        &self,
        name: &str,
        size_bytes: u64,
        max_size_bytes: u64,
        block_size_bytes: Option<u64>,
    ) -> Arc<RamBlock> {
        let spec = RamSpec {
            name: name.to_owned(),
            size_bytes,
            max_size_bytes,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes,
        };
        self.memory.ram().add(spec).unwrap()
    }

    fn plug(&self, id: &str, size_bytes: u64) -> Result<Dimm, DimmError> {
        Dimm::plug(&self.bank, &spec(id), &self.block(id, size_bytes))
    }

    /// The guest's answer to a request.
    fn guest_ejects(&self, slot: u16) {
        let registers = self.bank.registers();
        registers.write(0, 4, slot.into());
        registers.write(0x14, 1, 0b100);
        registers.write(0x14, 1, 0b1000);
    }

    fn claim(&self, spec: &DimmSpec, size_bytes: u64) -> Result<(u16, Range<u64>), DimmError> {
        self.bank.claim(spec, size_bytes, 4096)
    }
}

fn spec(id: &str) -> DimmSpec {
    DimmSpec {
        id: id.to_owned(),
        memdev: format!("mem-{id}"),
        node: 1,
        slot: None,
        addr: None,
        guest_eject: GuestEject::Requested,
        arrival: Arrival::Hot,
    }
}

#[test]
fn a_dimm_is_memory_and_shows_in_its_slot() {
    let machine = Machine::new();
    let dimm = machine.plug("dimm0", 256 * MIB).unwrap();
    let info = DimmInfo {
        id: "dimm0".into(),
        memdev: "mem-dimm0".into(),
        addr: 4 * GIB,
        size_bytes: 256 * MIB,
        slot: 0,
        node: 1,
        hotplugged: true,
    };
    assert_eq!(*dimm.info(), info);
    let read = |offset| machine.bank.registers().read(offset, 4);
    assert_eq!([0, 4, 8, 12, 16].map(read), [0, 1, 0x1000_0000, 0, 1]);
    assert_eq!(read(0x14), 0b011);
    let last = Gpa(4 * GIB + 256 * MIB - 8);
    let space = &machine.space;
    space.read(&machine.reader).write(last, 7u64).unwrap();
    assert_eq!(space.read(&machine.reader).read::<u64>(last).unwrap(), 7);
    assert!(
        space
            .read(&machine.reader)
            .write(Gpa(last.0 + 8), 7u64)
            .is_err()
    );
}

#[test]
fn it_goes_when_the_last_pin_is_gone_and_not_before() {
    let machine = Machine::new();
    let dimm = machine.plug("dimm0", 128 * MIB).unwrap();
    let other = machine.plug("dimm1", 128 * MIB).unwrap();
    let (space, reader) = (&machine.space, &machine.reader);
    let base = Gpa(dimm.info().addr);
    let pin = space.read(reader).pin(base, 4096, Access::Write).unwrap();
    let elsewhere = Gpa(other.info().addr);
    let bystander = space
        .read(reader)
        .pin(elsewhere, 4096, Access::Write)
        .unwrap();
    let ring = CachedMap::new(space, Gpa(base.0 + 4096), 4096, Access::Write);
    ring.get(&space.read(reader)).unwrap();
    let gone = Arc::downgrade(&dimm.region);

    dimm.request_removal().unwrap();
    assert_eq!(dimm.state(), SlotState::Removing);
    machine.guest_ejects(0);
    assert_eq!(*machine.ejected.0.lock().unwrap(), [0]);
    // The eject itself takes nothing away.
    ring.get(&space.read(reader)).unwrap();
    assert_eq!(dimm.state(), SlotState::Ejected);

    let isolated = dimm.isolate().unwrap();
    assert!(ring.get(&space.read(reader)).is_err(), "revoked");
    assert!(space.read(reader).pin(base, 8, Access::Read).is_err());
    assert!(!ready(isolated.drained(), SHORT));
    pin.write_at(0, b"dma").unwrap();
    let (isolated, error) = isolated.detach().unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("dimm dimm0 is in use by pins of "),
        "{error}"
    );
    let state = || machine.bank.registers().state(0).unwrap();
    assert_eq!(state(), SlotState::Ejected, "_STA 0x0d until detached");
    let early = machine.block("early", 128 * MIB);
    let taken = Dimm::plug(&machine.bank, &spec("dimm0"), &early);
    assert!(matches!(taken, Err(DimmError::DuplicateId(_))), "{taken:?}");

    thread::spawn(move || drop(pin)).join().unwrap();
    assert!(ready(isolated.drained(), LONG));
    let detached = isolated.detach().unwrap();
    assert_eq!(state(), SlotState::Empty);
    let blocks = || machine.memory.ram().blocks().len();
    let before = blocks();
    assert_eq!(detached.destroy().unwrap().id, "dimm0");
    assert_eq!(blocks(), before - 1);
    drop(bystander);
    // The tree's own references go with its next change.
    let again = Dimm::plug(
        &machine.bank,
        &spec("dimm0"),
        &machine.block("again", 128 * MIB),
    )
    .unwrap();
    assert_eq!((again.info().slot, again.info().addr), (0, base.0));
    assert_eq!(
        space.read(reader).read::<u64>(base).unwrap(),
        0,
        "another module"
    );
    assert!(ready(machine.memory.grace(), LONG));
    let end = Instant::now() + LONG;
    while gone.strong_count() > 0 && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(gone.strong_count(), 0);
}

#[test]
fn only_what_the_guest_let_go_is_isolated() {
    let machine = Machine::new();
    let dimm = machine.plug("dimm0", 128 * MIB).unwrap();
    let (dimm, error) = dimm.isolate().unwrap_err();
    assert_eq!(
        error.to_string(),
        "dimm dimm0: the dimm in slot 0 is not ejected by the guest"
    );
    // Cancelled: what the guest does after is uninvited.
    dimm.request_removal().unwrap();
    dimm.cancel_removal().unwrap();
    machine.guest_ejects(0);
    assert_eq!(dimm.state(), SlotState::Plugged);
    assert!(machine.ejected.0.lock().unwrap().is_empty());
    // The guest was faster.
    dimm.request_removal().unwrap();
    machine.guest_ejects(0);
    let error = dimm.cancel_removal().unwrap_err().to_string();
    assert_eq!(error, "dimm dimm0: the dimm in slot 0 is ejected already");
    assert!(dimm.request_removal().is_err() && dimm.withdraw().is_err());
    let isolated = dimm.isolate().unwrap();
    assert!(ready(isolated.drained(), LONG));
    isolated.detach().unwrap().destroy().unwrap();
}

#[test]
fn one_withdrawn_goes_without_the_guest() {
    let machine = Machine::new();
    let dimm = machine.plug("dimm0", 128 * MIB).unwrap();
    dimm.request_removal().unwrap();
    dimm.withdraw().unwrap();
    let isolated = dimm.isolate().unwrap();
    assert!(machine.ejected.0.lock().unwrap().is_empty());
    assert!(ready(isolated.drained(), LONG));
    isolated.detach().unwrap().destroy().unwrap();
}

/// A guest is reset while something is read into its DIMM: the next one has a DIMM of other memory in the same slot, which goes
/// like any.
#[test]
fn the_next_guest_gets_other_memory_in_the_same_slot() {
    let machine = Machine::new();
    let mut dimm = machine.plug("dimm0", SECTION_BYTES).unwrap();
    let (info, old) = (dimm.info().clone(), Arc::clone(dimm.block().unwrap()));
    let guard = machine.space.read(&machine.reader);
    let read = guard.pin(Gpa(info.addr), 8, Access::Write).unwrap();
    drop(guard);
    let new = machine.memory.ram().renew(&old).unwrap();
    let ticket = dimm.renew(&new).unwrap();
    read.write_at(0, &[0x66; 8]).unwrap();
    let guard = machine.space.read(&machine.reader);
    assert_eq!(guard.read::<u64>(Gpa(info.addr)).unwrap(), 0);
    drop(guard);
    assert_eq!((dimm.info(), dimm.state()), (&info, SlotState::Plugged));
    drop(read);
    assert!(ticket.wait(Phase::Drained, Duration::from_secs(60)));
    drop(old);
    ticket.destroy().map_err(|(_, error)| error).unwrap();

    dimm.withdraw().unwrap();
    let dimm = dimm.isolate().map_err(|(_, error)| error).unwrap();
    assert!(Arc::ptr_eq(dimm.ticket().block(), &new));
    assert!(dimm.ticket().wait(Phase::Drained, Duration::from_secs(60)));
    let dimm = dimm.detach().map_err(|(_, error)| error).unwrap();
    drop(new);
    dimm.destroy().map_err(|(_, error)| error).unwrap();
    assert!(machine.memory.ram().blocks().is_empty());
}

#[test]
fn what_is_shown_elsewhere_stays() {
    let machine = Machine::new();
    let dimm = machine.plug("dimm0", 128 * MIB).unwrap();
    let window = Region::alias("window", &dimm.region, 0, MIB);
    let change = |f: &dyn Fn() -> Result<(), ebbtide_memory::Error>| f().unwrap();
    change(&|| {
        machine
            .memory
            .update(|t| t.add(&machine.root, &window, 1 << 40, 0))
    });
    dimm.withdraw().unwrap();
    let (dimm, error) = dimm.isolate().unwrap_err();
    assert!(matches!(error, DimmError::Memory { .. }), "{error}");
    change(&|| machine.memory.update(|t| t.remove(&window)));
    let isolated = dimm.isolate().unwrap();
    assert!(ready(isolated.drained(), LONG));
}

#[test]
fn one_that_cannot_be_plugged_leaves_nothing_behind() {
    let machine = Machine::new();
    let in_the_way = Region::ram("vmem0", &machine.block("vmem0", 128 * MIB));
    machine
        .memory
        .update(|t| t.add(&machine.root, &in_the_way, AREA.start, PRIORITY))
        .unwrap();
    let block = machine.block("dimm0", 128 * MIB);
    let error = Dimm::plug(&machine.bank, &spec("dimm0"), &block).unwrap_err();
    assert!(matches!(error, DimmError::Memory { .. }), "{error}");
    // Told of it, the bank goes around it; the slot was not used up.
    let range = AREA.start..AREA.start + 128 * MIB;
    machine.bank.reserve("vmem0", range).unwrap();
    let dimm = Dimm::plug(&machine.bank, &spec("dimm0"), &block).unwrap();
    assert_eq!(
        (dimm.info().slot, dimm.info().addr),
        (0, AREA.start + 128 * MIB)
    );

    // A slot somebody else has filled: the memory is taken out of the map again.
    let place = DimmPlace {
        base: GIB,
        size_bytes: GIB,
        node: 0,
        guest_eject: GuestEject::On,
    };
    let registers = machine.bank.registers();
    registers.plug(1, place, Arrival::AtBoot).unwrap();
    let block = machine.block("dimm1", 128 * MIB);
    let error = Dimm::plug(&machine.bank, &spec("dimm1"), &block).unwrap_err();
    assert_eq!(error.to_string(), "dimm dimm1: dimm slot 1 is occupied");
    let there = Gpa(dimm.info().range().end);
    assert!(
        machine
            .space
            .read(&machine.reader)
            .read::<u8>(there)
            .is_err()
    );
}

#[test]
fn backends_that_change_by_themselves_are_refused() {
    let machine = Machine::new();
    let sparse = machine.backend("sparse", 128 * MIB, 128 * MIB, Some(2 * MIB));
    let growing = machine.backend("growing", 128 * MIB, 256 * MIB, None);
    for (block, reason) in [
        (sparse, "is made of blocks that come and go by themselves"),
        (growing, "can grow"),
    ] {
        let error = Dimm::plug(&machine.bank, &spec("d"), &block).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("dimm d: memory backend mem-d {reason}")
        );
    }
}

#[test]
fn places_are_the_lowest_that_fit_the_largest_pages() {
    let machine = Machine::new();
    let claim = |id: &str, mib: u64| {
        let (slot, range) = machine.claim(&spec(id), mib * MIB).unwrap();
        (slot, (range.start - AREA.start) / MIB)
    };
    assert_eq!(claim("a", 128), (0, 0));
    assert_eq!(claim("b", 1536), (1, 512));
    assert_eq!(claim("c", 2048), (2, 2048));
    assert_eq!(claim("d", 128), (3, 128));
    let full = machine.claim(&spec("e"), 128 * MIB).unwrap_err();
    assert_eq!(full.to_string(), "dimm e: none of the 4 slots is free");
    machine.bank.free(1);
    assert_eq!(claim("f", 128), (1, 256));
}

#[test]
fn what_fits_only_without_the_wish_fits() {
    let machine = Machine::new();
    machine
        .bank
        .reserve("vmem0", AREA.start..AREA.start + 128 * MIB)
        .unwrap();
    machine
        .bank
        .reserve("vmem1", AREA.start + 2 * GIB..AREA.end)
        .unwrap();
    let (_, range) = machine.claim(&spec("a"), GIB).unwrap();
    assert_eq!(range.start, AREA.start + GIB);
    let (_, range) = machine.claim(&spec("b"), 768 * MIB).unwrap();
    assert_eq!(range.start, AREA.start + 256 * MIB);
    let error = machine.claim(&spec("c"), 256 * MIB).unwrap_err();
    assert_eq!(
        error.to_string(),
        "dimm c: 0x10000000 bytes do not fit: the largest free piece of the area has 0x8000000"
    );
    machine.bank.release("b");
    assert!(
        machine.claim(&spec("c"), 256 * MIB).is_err(),
        "b is no reservation"
    );
    machine.bank.release("vmem0");
    let (_, range) = machine.claim(&spec("c"), 256 * MIB).unwrap();
    assert_eq!(range.start, AREA.start);
}

#[test]
fn wishes_that_cannot_be_met_are_refused_by_name() {
    let machine = Machine::new();
    let vmem = 6 * GIB..8 * GIB;
    machine.bank.reserve("vmem0", vmem.clone()).unwrap();
    let at = |addr: u64| DimmSpec {
        addr: Some(addr),
        ..spec("d")
    };
    let slot = |slot| DimmSpec {
        slot: Some(slot),
        ..spec("d")
    };
    let error = |spec: &DimmSpec, size| machine.claim(spec, size).unwrap_err().to_string();
    assert_eq!(
        error(&spec("d"), 100 * MIB),
        "dimm d: size 0x6400000 is not a multiple of 0x8000000"
    );
    assert_eq!(error(&spec("d"), 0), "dimm d: its memory backend is empty");
    assert_eq!(
        error(&at(4 * GIB + MIB), 128 * MIB),
        "dimm d: address 0x100100000 is not a multiple of 0x8000000"
    );
    assert_eq!(
        error(&at(6 * GIB - 128 * MIB), 256 * MIB),
        "d at 0x178000000..0x188000000 overlaps vmem0 at 0x180000000..0x200000000"
    );
    for addr in [0, AREA.end, AREA.end - 128 * MIB, !(128 * MIB - 1)] {
        let error = machine.claim(&at(addr), 256 * MIB).unwrap_err();
        assert!(matches!(error, DimmError::OutsideArea { .. }), "{error}");
    }
    assert_eq!(
        error(&slot(4), 128 * MIB),
        "dimm d: dimm slot 4 is not there: the machine has 4"
    );
    machine
        .claim(
            &DimmSpec {
                slot: Some(2),
                ..spec("e")
            },
            128 * MIB,
        )
        .unwrap();
    assert_eq!(error(&slot(2), 128 * MIB), "dimm d: slot 2 has dimm e");
    assert_eq!(
        error(&spec("vmem0"), 128 * MIB),
        "there is a memory device vmem0 already"
    );
    let huge = machine.bank.claim(&spec("d"), 128 * MIB, GIB).unwrap_err();
    assert!(
        matches!(huge, DimmError::Misaligned { align: GIB, .. }),
        "{huge}"
    );
    let overlap = machine.bank.reserve("vmem1", 7 * GIB..9 * GIB);
    assert!(matches!(overlap, Err(DimmError::Overlap { .. })));
    for (range, unit) in [(AREA, 3 * MIB), (5..5, MIB), (1..GIB, MIB)] {
        let Machine {
            memory, root, bank, ..
        } = &machine;
        let made = DimmBank::new(memory, root, bank.registers(), area(range, unit));
        assert!(matches!(made.map(drop), Err(DimmError::Area { .. })));
    }
}

proptest! {
    /// Against a search that tries every unit of the area.
    #[test]
    fn places_are_what_a_naive_search_finds(
        steps in prop::collection::vec((any::<bool>(), 1..20u64, 0..SLOTS), 1..40)
    ) {
        let machine = Machine::new();
        let mut taken: Vec<Option<Range<u64>>> = vec![None; SLOTS.into()];
        for (number, (remove, units, slot)) in steps.into_iter().enumerate() {
            if remove {
                machine.bank.free(slot);
                taken[usize::from(slot)] = None;
                continue;
            }
            let size = units * SECTION_BYTES;
            let free = |range: &Range<u64>| taken.iter().flatten()
                .all(|other| other.end <= range.start || range.end <= other.start);
            let search = |align: u64| (AREA.start..AREA.end)
                .step_by(SECTION_BYTES as usize)
                .map(|start| start..start + size)
                .find(|range| range.start % align == 0 && range.end <= AREA.end && free(range));
            let wish = GIB.min(1 << size.trailing_zeros());
            let expected_slot = taken.iter().position(Option::is_none);
            let expected = search(wish).or_else(|| search(SECTION_BYTES));
            let got = machine.claim(&spec(&format!("d{number}")), size);
            match (expected_slot, expected) {
                (Some(slot), Some(range)) => {
                    prop_assert_eq!(got.unwrap(), (slot as u16, range.clone()));
                    taken[slot] = Some(range);
                }
                _ => prop_assert!(got.is_err()),
            }
        }
    }
}
