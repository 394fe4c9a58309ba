// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that are told to do DMA to their own registers, by every way they can be entered.
#![cfg(not(loom))]

mod setup;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use ebbtide_gate::Gate;
use ebbtide_memory::{
    Access, AccessError, Busy, Dma, EntryPoint, Gpa, Memory, Mmio, Reader, Region, Registers,
};
use setup::{Map, Scratch};

/// Registers of another device.
const BAR: u64 = 0x100_0000;

struct Board {
    map: Map,
    reader: Reader,
}

fn board() -> Board {
    let map = Map::new();
    let registers = Registers::new(Scratch::new(0x1000) as Arc<dyn Mmio>);
    let registers = registers.gate(&Gate::new("gpu"));
    map.add(&Region::registers("bar", 0x1000, registers), BAR);
    let reader = map.memory.register();
    Board { map, reader }
}

/// A device that, when entered, does DMA to an address that the guest gave it.
struct Engine {
    dma: Dma,
    target: u64,
    memory: std::sync::Weak<Memory>,
    entered: AtomicUsize,
    results: Mutex<Vec<Result<(), AccessError>>>,
}

impl Engine {
    /// Each kind of DMA, read and write.
    fn work(&self) {
        let Some(memory) = self.memory.upgrade() else {
            return;
        };
        let reader = memory.register();
        let target = Gpa(self.target);
        let map = |access| self.dma.map(&reader, &[(target, 4)], access);
        let results = [
            self.dma.read(&reader, target, &mut [0; 4]),
            self.dma.write(&reader, target, &[0; 4]),
            map(Access::Read).and_then(|mapping| mapping.complete(&reader, 4)),
            map(Access::Write).and_then(|mapping| mapping.complete(&reader, 4)),
        ];
        self.results.lock().unwrap().extend(results);
    }

    fn take(&self) -> (usize, Vec<Result<(), AccessError>>) {
        let entered = self.entered.swap(0, Ordering::SeqCst);
        (entered, std::mem::take(&mut self.results.lock().unwrap()))
    }
}

impl Mmio for Engine {
    fn read(&self, _: u64, _: u8) -> u64 {
        self.entered.fetch_add(1, Ordering::SeqCst);
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {
        if self.entered.fetch_add(1, Ordering::SeqCst) == 0 {
            self.work();
        }
    }
}

const DOORBELL: u64 = 0x300_0000;
const CONTROL: u64 = 0x310_0000;

/// A device with a doorbell and a second region, whose DMA goes to `target`. `owner` is who the
/// DMA is said to be from: the device itself, or one that has nothing to do with it, as if the
/// device's code had used another's.
fn engine(b: &Board, gate: &Arc<Gate>, owner: &Arc<Gate>, target: u64) -> Arc<Engine> {
    let engine = Arc::new(Engine {
        dma: Dma::new(&b.map.space, owner),
        target,
        memory: Arc::downgrade(&b.map.memory),
        entered: AtomicUsize::new(0),
        results: Mutex::default(),
    });
    let registers = || Registers::new(Arc::clone(&engine) as Arc<dyn Mmio>).gate(gate);
    b.map.change(|t| {
        let doorbell = Region::registers("doorbell", 0x1000, registers());
        t.add(&b.map.root, &doorbell, DOORBELL, 0)?;
        let control = Region::registers("control", 0x1000, registers());
        t.add(&b.map.root, &control, CONTROL, 0)
    });
    engine
}

fn bus_errors(target: u64) -> Vec<Result<(), AccessError>> {
    let gpa = Gpa(target);
    vec![Err(AccessError::Reentrant { gpa, len: 4 }); 4]
}

/// A device that is entered by its doorbell and does DMA to `target`, its own registers.
fn entered_by_mmio(target: u64) {
    let gate = Gate::new("engine");
    for owner in [Arc::clone(&gate), Gate::new("somebody")] {
        let b = board();
        let engine = engine(&b, &gate, &owner, target);
        b.map.space.store(&b.reader, DOORBELL, 4, 1);
        assert_eq!(engine.take(), (1, bus_errors(target)));
        assert!(Busy::points(&gate).is_empty());
    }
}

#[test]
fn dma_to_the_own_doorbell_from_mmio_is_a_bus_error() {
    entered_by_mmio(DOORBELL);
}

#[test]
fn dma_to_another_region_of_the_device_from_mmio_is_a_bus_error() {
    entered_by_mmio(CONTROL);
}

/// A device that is entered otherwise.
fn entered_by(point: EntryPoint) {
    let b = board();
    let gate = Gate::new("engine");
    // Whoever the DMA is said to be from, that the device is being served is enough.
    let engine = engine(&b, &gate, &Gate::new("somebody"), DOORBELL);
    {
        let _busy = Busy::enter(&gate, point).unwrap();
        assert_eq!(Busy::points(&gate), [point]);
        engine.work();
    }
    assert_eq!(engine.take(), (0, bus_errors(DOORBELL)));
    // With a lease taken before, the entry is noted all the same.
    {
        let _busy = Busy::note(&gate, point);
        engine.work();
    }
    assert_eq!(engine.take(), (0, bus_errors(DOORBELL)));
    assert!(Busy::points(&gate).is_empty());
    assert!(gate.held().is_empty());
    gate.close();
    assert!(Busy::enter(&gate, point).is_none());
}

#[test]
fn dma_to_the_own_doorbell_from_a_timer_is_a_bus_error() {
    entered_by(EntryPoint::Timer);
}

#[test]
fn dma_to_the_own_doorbell_from_a_bottom_half_is_a_bus_error() {
    entered_by(EntryPoint::BottomHalf);
}

#[test]
fn dma_to_the_own_doorbell_from_a_queue_is_a_bus_error() {
    entered_by(EntryPoint::Queue);
}

#[test]
fn dma_to_the_own_doorbell_from_an_ioeventfd_is_a_bus_error() {
    entered_by(EntryPoint::Ioeventfd);
}

#[test]
fn dma_to_the_own_doorbell_is_a_bus_error_when_the_entry_was_forgotten() {
    let b = board();
    let gate = Gate::new("engine");
    let engine = engine(&b, &gate, &gate, DOORBELL);
    engine.work();
    assert_eq!(engine.take(), (0, bus_errors(DOORBELL)));
}

#[test]
fn two_devices_reach_each_other_but_not_in_a_circle() {
    let b = board();
    let (there, back) = (Gate::new("there"), Gate::new("back"));
    let first = engine(&b, &there, &there, BAR);
    first.work();
    let (entered, results) = first.take();
    assert_eq!((entered, results), (0, vec![Ok(()); 4]));
    // A second device, whose DMA comes back to the first.
    let second = Arc::new(Engine {
        dma: Dma::new(&b.map.space, &back),
        target: CONTROL,
        memory: Arc::downgrade(&b.map.memory),
        entered: AtomicUsize::new(0),
        results: Mutex::default(),
    });
    let registers = Registers::new(Arc::clone(&second) as Arc<dyn Mmio>).gate(&back);
    b.map.change(|t| {
        let region = Region::registers("back", 0x1000, registers);
        t.add(&b.map.root, &region, BAR, 5)
    });
    first.dma.write(&b.reader, Gpa(BAR), &[0; 4]).unwrap();
    assert_eq!(second.take(), (1, bus_errors(CONTROL)));
    assert_eq!(first.take(), (0, vec![]));
}
