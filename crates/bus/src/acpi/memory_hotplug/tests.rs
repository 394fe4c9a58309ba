// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The slots and their registers by themselves; the guest's AML on them is in `aml_tests`.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;
use crate::irq::IrqLine;

/// What the host was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Eject(u16),
    Ost(u16, u32, u32),
    Refused(u16),
}

#[derive(Default)]
pub struct Sink(Mutex<Vec<Told>>);

impl Sink {
    pub fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl DimmEjectSink for Sink {
    fn eject(&self, slot: u16) {
        self.0.lock().unwrap().push(Told::Eject(slot));
    }
    fn ost(&self, slot: u16, source: u32, status: u32) {
        self.0.lock().unwrap().push(Told::Ost(slot, source, status));
    }
    fn refused(&self, slot: u16) {
        self.0.lock().unwrap().push(Told::Refused(slot));
    }
}

#[derive(Default)]
pub struct Line(AtomicBool);

impl IrqLine for Line {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

/// Registers with what they are connected to.
pub struct Board {
    pub registers: MemoryHotplug,
    pub events: Arc<EventDevice>,
    pub sink: Arc<Sink>,
    line: Arc<Line>,
}

impl Board {
    pub fn new(slots: u16) -> Board {
        let line = Arc::new(Line::default());
        let events = Arc::new(EventDevice::new(line.clone()));
        let sink = Arc::new(Sink::default());
        let registers = MemoryHotplug::new(slots, events.clone(), sink.clone()).unwrap();
        Board {
            registers,
            events,
            sink,
            line,
        }
    }

    pub fn interrupts(&self) -> bool {
        self.line.0.load(Ordering::SeqCst)
    }

    fn select(&self, slot: u32) {
        self.registers.write(0, 4, slot.into());
    }

    fn flags(&self) -> u64 {
        self.registers.read(0x14, 1)
    }
}

pub fn place(guest_eject: GuestEject) -> DimmPlace {
    DimmPlace {
        base: 0x12_3456_7000_0000,
        size_bytes: 0x8_a000_0000,
        node: 0x0102_0304,
        guest_eject,
    }
}

#[test]
fn a_module_shows_in_its_slot_alone() {
    let board = Board::new(3);
    board
        .registers
        .plug(1, place(GuestEject::Requested), Arrival::Hot)
        .unwrap();
    assert!(board.interrupts());
    let read = |slot| {
        board.select(slot);
        [0, 4, 8, 12, 16].map(|offset| board.registers.read(offset, 4))
    };
    assert_eq!(
        read(1),
        [0x7000_0000, 0x12_3456, 0xa000_0000, 8, 0x0102_0304]
    );
    assert_eq!(board.flags(), 0b011);
    for other in [0, 2, 3, 0x10001, u32::MAX] {
        assert_eq!(read(other), [0; 5]);
        assert_eq!(board.flags(), 0);
    }
    assert_eq!(board.registers.read(0x14, 4), 0);
    board.select(1);
    // Parts of registers, and what lies across two.
    assert_eq!(board.registers.read(2, 4), 0x3456_7000);
    assert_eq!(board.registers.read(3, 1), 0x70);
    assert_eq!(board.registers.read(0x14, 4), 0b011);
    // What no register answers.
    for (offset, size) in [(0x15, 4), (0x18, 1), (u64::MAX, 1), (0, 8)] {
        assert_eq!(
            board.registers.read(offset, size),
            crate::gated::all_ones(size)
        );
    }
}

#[test]
fn one_present_at_boot_is_not_announced() {
    let board = Board::new(1);
    let dimm = place(GuestEject::Requested);
    board.registers.plug(0, dimm, Arrival::AtBoot).unwrap();
    assert!(!board.interrupts());
    assert_eq!(board.flags(), 0b001);
}

#[test]
fn a_request_is_seen_acknowledged_and_carried_out() {
    let board = Board::new(2);
    let registers = &board.registers;
    registers
        .plug(1, place(GuestEject::Requested), Arrival::AtBoot)
        .unwrap();
    board.select(1);
    registers.request_removal(1).unwrap();
    assert!(board.interrupts());
    assert_eq!(board.flags(), 0b101);
    registers.write(0x14, 1, 0b100);
    assert_eq!(board.flags(), 0b001);
    registers.write(4, 4, 3);
    registers.write(8, 4, 0x84);
    registers.write(0x14, 1, 0b1000);
    assert_eq!(
        board.sink.take(),
        [Told::Ost(1, 3, 0x84), Told::Eject(1)],
        "under way is no refusal"
    );
    assert_eq!(registers.state(1), Ok(SlotState::Ejected));
    assert_eq!((board.flags(), registers.read(12, 4)), (0, 8));
    // Once is enough.
    registers.write(0x14, 1, 0b1000);
    assert_eq!(board.sink.take(), []);
    assert_eq!(
        registers.cancel_removal(1),
        Err(SlotError::Ejected { slot: 1 })
    );
    registers.detach(1).unwrap();
    assert_eq!(registers.state(1), Ok(SlotState::Empty));
    assert_eq!(registers.read(12, 4), 0);
}

#[test]
fn the_uninvited_are_refused_as_the_policy_says() {
    let eject = |policy, requested| {
        let board = Board::new(1);
        board
            .registers
            .plug(0, place(policy), Arrival::AtBoot)
            .unwrap();
        if requested {
            board.registers.request_removal(0).unwrap();
        }
        board.registers.write(0x14, 1, 0b1000);
        let ejected = board.registers.state(0) == Ok(SlotState::Ejected);
        // Either way it is not enabled, until the guest is done with it.
        assert_eq!(board.flags() & 0b011, 0);
        board.registers.write(4, 4, 3);
        board.registers.write(8, 4, 0);
        assert_eq!(board.flags() & 0b011, if ejected { 0 } else { 0b011 });
        let told = board.sink.take();
        assert_eq!(told.contains(&Told::Eject(0)), ejected);
        ejected
    };
    use GuestEject::{Off, On, Requested};
    assert_eq!([eject(On, false), eject(On, true)], [true, true]);
    assert_eq!(
        [eject(Requested, false), eject(Requested, true)],
        [false, true]
    );
    assert_eq!([eject(Off, false), eject(Off, true)], [false, false]);
}

#[test]
fn a_refusal_takes_back_the_request_it_answers() {
    let board = Board::new(1);
    let registers = &board.registers;
    registers
        .plug(0, place(GuestEject::Requested), Arrival::AtBoot)
        .unwrap();
    let acknowledge = || registers.write(0x14, 1, 0b100);
    let report = |source, status| {
        registers.write(4, 4, source);
        registers.write(8, 4, status);
    };
    registers.request_removal(0).unwrap();
    acknowledge();
    // Asked again before the answer to the first: that answer is not the second's.
    registers.request_removal(0).unwrap();
    report(3, 0x82);
    assert_eq!(board.sink.take(), [Told::Ost(0, 3, 0x82)]);
    assert_eq!(registers.state(0), Ok(SlotState::Removing));
    acknowledge();
    report(0x200, 0x82);
    assert_eq!(registers.state(0), Ok(SlotState::Removing), "an insertion");
    report(3, 1);
    assert_eq!(
        board.sink.take(),
        [
            Told::Ost(0, 0x200, 0x82),
            Told::Ost(0, 3, 1),
            Told::Refused(0)
        ]
    );
    assert_eq!(registers.state(0), Ok(SlotState::Plugged));
    // Nothing is left to refuse.
    report(3, 1);
    assert_eq!(board.sink.take(), [Told::Ost(0, 3, 1)]);
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let line = Arc::new(Line::default());
    let events = Arc::new(EventDevice::new(line));
    let result = MemoryHotplug::new(257, events, Arc::new(Sink::default()));
    assert_eq!(
        result.map(drop).unwrap_err().to_string(),
        "257 dimm slots: there can be 256"
    );
    let board = Board::new(2);
    let registers = &board.registers;
    let dimm = place(GuestEject::Requested);
    let slots = 2;
    assert_eq!(
        registers.plug(2, dimm, Arrival::Hot),
        Err(SlotError::NoSuchSlot { slot: 2, slots })
    );
    let empty = DimmPlace {
        size_bytes: 0,
        ..dimm
    };
    let past = DimmPlace {
        base: u64::MAX - 1,
        ..dimm
    };
    for place in [empty, past] {
        let error = registers.plug(0, place, Arrival::Hot).unwrap_err();
        assert!(matches!(error, SlotError::Place { slot: 0, .. }), "{error}");
    }
    let empty = Err(SlotError::Empty { slot: 0 });
    assert_eq!(registers.request_removal(0), empty);
    assert_eq!(registers.withdraw(0), empty);
    assert_eq!(registers.detach(0), empty);
    registers.plug(0, dimm, Arrival::Hot).unwrap();
    assert_eq!(
        registers.plug(0, dimm, Arrival::Hot),
        Err(SlotError::Occupied { slot: 0 })
    );
    assert_eq!(
        registers.cancel_removal(0),
        Err(SlotError::NotRemoving { slot: 0 })
    );
    assert_eq!(registers.detach(0), Err(SlotError::NotEjected { slot: 0 }));
}

#[test]
fn a_reset_keeps_modules_and_forgets_requests() {
    let board = Board::new(3);
    let registers = &board.registers;
    for slot in 0..3 {
        registers
            .plug(slot, place(GuestEject::Requested), Arrival::Hot)
            .unwrap();
    }
    registers.request_removal(1).unwrap();
    registers.withdraw(2).unwrap();
    board.select(1);
    registers.reset();
    let states = [0, 1, 2].map(|slot| registers.state(slot).unwrap());
    use SlotState::{Ejected, Plugged};
    assert_eq!(states, [Plugged, Plugged, Ejected]);
    for slot in 0..3 {
        board.select(slot);
        assert_eq!(board.flags() & 0b110, 0);
    }
}

/// What can happen to the one slot of the search below.
const STEPS: [fn(&mut Slots) -> Option<Effect>; 11] = [
    |s| s.write(0x14, 1, 0b0010),
    |s| s.write(0x14, 1, 0b0100),
    |s| s.write(0x14, 1, 0b1000),
    |s| s.write(4, 4, 3),
    |s| s.write(8, 4, 0x84),
    |s| s.write(8, 4, 0x82),
    |s| s.write(8, 4, 0),
    |s| s.request_removal(0).err().and(None),
    |s| s.cancel_removal(0).err().and(None),
    |s| s.withdraw(0).err().and(None),
    |s| s.detach(0).err().and(None),
];
const GUESTS: usize = 7;

/// Every state a guest and a host can bring a slot to, by any order of their steps.
#[test]
fn no_order_of_steps_breaks_the_rules() {
    let mut slots = Slots::new(1);
    slots
        .plug(0, place(GuestEject::Requested), Arrival::Hot)
        .unwrap();
    let mut seen = HashSet::from([slots.clone()]);
    let mut left = vec![slots];
    while let Some(before) = left.pop() {
        for (index, step) in STEPS.iter().enumerate() {
            let mut after = before.clone();
            let effect = step(&mut after);
            check(index < GUESTS, &before, effect, &after);
            if seen.insert(after.clone()) {
                left.push(after);
            }
        }
    }
    // All four states, events and answers in all their combinations.
    assert!(seen.len() > 500, "{}", seen.len());
}

fn check(guest: bool, before: &Slots, effect: Option<Effect>, after: &Slots) {
    use SlotState::{Ejected, Empty, Plugged, Removing};
    let (was, is) = (before.state(0).unwrap(), after.state(0).unwrap());
    let ejects = matches!(effect, Some(Effect::Eject { .. }));
    let refuses = matches!(effect, Some(Effect::Ost { refused: true, .. }));
    let legal = match (was, is) {
        (Removing, Ejected) => !guest || ejects,
        (Removing, Plugged) => !guest || refuses,
        (Plugged, Removing | Ejected) | (Ejected, Empty) => !guest,
        (was, is) => was == is && !ejects && !refuses,
    };
    assert!(legal, "{was:?} to {is:?} with {effect:?}");
    // A guest that has seen a request can carry it out, whatever came before.
    let mut follow = after.clone();
    follow.write(0x14, 1, 0b0100);
    let carried_out = matches!(follow.write(0x14, 1, 0b1000), Some(Effect::Eject { .. }));
    assert_eq!(carried_out, is == Removing);
    // An event is pending only where there is something to say.
    let flags = after.read(0x14, 1).unwrap();
    assert!(flags & 0b100 == 0 || is == Removing, "{flags:#b} in {is:?}");
    let there = matches!(is, Plugged | Removing);
    assert!(flags & 1 == 0 || there, "{flags:#b} in {is:?}");
    // What a guest has given up and may not eject it finds again, once it says that it is done.
    let mut done = after.clone();
    done.write(4, 4, 3);
    done.write(8, 4, 0);
    let found = done.read(0x14, 1).unwrap();
    assert_eq!(found & 1 != 0, there);
    assert!(!there || flags & 1 != 0 || found & 0b010 != 0, "{found:#b}");
}

/// What a hostile guest and a busy host do.
#[derive(Clone, Debug)]
enum Step {
    Read(u64, u8),
    Write(u64, u8, u64),
    Plug(u16, GuestEject),
    Request(u16),
    Cancel(u16),
    Withdraw(u16),
    Detach(u16),
    Reset,
}

fn steps() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![
        8 => prop::sample::select(vec![0u64, 4, 8, 0x14]),
        4 => 0..0x20u64,
        1 => any::<u64>()
    ];
    let size = prop_oneof![8 => 1..=4u8, 1 => any::<u8>()];
    let value = prop_oneof![8 => 0..16u64, 2 => prop::sample::select(vec![0x80, 0x84, 0x103]), 1 => any::<u64>()];
    let slot = 0..6u16;
    let policy = prop::sample::select(vec![GuestEject::On, GuestEject::Off, GuestEject::Requested]);
    prop_oneof![
        4 => (offset.clone(), size.clone()).prop_map(|(o, s)| Step::Read(o, s)),
        12 => (offset, size, value).prop_map(|(o, s, v)| Step::Write(o, s, v)),
        2 => (slot.clone(), policy).prop_map(|(s, p)| Step::Plug(s, p)),
        2 => slot.clone().prop_map(Step::Request),
        1 => slot.clone().prop_map(Step::Cancel),
        1 => slot.clone().prop_map(Step::Withdraw),
        1 => slot.prop_map(Step::Detach),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// Whatever is written, in whatever width: the guest moves a module only where it may, the host is told once of
    /// each move, and reads of all widths agree.
    #[test]
    fn any_access_is_harmless(steps in prop::collection::vec(steps(), 1..200)) {
        const SLOTS: u16 = 5;
        let board = Board::new(SLOTS);
        let registers = &board.registers;
        let mut policies = [GuestEject::Off; SLOTS as usize];
        let states = || (0..SLOTS).map(|s| registers.state(s).unwrap()).collect::<Vec<_>>();
        for step in steps {
            let before = states();
            let by_host = match step {
                Step::Read(offset, size) => {
                    let value = registers.read(offset, size);
                    if let 1..=4 = size && offset < 0x18 && offset + u64::from(size) <= 0x18 {
                        let bytes = (0..u64::from(size)).rev();
                        let bytewise = bytes.fold(0, |v, i| v << 8 | registers.read(offset + i, 1));
                        prop_assert_eq!(value, bytewise);
                    } else {
                        prop_assert_eq!(value, crate::gated::all_ones(size));
                    }
                    false
                }
                Step::Write(offset, size, value) => {
                    registers.write(offset, size, value);
                    false
                }
                Step::Plug(slot, policy) => {
                    if registers.plug(slot, place(policy), Arrival::Hot).is_ok() {
                        policies[usize::from(slot)] = policy;
                    }
                    true
                }
                Step::Request(slot) => { let _ = registers.request_removal(slot); true }
                Step::Cancel(slot) => { let _ = registers.cancel_removal(slot); true }
                Step::Withdraw(slot) => { let _ = registers.withdraw(slot); true }
                Step::Detach(slot) => { let _ = registers.detach(slot); true }
                Step::Reset => { registers.reset(); true }
            };
            let told = board.sink.take();
            prop_assert!(!by_host || told.is_empty());
            for (slot, (was, is)) in before.iter().zip(states()).enumerate() {
                if by_host || *was == is {
                    continue;
                }
                let number = slot as u16;
                match (was, is, policies[slot]) {
                    (SlotState::Removing, SlotState::Ejected, GuestEject::On | GuestEject::Requested)
                    | (SlotState::Plugged, SlotState::Ejected, GuestEject::On) => {
                        prop_assert_eq!(&told, &[Told::Eject(number)]);
                    }
                    (SlotState::Removing, SlotState::Plugged, _) => {
                        prop_assert_eq!(told.last(), Some(&Told::Refused(number)));
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            let moves = before.iter().zip(states()).filter(|(was, is)| **was != *is).count();
            let reported = told.iter().filter(|told| !matches!(told, Told::Ost(..))).count();
            prop_assert!(by_host || moves == reported);
        }
    }
}
