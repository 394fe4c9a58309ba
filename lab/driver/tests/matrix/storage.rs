// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks, SCSI adapters and the balloon.

use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use ebbtide_block::fault::{Fault, Faults, Order, Rule};
use ebbtide_block::{Disk, DiskSpec};
use ebbtide_iothread::{Receiver, channel};
use ebbtide_lab_driver::scsi::{self, Command, Control, Data, response};
use ebbtide_lab_driver::{GuestRam, Layout, Part, Random, blk};
use ebbtide_scsi::Identity;
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::balloon::{BalloonEvent, BalloonSpec, VirtioBalloon};
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::scsi::{ScsiSpec, VirtioScsi};

use crate::cycle::{Behaviour, DELAY};
use crate::virtio::{Backend, Guest, Made, Request};
use crate::world::World;

const SECTORS: u64 = 64;
const SECTOR: usize = blk::SECTOR_BYTES;

/// An image that is written only with what it holds.
pub struct Image(tempfile::NamedTempFile);

fn pattern(sector: u64, len: usize) -> Vec<u8> {
    let start = sector as usize * SECTOR;
    (start..start + len)
        .map(|at| (at >> 8) as u8 ^ at as u8 | 1)
        .collect()
}

impl Image {
    pub fn new() -> Image {
        let file = tempfile::NamedTempFile::new().expect("an image");
        let bytes = pattern(0, SECTORS as usize * SECTOR);
        file.as_file().write_all_at(&bytes, 0).expect("room");
        Image(file)
    }

    fn open(&self, behaviour: Behaviour) -> (Arc<Disk>, Faults) {
        let faults = Faults::new();
        let fault = match behaviour {
            Behaviour::Prompt => None,
            Behaviour::Delay => Some(Fault::Delay(DELAY)),
            Behaviour::Fail => Some(Fault::Fail(5)),
            Behaviour::Reorder => Some(Fault::Jitter(DELAY)),
            Behaviour::Never => Some(Fault::Hold),
        };
        if let Some(fault) = fault {
            faults.inject(Rule::always(fault));
        }
        // It is locked while somebody has it: whoever had it before must be gone.
        let disk = Disk::open(&DiskSpec::new(self.0.path())).expect("nobody has the image");
        let disk = disk.with_faults(&faults).expect("it is new");
        (Arc::new(disk), faults)
    }
}

/// What holds operations, and lets them go.
struct Medium {
    behaviour: Behaviour,
    faults: Faults,
    world: Rc<World>,
    seed: u64,
}

impl Medium {
    fn is_busy(&self, function: &VirtioPci) -> bool {
        match self.behaviour {
            Behaviour::Never => self.faults.held() > 0,
            _ => function.in_flight().requests > 0,
        }
    }

    fn let_go(&self) {
        if self.behaviour == Behaviour::Never {
            self.faults.clear();
            self.faults.release(Order::Shuffled { seed: self.seed });
        }
    }

    fn holds(&self) -> bool {
        self.behaviour == Behaviour::Never && self.faults.held() > 0
    }

    /// Whether an error is an answer to a request.
    fn fails(&self) -> impl Fn() -> bool + use<> {
        let (world, fails) = (Rc::clone(&self.world), self.behaviour == Behaviour::Fail);
        move || fails || world.story.leaving.get()
    }
}

struct BlkBackend(Medium);

/// virtio-blk
pub fn blk(world: &Rc<World>, image: &Image, behaviour: Behaviour, random: &mut Random) -> Made {
    let (disk, faults) = image.open(behaviour);
    Made {
        device: VirtioBlk::new(BlkSpec::new("disk0"), disk, world.board.remote()),
        queues: 1,
        backend: Box::new(BlkBackend(Medium {
            behaviour,
            faults,
            world: Rc::clone(world),
            seed: random.next(),
        })),
    }
}

impl Backend for BlkBackend {
    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request> {
        let count = 1 + random.below(5);
        let one = |random: &mut Random| {
            let sector = random.below(SECTORS - 8);
            let len = SECTOR * (1 + random.below(8) as usize);
            let bytes = pattern(sector, len);
            let (request, read) = match random.below(4) {
                0 => (blk::Request::write(ram, sector, &bytes), false),
                1 => (blk::Request::flush(ram), false),
                _ => (blk::Request::read(ram, sector, len), true),
            };
            let fails = self.0.fails();
            Request {
                queue: 0,
                parts: request.parts(),
                owed: true,
                check: Box::new(move |_| match request.status() {
                    blk::status::OK if !read || request.data() == bytes => Ok(()),
                    blk::status::OK => Err("wrong data".into()),
                    blk::status::IOERR if fails() => Ok(()),
                    status => Err(format!("status {status}")),
                }),
            }
        };
        (0..count).map(|_| one(random)).collect()
    }

    fn is_busy(&self, function: &VirtioPci) -> bool {
        self.0.is_busy(function)
    }

    fn holds(&self) -> bool {
        self.0.holds()
    }

    fn let_go(&mut self) {
        self.0.let_go();
    }
}

struct ScsiBackend {
    medium: Medium,
    tag: u64,
}

/// virtio-scsi with a unit.
pub fn scsi(world: &Rc<World>, image: &Image, behaviour: Behaviour, random: &mut Random) -> Made {
    let (disk, faults) = image.open(behaviour);
    let device = VirtioScsi::new(ScsiSpec::new("scsi0"), world.board.remote());
    device
        .add_lun(0, 0, disk, Identity::new())
        .expect("a free place");
    Made {
        device,
        queues: 3,
        backend: Box::new(ScsiBackend {
            medium: Medium {
                behaviour,
                faults,
                world: Rc::clone(world),
                seed: random.next(),
            },
            tag: 1,
        }),
    }
}

impl Backend for ScsiBackend {
    /// Takes the unit's attention, and offers room for an event.
    fn ready(&mut self, guest: &mut Guest) {
        let driver = guest.driver.as_ref().expect("it is ready");
        let ready = Command::new(driver.ram(), scsi::address(0, 0), 1, &[0; 6], Data::None);
        let queue = &mut guest.queues[usize::from(scsi::REQUEST)];
        let answered = driver.roundtrip(scsi::REQUEST, queue, &ready.parts(), Layout::Direct);
        answered.expect("an answer");
    }

    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request> {
        let count = 1 + random.below(4);
        let mut requests: Vec<_> = (0..count).map(|_| self.command(ram, random)).collect();
        if random.below(2) == 0 {
            requests.push(self.function(ram));
        }
        requests
    }

    fn is_busy(&self, function: &VirtioPci) -> bool {
        self.medium.is_busy(function)
    }

    fn holds(&self) -> bool {
        self.medium.holds()
    }

    fn let_go(&mut self) {
        self.medium.let_go();
    }
}

impl ScsiBackend {
    fn command(&mut self, ram: &GuestRam, random: &mut Random) -> Request {
        self.tag += 1;
        let (block, blocks) = (random.below(SECTORS - 8), 1 + random.below(8) as u16);
        let bytes = pattern(block, usize::from(blocks) * SECTOR);
        let unit = scsi::address(0, 0);
        let read = random.below(3) > 0;
        let command = match read {
            true => Command::read(ram, unit, self.tag, block as u32, blocks),
            false => Command::write(ram, unit, self.tag, block as u32, &bytes),
        };
        let fails = self.medium.fails();
        Request {
            queue: scsi::REQUEST,
            parts: command.parts(),
            owed: true,
            check: Box::new(move |_| {
                let answer = command.answer();
                match (answer.response, answer.status) {
                    (response::OK, 0) if !read || command.data() == bytes => Ok(()),
                    (response::OK, 0) => Err("wrong data".into()),
                    // The image's failure, and the adapter's end.
                    (response::OK, 2) | (response::BAD_TARGET, _) if fails() => Ok(()),
                    _ => Err(format!("{answer:?}")),
                }
            }),
        }
    }

    fn function(&self, ram: &GuestRam) -> Request {
        let query = scsi::function::QUERY_TASK_SET;
        let control = Control::function(ram, query, scsi::address(0, 0), self.tag);
        let fails = self.medium.fails();
        Request {
            queue: scsi::CONTROL,
            parts: control.parts(),
            owed: true,
            check: Box::new(move |_| match control.response() {
                response::OK | response::FUNCTION_SUCCEEDED => Ok(()),
                response::BAD_TARGET if fails() => Ok(()),
                other => Err(format!("response {other}")),
            }),
        }
    }
}

/// The host's memory: it answers at once.
struct Pages {
    _events: Receiver<BalloonEvent>,
}

/// virtio-balloon
pub fn balloon(world: &Rc<World>, _: &Image, _: Behaviour, _: &mut Random) -> Made {
    let mut spec = BalloonSpec::new("balloon0");
    spec.free_page_reporting = true;
    let (sender, events) = channel();
    Made {
        device: VirtioBalloon::new(spec, world.board.remote(), sender),
        queues: 4,
        backend: Box::new(Pages { _events: events }),
    }
}

/// Memory that is given back with what uses it.
pub struct Room {
    ram: GuestRam,
    pub part: Part,
    len: usize,
}

impl Room {
    pub fn readable(ram: &GuestRam, bytes: &[u8]) -> Room {
        let gpa = ram.alloc(bytes.len(), 4);
        ram.write(gpa, bytes);
        Room::of(ram, Part::readable(gpa, bytes.len()))
    }

    pub fn writable(ram: &GuestRam, len: usize, align: u64) -> Room {
        Room::of(ram, Part::writable(ram.alloc(len, align), len))
    }

    fn of(ram: &GuestRam, part: Part) -> Room {
        Room {
            ram: ram.clone(),
            part,
            len: part.len as usize,
        }
    }

    pub fn bytes(&self, len: u32) -> Vec<u8> {
        self.ram.read(self.part.gpa, len as usize)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.ram.free(self.part.gpa, self.len);
    }
}

impl Backend for Pages {
    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request> {
        let page = Room::writable(ram, 4096, 4096);
        let number = u32::try_from(page.part.gpa.0 / 4096).expect("below 16 TiB");
        let page = Rc::new(page);
        let mut requests = Vec::new();
        for queue in [0, 1, 2] {
            let list = match queue {
                // One statistic.
                2 => Room::readable(ram, &[4, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
                _ => Room::readable(ram, &number.to_le_bytes()),
            };
            let page = Rc::clone(&page);
            requests.push(Request {
                queue,
                parts: vec![list.part],
                // A buffer with statistics is the device's until it wants others.
                owed: queue != 2,
                check: Box::new(move |_| {
                    let _ = (&page, &list);
                    Ok(())
                }),
            });
        }
        if random.below(2) == 0 {
            let free = Room::writable(ram, 4096, 4096);
            requests.push(Request {
                queue: 3,
                parts: vec![free.part],
                owed: true,
                check: Box::new(move |_| {
                    let _ = &free;
                    Ok(())
                }),
            });
        }
        requests
    }

    fn let_go(&mut self) {}
}
