// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine without CPUs for PCI functions: memory, ports, a bus with eight interrupt wires. The test is the CPU.
#![allow(dead_code)] // each test file uses its part

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use ebbtide_bus::irq::IrqLine;
use ebbtide_bus::pci::{Devfn, Function, HostBridge, IntxWires, Windows};
use ebbtide_memory::{AddressSpace, Memory, MemoryConfig, Mmio, Region};

pub const INTX_DISABLE: u32 = 1 << 10;
/// First input of the interrupt controller that pins are wired to.
const FIRST_GSI: u32 = 16;
const WIRES: u32 = 8;

/// An input of the interrupt controller.
#[derive(Default)]
pub struct Level {
    high: AtomicBool,
    rises: AtomicUsize,
}

impl Level {
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    /// How often it went up.
    pub fn rises(&self) -> usize {
        self.rises.load(Ordering::SeqCst)
    }
}

impl IrqLine for Level {
    fn set(&self, high: bool) {
        if !self.high.swap(high, Ordering::SeqCst) && high {
            self.rises.fetch_add(1, Ordering::SeqCst);
        }
    }
}

pub struct Board {
    pub memory: Arc<Memory>,
    pub space: Arc<AddressSpace>,
    pub ports: Arc<AddressSpace>,
    pub bridge: Arc<HostBridge>,
    pub lines: Vec<Arc<Level>>,
    ecam: Arc<dyn Mmio>,
}

impl Board {
    pub fn new() -> Self {
        let arena_bytes = 64 << 30;
        let memory = Memory::new(MemoryConfig { arena_bytes }).unwrap();
        let windows = Windows {
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 1 << 36..1 << 37,
            io: 0xc000..0x1_0000,
        };
        let bridge = HostBridge::new(&memory, windows).unwrap();
        let (root, io) = (
            Region::container("system", 1 << 64),
            Region::container("io", 1 << 16),
        );
        memory
            .update(|map| {
                map.add(&root, bridge.container(), 0, HostBridge::PRIORITY)?;
                map.add(&io, bridge.io_container(), 0, HostBridge::PRIORITY)
            })
            .unwrap();
        let lines: Vec<Arc<Level>> = (0..WIRES).map(|_| Arc::default()).collect();
        let inputs = (FIRST_GSI..).zip(lines.iter().map(|line| Arc::clone(line) as _));
        bridge.wire_interrupts(IntxWires::new(inputs).unwrap());
        Self {
            space: memory.address_space("memory", &root).unwrap(),
            ports: memory.address_space("I/O", &io).unwrap(),
            ecam: bridge.ecam(),
            memory,
            bridge,
            lines,
        }
    }

    /// Plugs a function in and does what firmware does.
    pub fn plug(&self, function: Arc<dyn Function>) -> Slot<'_> {
        let slot = self.bridge.attach(None, function).unwrap();
        self.bridge.assign_bars().unwrap();
        Slot { board: self, slot }
    }
}

/// A function as its driver sees it.
#[derive(Clone, Copy)]
pub struct Slot<'a> {
    board: &'a Board,
    pub slot: u8,
}

impl Slot<'_> {
    pub fn config(&self, register: u64, size: u8) -> u32 {
        let at = u64::from(self.slot) << 15 | register;
        self.board.ecam.read(at, size) as u32
    }

    pub fn set_config(&self, register: u64, size: u8, value: u32) {
        let at = u64::from(self.slot) << 15 | register;
        self.board.ecam.write(at, size, value.into());
    }

    /// The address in BAR `index`, 32 or 64 bits or I/O.
    pub fn bar(&self, index: u64) -> u64 {
        let low = u64::from(self.config(0x10 + 4 * index, 4));
        match low & 7 {
            0 => low & !15,
            4 => u64::from(self.config(0x14 + 4 * index, 4)) << 32 | low & !15,
            _ => low & !3,
        }
    }

    /// What the interrupt line register says, as its wire.
    pub fn line(&self) -> &Level {
        &self.board.lines[self.config(0x3c, 1) as usize - FIRST_GSI as usize]
    }

    pub fn load(&self, bar: u64, offset: u64, size: u8) -> u64 {
        let board = self.board;
        board
            .space
            .load(&board.memory.register(), self.bar(bar) + offset, size)
    }

    pub fn store(&self, bar: u64, offset: u64, size: u8, value: u64) {
        let board = self.board;
        let address = self.bar(bar) + offset;
        board
            .space
            .store(&board.memory.register(), address, size, value);
    }

    /// A read of an I/O port of BAR 0.
    pub fn inp(&self, port: u64, size: u8) -> u64 {
        let board = self.board;
        board
            .ports
            .load(&board.memory.register(), self.bar(0) + port, size)
    }

    pub fn outp(&self, port: u64, size: u8, value: u64) {
        let (board, address) = (self.board, self.bar(0) + port);
        board
            .ports
            .store(&board.memory.register(), address, size, value);
    }

    /// The removal as a control thread does it, from the shut gate on: BARs out of the map, what the device waits for,
    /// off the bus. Returns what the bus had of the function.
    pub fn remove(&self, closed: impl Future<Output = ()>) -> Arc<dyn Function> {
        let at = Devfn::new(self.slot, 0).unwrap();
        self.board.bridge.unmap(at).unwrap();
        wait(closed);
        self.board.bridge.detach(self.slot).unwrap()
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future that must be ready soon.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    ready_within(future, Duration::from_secs(60)).expect("never ready")
}

/// What a future gives within `limit`.
pub fn ready_within<T>(future: impl Future<Output = T>, limit: Duration) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    let end = Instant::now() + limit;
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(value);
        }
        std::thread::park_timeout(end.checked_duration_since(Instant::now())?);
    }
}

/// A generator good enough to reach every corner.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }
}
