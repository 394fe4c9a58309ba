// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What comes for a device after it is isolated, after the guest was told that it is gone, after it was dropped: nothing of
//! it lands in the guest's memory, all of which is filled with a pattern by then.

mod device;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_block::fault::{Fault, Faults, Order, Point, Rule};
use ebbtide_block::{Disk, DiskSpec};
use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::ManualClock;
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part, VirtioDriver, blk, poll};
use ebbtide_memory::Gpa;
use ebbtide_net::{MacAddress, Netdev};
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::console::{ConsoleSpec, PortKind, PortSpec, VirtioConsole};
use ebbtide_virtio::net::{NetSpec, VirtioNet};
use ebbtide_virtio::rng::{File, RngBackend, RngSpec, VirtioRng};
use ebbtide_virtio::{VirtioDevice, VirtioPci};

const RAM_BYTES: usize = 1 << 20;
const POISON: u8 = 0xa5;
/// Time in which something could come.
const WHILE: Duration = Duration::from_secs(60);

/// Something of one device that can come at any time, as often as one likes.
type Late = Box<dyn FnMut(&Board)>;

struct Rig {
    board: Board,
    function: Arc<VirtioPci>,
    driver: VirtioDriver,
    queues: Vec<DriverQueue>,
    slot: u8,
}

impl Rig {
    fn new(sizes: &[u16], make: impl FnOnce(&Board) -> Arc<dyn VirtioDevice>) -> Rig {
        let board = Board::with_clock(RAM_BYTES as u64, &ManualClock::new()).unwrap();
        let device = make(&board);
        let function = device::function(&board, device);
        let driver = VirtioDriver::attach(&board, Arc::clone(&function) as _, u64::MAX);
        let mut driver = driver.unwrap();
        let queues = device::start(&mut driver, sizes);
        let slot = driver.pci().devfn().slot();
        Rig {
            board,
            function,
            driver,
            queues,
            slot,
        }
    }

    fn add(&mut self, queue: u16, parts: &[Part]) {
        let rings = &mut self.queues[usize::from(queue)];
        rings.add(parts, Layout::Direct).expect("room");
        self.driver.kick(queue);
    }

    fn room(&self, len: usize) -> Part {
        Part::writable(self.board.ram().alloc(len, 4), len)
    }

    /// The device goes. `early` comes when it is isolated, and is all its drain waits for; `late` comes after each step
    /// from the guest's notice on.
    fn goes(self, early: impl FnOnce(&Board), mut late: Late) {
        let Rig {
            board,
            function,
            driver,
            queues,
            slot,
        } = self;
        let closed = function.close();
        assert!(!driver.pci().is_there(), "it is isolated");
        board.bridge().unmap(driver.pci().devfn()).unwrap();
        early(&board);
        board.wait(closed).expect("the drain never ends");
        let detached = board.bridge().detach(slot).unwrap();
        // The guest is told: all memory is its own.
        poison(&board);
        let mut come = |step: &str| {
            late(&board);
            board.pass(WHILE);
            let touched = touched(&board);
            assert_eq!(touched, None, "memory was written to after {step}");
        };
        come("the guest was told");
        drop((detached, function));
        come("the device was dropped");
        drop((driver, queues));
        come("its driver was");
    }
}

fn poison(board: &Board) {
    board.ram().write(Gpa(0), &[POISON; RAM_BYTES]);
}

/// The first byte that is not as [`poison`] left it.
fn touched(board: &Board) -> Option<usize> {
    let bytes = board.ram().read(Gpa(0), RAM_BYTES);
    bytes.iter().position(|byte| *byte != POISON)
}

/// A disk whose backend has two reads and answers when it is told to.
fn disk(point: Point) -> (Rig, tempfile::NamedTempFile, Faults, [blk::Request; 2]) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&[7; 1 << 16], 0).unwrap();
    let faults = Faults::new();
    let disk = Disk::open(&DiskSpec::new(image.path())).unwrap();
    let disk = Arc::new(disk.with_faults(&faults).unwrap());
    faults.inject(Rule::always(Fault::Hold).at(point));
    let mut rig = Rig::new(&[16], |board| {
        VirtioBlk::new(BlkSpec::new("disk0"), disk, board.remote())
    });
    let reads = [0, 8].map(|sector| blk::Request::read(rig.board.ram(), sector, 4096));
    reads.iter().for_each(|read| rig.add(0, &read.parts()));
    assert!(poll(|| faults.held() == 2));
    (rig, image, faults, reads)
}

/// Data come while the device drains, into the buffers of their requests and nowhere else; the guest is not told before.
#[test]
fn a_disk_that_answers_when_it_is_isolated() {
    for point in [Point::Before, Point::After] {
        let (rig, _image, faults, reads) = disk(point);
        let ram = rig.board.ram().clone();
        let rings = *rig.queues[0].config();
        let early = |board: &Board| {
            // All but what the requests and the rings are made of is another's.
            let parts = reads.iter().flat_map(blk::Request::parts);
            let parts = parts.map(|part| (part.gpa, part.len as usize));
            let rings = [
                (rings.desc, rings.desc_len()),
                (rings.avail, rings.avail_len()),
                (rings.used, rings.used_len()),
            ];
            let others = others(parts.chain(rings));
            for (gpa, len) in &others {
                ram.write(*gpa, &vec![POISON; *len]);
            }
            board.pass(WHILE);
            assert!(nothing_came(&reads, point));
            faults.clear();
            assert_eq!(faults.release(Order::Reverse), 2);
            assert!(board.poll(|| reads.iter().all(|it| it.status() == blk::status::OK)));
            assert!(reads.iter().all(|it| it.data() == [7; 4096]));
            for (gpa, len) in others {
                assert_eq!(ram.read(gpa, len), vec![POISON; len], "at {gpa:?}");
            }
        };
        let again = faults.clone();
        rig.goes(
            early,
            Box::new(move |_| assert_eq!(again.release(Order::Arrival), 0)),
        );
    }
}

/// The memory beside these pieces of it, which do not overlap.
fn others(pieces: impl Iterator<Item = (Gpa, usize)>) -> Vec<(Gpa, usize)> {
    let mut pieces: Vec<_> = pieces.map(|(gpa, len)| (gpa.0 as usize, len)).collect();
    pieces.push((RAM_BYTES, 0));
    pieces.sort_unstable();
    let mut end = 0;
    let mut gaps = Vec::new();
    for (start, len) in pieces {
        gaps.push((Gpa(end as u64), start - end));
        end = start + len;
    }
    gaps
}

/// No answer came; nor did data, unless it is only the answer that waits.
fn nothing_came(reads: &[blk::Request], point: Point) -> bool {
    let unanswered = |it: &blk::Request| it.status() == blk::status::UNTOUCHED;
    let empty = |it: &blk::Request| point == Point::After || it.data() != [7; 4096];
    reads.iter().all(|it| unanswered(it) && empty(it))
}

/// The kernel has a read of the entropy device's when it goes; the bytes come after that.
#[test]
fn entropy_that_comes_too_late() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
    let source = File::open(&path).unwrap();
    let mut pipe = std::fs::File::options().write(true).open(&path).unwrap();
    let backend = RngBackend::new("source0", source);
    let mut rig = Rig::new(&[8], |board| {
        VirtioRng::new(RngSpec::new("rng0"), &backend, board.remote()).unwrap()
    });
    let room = rig.room(256);
    rig.add(0, &[room]);
    std::thread::sleep(device::SOON);
    rig.goes(
        |_| (),
        Box::new(move |_| pipe.write_all(&[9; 256]).expect("somebody has it open")),
    );
    assert_eq!(backend.users(), 0);
}

#[test]
fn frames_that_come_too_late() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let netdev = Netdev::stream_of("net0", ours.into()).unwrap();
    let mut rig = Rig::new(&[16, 16, 16], |board| {
        let spec = NetSpec::new("card0", MacAddress::of_card(0));
        VirtioNet::new(spec, &netdev, board.remote()).unwrap()
    });
    for _ in 0..8 {
        let room = rig.room(2048);
        rig.add(0, &[room]);
    }
    let send = move || {
        let frame = [&[0, 0, 0, 64][..], &[0xff; 12], &[8, 0], &[9; 50]].concat();
        (&theirs).write_all(&frame).expect("room");
    };
    // One comes while it goes.
    let send = Rc::new(send);
    let early = Rc::clone(&send);
    rig.goes(move |_| early(), Box::new(move |_| send()));
    assert!(poll(|| netdev.user().is_none()));
}

#[test]
fn keys_that_come_too_late() {
    let wire = Wire::new();
    let mut rig = Rig::new(&[16, 16], |board| {
        let console = VirtioConsole::new(ConsoleSpec::new("serial0"), board.remote());
        let console = console.unwrap();
        let spec = PortSpec {
            id: "port".into(),
            kind: PortKind::Console,
            number: None,
            name: None,
        };
        console.add_port(spec, &wire).unwrap();
        console
    });
    for _ in 0..4 {
        let room = rig.room(64);
        rig.add(0, &[room]);
    }
    let late = Arc::clone(&wire);
    rig.goes(|_| (), Box::new(move |_| late.receive(b"typed")));
    assert!(poll(|| Arc::strong_count(&wire) == 1));
}

/// The pattern is one that a late write would be seen in.
#[test]
fn a_write_is_seen() {
    let board = Board::new(RAM_BYTES as u64).unwrap();
    poison(&board);
    assert_eq!(touched(&board), None);
    board.ram().write(Gpa(0x8_0001), &[7]);
    assert_eq!(touched(&board), Some(0x8_0001));
}
