// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A board with a virtio memory device, its RAM block and failures of its host.
#![allow(dead_code)] // Not every test file uses all of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ebbtide_iothread::{Blocking, Receiver, channel};
use ebbtide_lab_driver::mem::{Answer, Kind, Request, State, config};
use ebbtide_lab_driver::{Board, DriverQueue, LIMIT, Layout, VirtioDriver, poll};
use ebbtide_memory::{Backing, Gpa, Memory, MemoryConfig, RamBlock, RamSpec, Region};
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::mem::fault::HostFaults;
use ebbtide_virtio::mem::{MemEvent, MemSpec, Patience, VirtioMem, feature};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const BLOCK: u64 = 2 * MIB;
/// Where the region is.
pub const BASE: u64 = 8 * GIB;
pub const SOON: Duration = Duration::from_millis(50);
pub const LATER: Duration = Duration::from_secs(60);
const QUEUE_SIZE: u16 = 128;

pub struct Rig {
    pub board: Board,
    pub block: Arc<RamBlock>,
    /// Shows the block.
    pub region: Arc<Region>,
    pub faults: HostFaults,
    pub mem: Arc<VirtioMem>,
    pub function: Arc<VirtioPci>,
    pub events: Receiver<MemEvent>,
    pub driver: VirtioDriver,
    pub queue: DriverQueue,
}

/// A driver that waits this long is told that the host is busy.
pub fn impatient() -> Patience {
    Patience {
        drain: Duration::from_millis(300),
        host: Duration::from_millis(250),
    }
}

/// A memory with a sparse block "vmem1" and nothing else.
pub fn sparse_memory() -> Arc<Memory> {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 4 * GIB,
    })
    .unwrap();
    let spec = RamSpec {
        name: "vmem1".into(),
        size_bytes: GIB,
        max_size_bytes: GIB,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: Some(BLOCK),
    };
    memory.ram().add(spec).unwrap();
    memory
}

impl Rig {
    /// A region of `size` bytes of which `requested` are asked for; the driver is ready.
    pub fn new(size: u64, requested: u64) -> Rig {
        Rig::with(size, requested, |_| ())
    }

    pub fn with(size: u64, requested: u64, adjust: impl FnOnce(&mut MemSpec)) -> Rig {
        let board = Board::new(16 << 20).unwrap();
        let block = board
            .memory()
            .ram()
            .add(RamSpec {
                name: "vmem0".into(),
                size_bytes: size,
                max_size_bytes: size,
                backing: Backing::Anon { thp: false },
                prefault: false,
                block_size_bytes: Some(BLOCK),
            })
            .unwrap();
        let region = Region::ram("vmem0", &block);
        board
            .memory()
            .update(|map| map.add(board.root(), &region, BASE, 0))
            .unwrap();
        let faults = HostFaults::default();
        let mut spec = MemSpec::new("vmem0", &block, Gpa(BASE));
        spec.requested_bytes = requested;
        spec.faults = Some(faults.clone());
        adjust(&mut spec);
        let blocking = Arc::new(Blocking::new("blocking", 2).unwrap());
        let (sender, events) = channel();
        let mem = VirtioMem::new(spec, board.remote(), blocking, sender).unwrap();
        let function = VirtioPci::new(
            "vmem0",
            Arc::clone(&mem) as _,
            board.space(),
            board.interrupts(),
            &board.remote(),
        )
        .unwrap();
        let mut driver =
            VirtioDriver::attach(&board, Arc::clone(&function) as _, u64::MAX).unwrap();
        let queue = start(&mut driver);
        Rig {
            board,
            block,
            region,
            faults,
            mem,
            function,
            events,
            driver,
            queue,
        }
    }

    /// Starts the driver again, after a reset.
    pub fn restart(&mut self) {
        self.driver.negotiate(u64::MAX).unwrap();
        self.queue = start(&mut self.driver);
    }

    /// Asks about `count` blocks from block `first` of the region on.
    pub fn ask(&mut self, kind: Kind, first: u64, count: u16) -> Answer {
        self.ask_at(kind, BASE + first * BLOCK, count)
    }

    pub fn ask_at(&mut self, kind: Kind, addr: u64, count: u16) -> Answer {
        let request = Request::new(self.board.ram(), kind, addr, count);
        let used = self
            .driver
            .roundtrip(0, &mut self.queue, &request.parts(), Layout::Direct)
            .unwrap();
        assert_eq!(used.written, 10);
        request.answer()
    }

    pub fn plug(&mut self, first: u64, count: u16) -> Answer {
        self.ask(Kind::Plug, first, count)
    }

    pub fn unplug(&mut self, first: u64, count: u16) -> Answer {
        self.ask(Kind::Unplug, first, count)
    }

    pub fn unplug_all(&mut self) -> Answer {
        self.ask(Kind::UnplugAll, 0, 0)
    }

    /// The state of blocks; `None`: the request was an error.
    pub fn state(&mut self, first: u64, count: u16) -> Option<State> {
        let request = Request::new(self.board.ram(), Kind::State, BASE + first * BLOCK, count);
        self.driver
            .roundtrip(0, &mut self.queue, &request.parts(), Layout::Direct)
            .unwrap();
        (request.answer() == Answer::Ack).then(|| request.state())
    }

    /// Makes a request available and kicks; nobody waits.
    pub fn begin(&mut self, kind: Kind, first: u64, count: u16) -> Request {
        let request = Request::new(self.board.ram(), kind, BASE + first * BLOCK, count);
        self.queue.add(&request.parts(), Layout::Direct).unwrap();
        self.driver.kick(0);
        request
    }

    /// Waits for the answer to what [`begin`](Self::begin) began.
    pub fn end(&mut self, request: &Request) -> Answer {
        self.driver.wait_used(&mut self.queue).unwrap();
        request.answer()
    }

    pub fn plugged(&self) -> u64 {
        self.driver.read_config_u64(config::PLUGGED_SIZE)
    }

    pub fn usable(&self) -> u64 {
        self.driver.read_config_u64(config::USABLE_REGION_SIZE)
    }

    pub fn requested(&self) -> u64 {
        self.driver.read_config_u64(config::REQUESTED_SIZE)
    }

    /// Asks again while the host is busy, as it may be of itself where the device is impatient.
    pub fn asks_again(&mut self, ask: impl Fn(&mut Rig) -> Answer) -> Answer {
        let mut answer = Answer::Busy;
        poll(|| {
            answer = ask(self);
            answer != Answer::Busy
        });
        answer
    }

    /// Where a block is.
    pub fn gpa(&self, block: u64) -> Gpa {
        Gpa(BASE + block * BLOCK)
    }

    pub fn config_interrupts(&self) -> u64 {
        self.driver.interrupts(self.driver.config_message())
    }

    /// The device still does what it should, with block 0, which is not plugged.
    pub fn assert_works(&mut self) {
        assert!(!self.driver.needs_reset());
        assert_eq!(self.state(0, 1), Some(State::Unplugged));
    }

    /// The next event, skipping those `skip` says are of no interest.
    pub fn event(&mut self, skip: impl Fn(&MemEvent) -> bool) -> Option<MemEvent> {
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            match self.events.try_recv() {
                Some(event) if !skip(&event) => return Some(event),
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        None
    }
}

fn start(driver: &mut VirtioDriver) -> DriverQueue {
    assert_ne!(driver.features() & feature::UNPLUGGED_INACCESSIBLE, 0);
    let queue = driver.add_queue(0, QUEUE_SIZE);
    driver.driver_ok().unwrap();
    queue
}
