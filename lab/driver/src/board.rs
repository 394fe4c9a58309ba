// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine without CPUs: memory, a PCI bus, interrupts, an iothread. The test is the CPU.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ebbtide_bus::pci::{Devfn, Function, HostBridge, IntxWires, Windows};
use ebbtide_iothread::{Config, IoThread, ManualClock, Remote};
use ebbtide_memory::{
    AddressSpace, Backing, Memory, MemoryConfig, RamBlock, RamSpec, Region, Ticket,
};

use crate::interrupts::{Interrupts, Level};
use crate::pci::PciDevice;
use crate::ram::GuestRam;
use crate::time::{Pace, turn};
use crate::wait;

/// Where configuration space is.
const ECAM: u64 = 0xe000_0000;
const WINDOW32: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;
const WINDOW64: std::ops::Range<u64> = 1 << 36..1 << 37;
const WINDOW_IO: std::ops::Range<u64> = 0xc000..0x1_0000;
/// The first input of the interrupt controller that pins are wired to, and how many there are.
const FIRST_GSI: u32 = 16;
const WIRES: u32 = 8;
/// Address space for all RAM blocks of a test.
const ARENA_BYTES: u64 = 1 << 36;

/// The machine. RAM begins at 0 and ends below 3 GiB; what a test adds belongs between 4 GiB and 64 GiB.
pub struct Board {
    memory: Arc<Memory>,
    root: Arc<Region>,
    space: Arc<AddressSpace>,
    bridge: Arc<HostBridge>,
    ecam: Arc<Region>,
    ports: Arc<AddressSpace>,
    lines: Vec<Arc<Level>>,
    interrupts: Interrupts,
    ram: GuestRam,
    /// Shows the block behind `ram`.
    shown: Arc<Region>,
    iothread: IoThread,
    clock: Option<ManualClock>,
}

impl Board {
    /// A board with `ram_bytes` of RAM, the first page of which is never allocated to anybody. Its time is the host's.
    ///
    /// # Errors
    /// The host has no memory, or no io_uring.
    pub fn new(ram_bytes: u64) -> anyhow::Result<Board> {
        Board::on(ram_bytes, None)
    }

    /// The same with a time of its own: devices measure what `clock` shows, and it stands still but in
    /// [`wait`](Self::wait), [`poll`](Self::poll) and [`pass`](Self::pass).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_clock(ram_bytes: u64, clock: &ManualClock) -> anyhow::Result<Board> {
        Board::on(ram_bytes, Some(clock.clone()))
    }

    fn on(ram_bytes: u64, clock: Option<ManualClock>) -> anyhow::Result<Board> {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: ARENA_BYTES,
        })?;
        let block = memory.ram().add(RamSpec {
            name: "ram".into(),
            size_bytes: ram_bytes,
            max_size_bytes: ram_bytes,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        })?;
        let root = Region::container("system", 1 << 64);
        let io = Region::container("io", 1 << 16);
        let windows = Windows {
            mmio32: WINDOW32,
            mmio64: WINDOW64,
            io: WINDOW_IO,
        };
        let bridge = HostBridge::new(&memory, windows)?;
        let ecam = Region::mmio("ecam", HostBridge::ECAM_BYTES, bridge.ecam());
        let shown = Region::ram("ram", &block);
        memory.update(|map| {
            map.add(&root, &shown, 0, 0)?;
            map.add(&root, &ecam, ECAM, 0)?;
            map.add(&root, bridge.container(), 0, -1)?;
            map.add(&io, bridge.io_container(), 0, -1)
        })?;
        let lines: Vec<Arc<Level>> = (0..WIRES).map(|_| Arc::default()).collect();
        let inputs = (FIRST_GSI..).zip(lines.iter().map(|line| Arc::clone(line) as _));
        bridge.wire_interrupts(IntxWires::new(inputs).context("no wires")?);
        let space = memory.address_space("memory", &root)?;
        let ports = memory.address_space("I/O", &io)?;
        let ram = GuestRam::new(&space, 4096..ram_bytes);
        let mut config = Config::default();
        if let Some(clock) = &clock {
            config.clock = clock.clock();
        }
        let iothread = IoThread::spawn_with("iothread0", config)?;
        Ok(Board {
            memory,
            root,
            space,
            ecam,
            ports,
            lines,
            bridge,
            interrupts: Interrupts::default(),
            ram,
            shown,
            iothread,
            clock,
        })
    }

    /// The clock, where the board has one of its own.
    pub fn clock(&self) -> Option<&ManualClock> {
        self.clock.as_ref()
    }

    /// What a future gives; `None` when it is not ready within [`LIMIT`](crate::LIMIT) of the host's time, which are hours on
    /// a board with a time of its own.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut pace = Pace::new(self.clock.as_ref());
        wait::drive(future, || pace.pass())
    }

    /// Looks again and again until `done`; false when it is not although time goes on, as in [`wait`](Self::wait).
    pub fn poll(&self, mut done: impl FnMut() -> bool) -> bool {
        let mut pace = Pace::new(self.clock.as_ref());
        while !done() {
            if !pace.pass() {
                return done();
            }
        }
        true
    }

    /// Lets `time` pass. Costs none on a board with a time of its own.
    pub fn pass(&self, time: Duration) {
        match &self.clock {
            Some(clock) => turn(clock, time),
            None => std::thread::sleep(time),
        }
    }

    /// I/O ports.
    pub fn ports(&self) -> &Arc<AddressSpace> {
        &self.ports
    }

    /// The inputs of the interrupt controller that pins are wired to.
    pub fn lines(&self) -> &[Arc<Level>] {
        &self.lines
    }

    /// The memory core.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The root of the memory map; regions a test adds go in here.
    pub fn root(&self) -> &Arc<Region> {
        &self.root
    }

    /// What devices and CPUs access.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// The PCI bus.
    pub fn bridge(&self) -> &Arc<HostBridge> {
        &self.bridge
    }

    /// The interrupt controller.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// RAM for the driver's rings and buffers.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The block behind it.
    ///
    /// # Panics
    /// Never: it is RAM.
    pub fn ram_block(&self) -> &Arc<RamBlock> {
        self.shown.ram_block().expect("RAM has a block")
    }

    /// Another guest comes while devices use the RAM of the last one: it finds other RAM there. The ticket is that of the
    /// old.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn renew_ram(&mut self) -> anyhow::Result<Ticket> {
        let block = self.memory.ram().renew(self.ram_block())?;
        let new = Region::ram("ram", &block);
        let ticket = self.memory.update(|map| {
            let ticket = map.unplug(&self.shown)?;
            map.add(&self.root, &new, 0, 0)?;
            Ok(ticket)
        })?;
        self.shown = new;
        Ok(ticket)
    }

    /// The thread devices serve their queues on.
    pub fn remote(&self) -> Remote {
        self.iothread.remote()
    }

    /// Plugs a function in, assigns its BARs and turns it on.
    ///
    /// # Errors
    /// The bus is full, or a BAR found no room.
    pub fn attach(&self, function: Arc<dyn Function>) -> anyhow::Result<PciDevice> {
        let slot = self.bridge.attach(None, function)?;
        self.bridge.assign_bars()?;
        let device = self.device(slot);
        device.enable();
        Ok(device)
    }

    /// Function 0 of a slot of bus 0, whether there is one or not.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn device(&self, slot: u8) -> PciDevice {
        let devfn = Devfn::new(slot, 0).expect("slots are 0 to 31");
        PciDevice::new(&self.space, ECAM, devfn)
    }
}

/// The map knows the bridge by its configuration space, the bridge its functions, and those the map. A machine ends with
/// its process; a board does not.
impl Drop for Board {
    fn drop(&mut self) {
        // It is there: nobody else takes it out.
        let _ = self.memory.update(|map| map.remove(&self.ecam));
    }
}
