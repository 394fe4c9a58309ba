// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A board with a virtio disk, its image and its faults.
#![allow(dead_code)] // Not every test file uses all of it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ebbtide_block::{Disk, DiskSpec, Faults};
use ebbtide_iothread::{ManualClock, Remote};
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part, VirtioDriver, blk};
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::{VirtioPci, features};

pub const DISK_BYTES: u64 = 4 << 20;
const RAM_BYTES: u64 = 32 << 20;
pub const SECTOR: usize = blk::SECTOR_BYTES;
pub const SERIAL: &str = "ebb-0123456789-serial";
/// Every feature there is.
pub const ALL: u64 = u64::MAX;
pub const QUEUE_SIZE: u16 = 256;

pub struct Rig {
    pub board: Board,
    pub image: tempfile::NamedTempFile,
    pub faults: Faults,
    pub blk: Arc<VirtioBlk>,
    pub function: Arc<VirtioPci>,
    pub driver: VirtioDriver,
    pub queue: DriverQueue,
}

pub struct Options {
    pub readonly: bool,
    pub features: u64,
    pub queues: u16,
    /// The largest that a driver can choose; the rig's has [`QUEUE_SIZE`].
    pub queue_size: u16,
    /// Iothreads besides the board's.
    pub more_iothreads: Vec<Remote>,
    /// A time of the board's own.
    pub clock: Option<ManualClock>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            readonly: false,
            features: ALL,
            queues: 1,
            queue_size: QUEUE_SIZE,
            more_iothreads: Vec::new(),
            clock: None,
        }
    }
}

/// Bytes that differ from sector to sector and from seed to seed.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    pattern_at(0, len, seed)
}

/// A part of a long [`pattern`].
pub fn pattern_at(offset: usize, len: usize, seed: u8) -> Vec<u8> {
    (offset..offset + len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed.wrapping_mul(113))
        .collect()
}

impl Rig {
    /// The driver is ready; the image holds [`pattern`] with seed 0.
    pub fn new() -> Rig {
        Rig::with(Options::default())
    }

    pub fn with(options: Options) -> Rig {
        let image = tempfile::NamedTempFile::new().unwrap();
        image
            .as_file()
            .write_all_at(&pattern(DISK_BYTES as usize, 0), 0)
            .unwrap();
        let spec = DiskSpec {
            readonly: options.readonly,
            ..DiskSpec::new(image.path())
        };
        let faults = Faults::new();
        let disk = Disk::open(&spec).unwrap().with_faults(&faults).unwrap();
        let board = match &options.clock {
            Some(clock) => Board::with_clock(RAM_BYTES, clock),
            None => Board::new(RAM_BYTES),
        };
        let board = board.unwrap();
        let spec = BlkSpec {
            serial: SERIAL.into(),
            queues: options.queues,
            queue_size: options.queue_size,
            more_iothreads: options.more_iothreads,
            ..BlkSpec::new("disk0")
        };
        let blk = VirtioBlk::new(spec, Arc::new(disk), board.remote());
        let function = VirtioPci::new(
            "disk0",
            Arc::clone(&blk) as _,
            board.space(),
            board.interrupts(),
            &board.remote(),
        )
        .unwrap();
        let mut driver =
            VirtioDriver::attach(&board, Arc::clone(&function) as _, options.features).unwrap();
        let queue = start(&mut driver);
        Rig {
            board,
            image,
            faults,
            blk,
            function,
            driver,
            queue,
        }
    }

    /// Starts the driver again, after a reset.
    pub fn restart(&mut self, wanted: u64) {
        self.driver.negotiate(wanted).unwrap();
        self.queue = start(&mut self.driver);
    }

    /// Carries a request out; its status.
    pub fn run(&mut self, request: &blk::Request) -> u8 {
        self.run_laid_out(request, &request.parts(), Layout::Direct)
    }

    pub fn run_laid_out(&mut self, request: &blk::Request, parts: &[Part], layout: Layout) -> u8 {
        self.driver
            .roundtrip(0, &mut self.queue, parts, layout)
            .unwrap();
        request.status()
    }

    pub fn read(&mut self, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
        let request = blk::Request::read(self.board.ram(), sector, len);
        match self.run(&request) {
            blk::status::OK => Ok(request.data()),
            status => Err(status),
        }
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let request = blk::Request::write(self.board.ram(), sector, data);
        self.run(&request)
    }

    /// Makes requests available with one kick.
    pub fn add_all(&mut self, requests: &[blk::Request]) -> Vec<u16> {
        let heads = requests
            .iter()
            .map(|request| self.queue.add(&request.parts(), Layout::Direct).unwrap())
            .collect();
        if self.queue.needs_kick() {
            self.driver.kick(0);
        }
        heads
    }

    pub fn image_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.image
            .as_file()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }

    /// The device still does what it should.
    pub fn assert_works(&mut self) {
        assert!(!self.driver.needs_reset());
        let expected = self.image_bytes(SECTOR as u64, SECTOR);
        assert_eq!(self.read(1, SECTOR), Ok(expected));
    }
}

fn start(driver: &mut VirtioDriver) -> DriverQueue {
    let queue = driver.add_queue(0, QUEUE_SIZE);
    driver.driver_ok().unwrap();
    assert!(driver.features() & features::VERSION_1 != 0);
    queue
}
