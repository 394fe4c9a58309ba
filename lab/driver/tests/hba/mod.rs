// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A board with a SCSI host device, its images and their faults.
#![allow(dead_code)] // Not every test file uses all of it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ebbtide_block::{Disk, DiskSpec, Faults};
use ebbtide_lab_driver::scsi::{self, Answer, Command, Control, Data};
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part, VirtioDriver};
use ebbtide_memory::Gpa;
use ebbtide_scsi::Identity;
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::scsi::{ScsiSpec, VirtioScsi, feature};

pub const DISK_BYTES: u64 = 4 << 20;
pub const ALL: u64 = u64::MAX;
const QUEUE_SIZE: u16 = 256;

pub struct Rig {
    pub board: Board,
    pub scsi: Arc<VirtioScsi>,
    pub function: Arc<VirtioPci>,
    pub driver: VirtioDriver,
    pub control: DriverQueue,
    pub events: DriverQueue,
    pub requests: Vec<DriverQueue>,
    next_tag: u64,
}

/// A disk in a file, and what goes wrong with it.
pub struct Image {
    pub file: tempfile::NamedTempFile,
    pub faults: Faults,
    pub disk: Arc<Disk>,
}

/// Bytes that differ from sector to sector and from seed to seed.
pub fn pattern(offset: usize, len: usize, seed: u8) -> Vec<u8> {
    (offset..offset + len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed.wrapping_mul(113))
        .collect()
}

impl Image {
    /// 4 MiB of [`pattern`].
    pub fn new(seed: u8) -> Image {
        Image::with(seed, |spec| spec)
    }

    pub fn with(seed: u8, change: impl FnOnce(DiskSpec) -> DiskSpec) -> Image {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = pattern(0, DISK_BYTES as usize, seed);
        file.as_file().write_all_at(&bytes, 0).unwrap();
        let spec = change(DiskSpec::new(file.path()));
        let faults = Faults::new();
        let disk = Disk::open(&spec).unwrap().with_faults(&faults).unwrap();
        Image {
            file,
            faults,
            disk: Arc::new(disk),
        }
    }

    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file
            .as_file()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }
}

impl Rig {
    /// The driver is ready; there are no units.
    pub fn new() -> Rig {
        Rig::with(ScsiSpec::new("scsi0"), ALL)
    }

    pub fn with(spec: ScsiSpec, features: u64) -> Rig {
        Rig::on(Board::new(32 << 20).unwrap(), spec, features)
    }

    pub fn on(board: Board, spec: ScsiSpec, features: u64) -> Rig {
        let queues = spec.queues;
        let scsi = VirtioScsi::new(spec, board.remote());
        let function = VirtioPci::new(
            "scsi0",
            Arc::clone(&scsi) as _,
            board.space(),
            board.interrupts(),
            &board.remote(),
        )
        .unwrap();
        let mut driver =
            VirtioDriver::attach(&board, Arc::clone(&function) as _, features).unwrap();
        let (control, events, requests) = start(&mut driver, queues);
        Rig {
            board,
            scsi,
            function,
            driver,
            control,
            events,
            requests,
            next_tag: 1,
        }
    }

    /// The driver is ready, and knows the one unit, 0:0.
    pub fn with_unit() -> (Rig, Image) {
        let mut rig = Rig::new();
        let image = Image::new(0);
        rig.add(0, 0, &image);
        (rig, image)
    }

    /// Adds a unit and takes its event, if the driver hears of those, and its attention.
    pub fn add(&mut self, target: u8, lun: u16, image: &Image) {
        let disk = Arc::clone(&image.disk);
        let serial = format!("EBB-{target}-{lun}");
        let identity = Identity::new().serial(&serial).unwrap();
        if self.driver.features() & feature::HOTPLUG == 0 {
            self.scsi.add_lun(target, lun, disk, identity).unwrap();
        } else {
            let buffer = self.offer_event();
            self.scsi.add_lun(target, lun, disk, identity).unwrap();
            assert_eq!(self.wait_event(buffer)[..6], [1, 0, 0, 0, 1, target]);
        }
        self.attention(target, lun);
    }

    /// Takes one attention.
    pub fn attention(&mut self, target: u8, lun: u16) -> (u8, u8) {
        let (answer, _) = self.run(target, lun, &[0; 6], Data::None);
        match answer.sense {
            Some((6, asc, ascq)) => (asc, ascq),
            other => panic!("no attention: {other:?}"),
        }
    }

    /// Starts the driver again, after a reset.
    pub fn restart(&mut self) {
        self.driver.negotiate(ALL).unwrap();
        let queues = u16::try_from(self.requests.len()).unwrap();
        (self.control, self.events, self.requests) = start(&mut self.driver, queues);
    }

    pub fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    /// Carries a command out; its answer and data.
    pub fn run(&mut self, target: u8, lun: u16, cdb: &[u8], data: Data<'_>) -> (Answer, Vec<u8>) {
        let tag = self.tag();
        let address = scsi::address(target, lun);
        let command = Command::new(self.board.ram(), address, tag, cdb, data);
        self.run_laid_out(&command, &command.parts(), Layout::Direct);
        (command.answer(), command.data())
    }

    /// Carries a command out; bytes the device says it wrote.
    pub fn run_laid_out(&mut self, _command: &Command, parts: &[Part], layout: Layout) -> u32 {
        self.driver
            .roundtrip(scsi::REQUEST, &mut self.requests[0], parts, layout)
            .unwrap()
            .written
    }

    pub fn read(&mut self, target: u8, lun: u16, block: u32, blocks: u16) -> (Answer, Vec<u8>) {
        let data = Data::In(usize::from(blocks) * 512);
        self.run(target, lun, &scsi::cdb10(0x28, block, blocks), data)
    }

    /// Makes a command available and kicks.
    pub fn send(&mut self, queue: usize, command: &Command) -> u16 {
        let head = self.requests[queue]
            .add(&command.parts(), Layout::Direct)
            .unwrap();
        if self.requests[queue].needs_kick() {
            self.driver.kick(scsi::REQUEST + queue as u16);
        }
        head
    }

    /// Makes a control request available and kicks.
    pub fn send_control(&mut self, control: &Control) {
        self.control.add(&control.parts(), Layout::Direct).unwrap();
        if self.control.needs_kick() {
            self.driver.kick(scsi::CONTROL);
        }
    }

    /// A function and its response.
    pub fn manage(&mut self, function: u32, target: u8, lun: u16, tag: u64) -> u8 {
        let address = scsi::address(target, lun);
        let control = Control::function(self.board.ram(), function, address, tag);
        self.send_control(&control);
        self.driver.wait_used(&mut self.control).unwrap();
        control.response()
    }

    /// Makes a buffer for an event available.
    pub fn offer_event(&mut self) -> Gpa {
        let gpa = self.board.ram().alloc(16, 4);
        self.events
            .add(&[Part::writable(gpa, 16)], Layout::Direct)
            .unwrap();
        if self.events.needs_kick() {
            self.driver.kick(scsi::EVENT);
        }
        gpa
    }

    /// Waits for an event in the buffer.
    pub fn wait_event(&mut self, gpa: Gpa) -> Vec<u8> {
        let used = self.driver.wait_used(&mut self.events).unwrap();
        assert_eq!(used.written, 16);
        self.board.ram().read(gpa, 16)
    }
}

fn start(driver: &mut VirtioDriver, requests: u16) -> (DriverQueue, DriverQueue, Vec<DriverQueue>) {
    let control = driver.add_queue(scsi::CONTROL, QUEUE_SIZE);
    let events = driver.add_queue(scsi::EVENT, QUEUE_SIZE);
    let requests = (0..requests)
        .map(|queue| driver.add_queue(scsi::REQUEST + queue, QUEUE_SIZE))
        .collect();
    driver.driver_ok().unwrap();
    (control, events, requests)
}
