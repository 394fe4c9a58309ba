// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that transfer to and from memory which is unplugged under them, by a driver that does not care.
//!
//! What must hold whatever the order of things: a transfer that succeeded moved the bytes that were there, one that
//! failed moved none, and nobody writes to a block that is not plugged: what comes back is all zeroes.

mod plugging;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use ebbtide_block::fault::{Fault, Rule};
use ebbtide_block::{Disk, DiskSpec, Faults};
use ebbtide_lab_driver::blk::{Request, status};
use ebbtide_lab_driver::mem::Answer;
use ebbtide_lab_driver::{Board, DriverQueue, GuestRam, Layout, Random, VirtioDriver};
use ebbtide_memory::{AddressSpace, Gpa};
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use plugging::{BASE, BLOCK, Rig};

const BLOCKS: u64 = 48;
const PAGE: usize = 4096;
/// Requests a disk has in flight at once; each has a page of its own in every block, and every disk has its own.
const BATCH: u64 = 4;
const DISKS: u64 = 2;
const QUEUE_SIZE: u16 = 64;
const DISK_BYTES: usize = 256 * PAGE;

/// What is known of a block besides its memory.
#[derive(Default)]
struct BlockState {
    /// Even: plugged, and nobody is about to change that.
    era: AtomicU64,
    /// Transfers may begin. Stays so when the block is unplugged, until it is to be plugged again.
    open: AtomicBool,
    /// Transfers that have begun.
    transfers: AtomicU64,
}

/// Address of a page that belongs to place `slot` of a batch of `disk`. The page behind it belongs to nobody.
fn page_of(block: u64, disk: u64, slot: u64) -> Gpa {
    Gpa(BASE + block * BLOCK + (disk * BATCH + slot) * 61 * PAGE as u64)
}

/// All pages of a block that are looked at.
fn pages(block: u64) -> impl Iterator<Item = Gpa> {
    (0..DISKS * BATCH).flat_map(move |place| {
        let page = page_of(block, 0, place);
        [page, Gpa(page.0 + PAGE as u64)]
    })
}

fn fill(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    (0..PAGE / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect()
}

fn poison(page: Gpa) -> Vec<u8> {
    fill(page.0)
}

/// The driver of the memory device.
struct Walker {
    rig: Rig,
    plugged: Vec<bool>,
    blocks: Arc<Vec<BlockState>>,
    random: Random,
    requests: u64,
}

impl Walker {
    fn step(&mut self) {
        let requested = self.rig.requested() / BLOCK;
        let have = self.plugged.iter().filter(|plugged| **plugged).count() as u64;
        let plug = requested > have;
        let first = self.random.below(BLOCKS) as usize;
        if requested == have || self.plugged[first] == plug {
            return;
        }
        let len = 1 + self.random.below(6.min(requested.abs_diff(have))) as usize;
        let len = self.plugged[first..]
            .iter()
            .take(len)
            .take_while(|plugged| **plugged != plug)
            .count();
        self.requests += 1;
        if plug {
            self.plug(first, len);
        } else {
            self.unplug(first, len);
        }
    }

    fn plug(&mut self, first: usize, len: usize) {
        let blocks = Arc::clone(&self.blocks);
        for block in &blocks[first..first + len] {
            block.open.store(false, SeqCst);
            while block.transfers.load(SeqCst) > 0 {
                std::thread::yield_now();
            }
        }
        match self.rig.plug(first as u64, len as u16) {
            Answer::Ack => {}
            Answer::Nack => return,
            answer => panic!("plug {first} {len}: {answer:?}"),
        }
        for at in first..first + len {
            for page in pages(at as u64) {
                let fresh = self.rig.board.ram().read(page, PAGE);
                assert!(
                    fresh == [0; PAGE],
                    "{page} was written while it was unplugged"
                );
                self.rig.board.ram().write(page, &poison(page));
            }
            self.plugged[at] = true;
            blocks[at].era.fetch_add(1, SeqCst);
            blocks[at].open.store(true, SeqCst);
        }
    }

    fn unplug(&mut self, first: usize, len: usize) {
        for at in first..first + len {
            self.blocks[at].era.fetch_add(1, SeqCst);
            for page in pages(at as u64).skip(1).step_by(2) {
                let now = self.rig.board.ram().read(page, PAGE);
                assert!(now == poison(page), "{page} was nobody's to write to");
            }
        }
        assert_eq!(self.rig.unplug(first as u64, len as u16), Answer::Ack);
        self.plugged[first..first + len].fill(false);
    }
}

/// A disk, its driver, and what its image should hold.
struct Transfers {
    number: u64,
    blk: Arc<VirtioBlk>,
    driver: VirtioDriver,
    queue: DriverQueue,
    ram: GuestRam,
    space: Arc<AddressSpace>,
    image: tempfile::NamedTempFile,
    expected: Vec<u8>,
    blocks: Arc<Vec<BlockState>>,
    random: Random,
    moved: u64,
    refused: u64,
    /// Those that succeeded although an unplug of their memory was asked for meanwhile.
    crossed: u64,
    resets: u64,
}

/// One of a batch.
struct Transfer {
    request: Request,
    block: usize,
    era: u64,
    page: Gpa,
    offset: usize,
    /// What is written to the image; `None`: it is read.
    written: Option<Vec<u8>>,
}

impl Transfers {
    fn new(board: &Board, blocks: &Arc<Vec<BlockState>>, number: u64) -> Transfers {
        let image = tempfile::NamedTempFile::new().unwrap();
        let expected: Vec<u8> = (0..DISK_BYTES / PAGE)
            .flat_map(|page| fill(number << 32 | page as u64))
            .collect();
        image.as_file().write_all_at(&expected, 0).unwrap();
        let faults = Faults::new();
        let delay = Duration::from_micros(400 * number);
        faults.inject(Rule::always(Fault::Delay(delay)));
        let disk = Disk::open(&DiskSpec::new(image.path())).unwrap();
        let disk = Arc::new(disk.with_faults(&faults).unwrap());
        let blk = VirtioBlk::new(BlkSpec::new("disk"), disk, board.remote());
        let function = VirtioPci::new(
            format!("disk{number}"),
            Arc::clone(&blk) as _,
            board.space(),
            board.interrupts(),
            &board.remote(),
        );
        let driver = VirtioDriver::attach(board, function.unwrap(), u64::MAX).unwrap();
        let queue = driver.add_queue(0, QUEUE_SIZE);
        driver.driver_ok().unwrap();
        Transfers {
            number,
            blk,
            driver,
            queue,
            ram: board.ram().clone(),
            space: Arc::clone(board.space()),
            image,
            expected,
            blocks: Arc::clone(blocks),
            random: Random(number),
            moved: 0,
            refused: 0,
            crossed: 0,
            resets: 0,
        }
    }

    fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(SeqCst) {
            let batch: Vec<_> = (0..BATCH).filter_map(|slot| self.begin(slot)).collect();
            if self.queue.needs_kick() {
                self.driver.kick(0);
            }
            if self.random.below(16) == 0 {
                self.reset(batch);
                continue;
            }
            for _ in &batch {
                self.driver.wait_used(&mut self.queue).unwrap();
            }
            batch.into_iter().for_each(|transfer| self.end(transfer));
        }
        let metrics = self.blk.metrics();
        assert_eq!(
            metrics.read.failures + metrics.write.failures,
            metrics.bad_memory,
            "memory went under a transfer that had begun"
        );
    }

    /// The driver resets the disk with requests in flight. Each of them is done or was never begun when the reset is
    /// complete, and none touches memory or image after that.
    fn reset(&mut self, batch: Vec<Transfer>) {
        std::thread::sleep(Duration::from_micros(self.random.below(600)));
        self.driver.reset().unwrap();
        for transfer in batch {
            let here = transfer.offset..transfer.offset + PAGE;
            let image = self.image_at(transfer.offset);
            let written = transfer.written.as_ref() == Some(&image);
            assert!(
                written || image == self.expected[here.clone()],
                "the image holds half a write at {}",
                transfer.offset
            );
            self.expected[here].copy_from_slice(&image);
            self.blocks[transfer.block].transfers.fetch_sub(1, SeqCst);
        }
        self.resets += 1;
        self.driver.negotiate(u64::MAX).unwrap();
        let queue = self.driver.add_queue(0, QUEUE_SIZE);
        std::mem::replace(&mut self.queue, queue).free();
        self.driver.driver_ok().unwrap();
    }

    fn image_at(&self, offset: usize) -> Vec<u8> {
        let mut image = vec![0; PAGE];
        self.image
            .as_file()
            .read_exact_at(&mut image, offset as u64)
            .unwrap();
        image
    }

    fn begin(&mut self, slot: u64) -> Option<Transfer> {
        let block = self.random.below(BLOCKS) as usize;
        let state = &self.blocks[block];
        state.transfers.fetch_add(1, SeqCst);
        if !state.open.load(SeqCst) {
            state.transfers.fetch_sub(1, SeqCst);
            return None;
        }
        let era = state.era.load(SeqCst);
        let page = page_of(block as u64, self.number, slot);
        // Each request of a batch has a part of the disk to itself.
        let offset = (self.random.below(64) * BATCH + slot) as usize * PAGE;
        let sector = (offset / 512) as u64;
        let (request, written) = if self.random.below(2) == 0 {
            (Request::read(&self.ram, sector, PAGE), None)
        } else {
            let bytes = fill(self.random.next());
            let reader = self.space.memory().register();
            // The memory may be gone by now; then there is nothing to write to the disk either.
            let _ = self.space.read(&reader).write_bytes(page, &bytes);
            (Request::write(&self.ram, sector, &bytes), Some(bytes))
        };
        let mut parts = request.parts();
        parts[1].gpa = page;
        self.queue.add(&parts, Layout::Direct).unwrap();
        Some(Transfer {
            request,
            block,
            era,
            page,
            offset,
            written,
        })
    }

    fn end(&mut self, transfer: Transfer) {
        let Transfer {
            request,
            block,
            era,
            page,
            offset,
            written,
        } = transfer;
        let state = &self.blocks[block];
        let here = offset..offset + PAGE;
        let ok = match request.status() {
            status::OK => true,
            status::IOERR => false,
            other => panic!("status {other}"),
        };
        let mut now = vec![0; PAGE];
        let reader = self.space.memory().register();
        let there = self.space.read(&reader).read_bytes(page, &mut now).is_ok();
        let steady = era.is_multiple_of(2) && state.era.load(SeqCst) == era;
        assert!(ok || !steady, "{page} was plugged all the time");
        match written {
            Some(bytes) if ok => self.expected[here.clone()].copy_from_slice(&bytes),
            Some(_) => {}
            None if steady => assert!(
                there && now == self.expected[here.clone()],
                "{page} does not hold what was read into it"
            ),
            None => {}
        }
        assert!(
            self.image_at(offset) == self.expected[here],
            "the image holds at {offset} what was never to be there"
        );
        match ok {
            true => self.moved += 1,
            false => self.refused += 1,
        }
        self.crossed += u64::from(ok && !steady && era.is_multiple_of(2));
        state.transfers.fetch_sub(1, SeqCst);
    }
}

#[test]
fn transfers_under_which_memory_goes() {
    let rig = Rig::new(BLOCKS * BLOCK, 0);
    let blocks: Arc<Vec<_>> = Arc::new((0..BLOCKS).map(|_| BlockState::default()).collect());
    for block in blocks.iter() {
        block.era.store(1, SeqCst);
    }
    let disks: Vec<_> = (0..DISKS)
        .map(|number| Transfers::new(&rig.board, &blocks, number))
        .collect();
    let mut walker = Walker {
        plugged: vec![false; BLOCKS as usize],
        blocks,
        random: Random(5),
        requests: 0,
        rig,
    };
    let stop = AtomicBool::new(false);
    let limit = Instant::now() + Duration::from_secs(240);
    std::thread::scope(|scope| {
        let stop = &stop;
        let running: Vec<_> = disks
            .into_iter()
            .map(|mut disk| {
                scope.spawn(move || {
                    disk.run(stop);
                    [disk.moved, disk.refused, disk.crossed, disk.resets]
                })
            })
            .collect();
        let mem = Arc::clone(&walker.rig.mem);
        let operator = scope.spawn(move || {
            let mut random = Random(6);
            while !stop.load(SeqCst) {
                mem.set_requested(random.below(BLOCKS + 1) * BLOCK).unwrap();
                std::thread::sleep(Duration::from_micros(random.below(20_000)));
            }
        });
        // The disks end also when the walk does not: its panic is the one to be seen.
        let walk = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while walker.requests < 1000 && running.iter().all(|disk| !disk.is_finished()) {
                walker.step();
                assert!(Instant::now() < limit, "{} requests", walker.requests);
            }
        }));
        stop.store(true, SeqCst);
        operator.join().unwrap();
        for disk in running {
            let [moved, refused, crossed, resets] = disk.join().unwrap();
            println!("{moved} moved, {refused} refused, {crossed} crossed, {resets} resets");
            assert!(
                moved > 300 && refused > 20 && crossed > 5 && resets > 5,
                "the walk is not random enough"
            );
        }
        if let Err(panic) = walk {
            std::panic::resume_unwind(panic);
        }
    });
    let metrics = walker.rig.mem.metrics();
    assert_eq!((metrics.plug.error, metrics.unplug.error), (0, 0));
}
