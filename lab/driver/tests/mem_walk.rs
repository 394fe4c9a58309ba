// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory device and a driver that behaves as Linux does, with an operator who cannot make up his mind and disks
//! that transfer into memory the driver gives back.

mod plugging;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ebbtide_lab_driver::Random;
use ebbtide_lab_driver::mem::{Answer, Kind, State};
use ebbtide_memory::{Access, AddressSpace, Gpa};
use ebbtide_virtio::mem::{MemEvent, Progress, VirtioMem};
use plugging::{BASE, BLOCK, GIB, Rig};

const REGION_BLOCKS: usize = 1024;

/// What Linux knows of the device: its own books, which it warns about when they do not fit.
struct Linux {
    rig: Rig,
    plugged: Vec<bool>,
    random: Random,
    /// Configuration interrupts it has seen.
    seen: u64,
    requests: u64,
    nacks: u64,
    busy: u64,
}

impl Linux {
    fn new(rig: Rig, seed: u64) -> Linux {
        let seen = rig.config_interrupts();
        let plugged = vec![false; REGION_BLOCKS];
        Linux {
            rig,
            plugged,
            random: Random(seed),
            seen,
            requests: 0,
            nacks: 0,
            busy: 0,
        }
    }

    fn count(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64
    }

    fn config_changed(&mut self) -> bool {
        let now = self.rig.config_interrupts();
        std::mem::replace(&mut self.seen, now) != now
    }

    fn run_of(&self, state: bool, usable: u64) -> Option<(usize, usize)> {
        let list = &self.plugged[..usable as usize];
        if state {
            // The highest address first.
            let last = list.iter().rposition(|plugged| *plugged)?;
            let first = list[..last]
                .iter()
                .rposition(|plugged| !*plugged)
                .map_or(0, |at| at + 1);
            Some((first, last + 1 - first))
        } else {
            let first = list.iter().position(|plugged| !*plugged)?;
            let len = list[first..]
                .iter()
                .position(|plugged| *plugged)
                .unwrap_or(list.len() - first);
            Some((first, len))
        }
    }

    /// One round of the driver's work; false when there was nothing to do.
    fn step(&mut self) -> bool {
        let requested = self.rig.requested() / BLOCK;
        let usable = self.rig.usable() / BLOCK;
        assert!(usable >= requested);
        let have = self.count();
        let plug = requested > have;
        let Some((first, len)) = (requested != have)
            .then(|| self.run_of(!plug, usable))
            .flatten()
        else {
            return false;
        };
        let len = len
            .min(requested.abs_diff(have) as usize)
            .min(1 + self.random.below(64) as usize);
        let first = if plug {
            first
        } else {
            first + self.run_of(true, usable).unwrap().1 - len
        };
        let kind = if plug { Kind::Plug } else { Kind::Unplug };
        self.requests += 1;
        match self.rig.ask(kind, first as u64, len as u16) {
            Answer::Ack => self.plugged[first..first + len].fill(plug),
            Answer::Nack => {
                assert!(plug, "unplugging is never too much");
                // Linux tries again at once; what made it too much must be visible by now.
                assert!(self.config_changed() || self.rig.requested() / BLOCK != requested);
                self.nacks += 1;
            }
            Answer::Busy => self.busy += 1,
            answer => panic!(
                "{kind:?} of {len} blocks from {first} on: {answer:?} marks the driver broken"
            ),
        }
        assert_eq!(
            self.rig.plugged() / BLOCK,
            self.count(),
            "the plugged size is not what Linux expects"
        );
        if self.random.below(50) == 0 {
            self.look();
        }
        true
    }

    /// Compares the books with the device's.
    fn look(&mut self) {
        let at = self.random.below(self.plugged.len() as u64) as usize;
        let expected = if self.plugged[at] {
            State::Plugged
        } else {
            State::Unplugged
        };
        if let Some(state) = self.rig.state(at as u64, 1) {
            assert_eq!(state, expected, "block {at}");
        }
    }
}

/// Changes the target at random times until told to stop.
fn restless(mem: Arc<VirtioMem>, stop: Arc<AtomicBool>, changes: Arc<AtomicU64>) {
    let mut random = Random(99);
    while !stop.load(Ordering::Relaxed) {
        mem.set_requested(random.below(REGION_BLOCKS as u64 + 1) * BLOCK)
            .unwrap();
        changes.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(random.below(3000)));
    }
}

/// Transfers into the region, as disks do: pins, and checks that what it pinned stays what it wrote.
fn transfers(space: Arc<AddressSpace>, stop: Arc<AtomicBool>, disk: u64, done: Arc<AtomicU64>) {
    let mut random = Random(disk);
    // Two disks may transfer into the same page; each has its own word in it.
    let word_at = 64 + 8 * disk as usize;
    while !stop.load(Ordering::Relaxed) {
        let gpa = Gpa(BASE + random.below(REGION_BLOCKS as u64) * BLOCK + random.below(500) * 4096);
        let pin = {
            let reader = space.memory().register();
            space.read(&reader).pin(gpa, 512, Access::ReadWrite)
        };
        let Ok(pin) = pin else { continue };
        let word = random.next().to_le_bytes();
        pin.write_at(word_at, &word).unwrap();
        for _ in 0..random.below(4) {
            std::thread::sleep(Duration::from_micros(random.below(200)));
            let mut now = [0; 8];
            pin.read_at(word_at, &mut now).unwrap();
            assert_eq!(now, word, "memory at {gpa} was discarded under a transfer");
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn ten_thousand_steps() {
    let rig = Rig::new(REGION_BLOCKS as u64 * BLOCK, 0);
    let mut linux = Linux::new(rig, 7);
    let stop = Arc::new(AtomicBool::new(false));
    let (changes, transferred) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut threads = vec![std::thread::spawn({
        let (mem, stop, changes) = (
            Arc::clone(&linux.rig.mem),
            Arc::clone(&stop),
            Arc::clone(&changes),
        );
        move || restless(mem, stop, changes)
    })];
    for disk in 0..2 {
        let (space, stop, done) = (
            Arc::clone(linux.rig.board.space()),
            Arc::clone(&stop),
            Arc::clone(&transferred),
        );
        threads.push(std::thread::spawn(move || {
            transfers(space, stop, disk, done)
        }));
    }
    let limit = Instant::now() + Duration::from_secs(300);
    while linux.requests < 10_000 {
        if !linux.step() {
            std::thread::sleep(Duration::from_micros(100));
        }
        assert!(
            Instant::now() < limit,
            "{} requests in five minutes",
            linux.requests
        );
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(changes.load(Ordering::Relaxed) > 100 && transferred.load(Ordering::Relaxed) > 100);
    // It converges, wherever it was.
    for target in [0, REGION_BLOCKS as u64, 333, 0] {
        linux.rig.mem.set_requested(target * BLOCK).unwrap();
        while linux.step() {}
        assert_eq!(linux.count(), target);
        assert_eq!(linux.rig.mem.status().progress, Progress::Reached);
    }
    let metrics = linux.rig.mem.metrics();
    assert_eq!(
        (
            metrics.plug.error,
            metrics.unplug.error,
            metrics.state.error
        ),
        (0, 0, 0)
    );
    assert_eq!(linux.busy, 0, "late answers do");
    assert!(
        linux.nacks > 0,
        "the target never fell under a plug: the walk is not random enough"
    );
    let last = |event: &MemEvent| {
        !matches!(
            event,
            MemEvent::TargetReached {
                plugged_bytes: 0,
                ..
            }
        )
    };
    assert!(linux.rig.event(last).is_some());
}

/// A host that fails now and then makes things slow, never wrong.
#[test]
fn an_unreliable_host() {
    use ebbtide_virtio::mem::fault::Step;
    let rig = Rig::with(GIB, 0, |spec| spec.patience = plugging::impatient());
    let mut linux = Linux::new(rig, 8);
    linux.plugged.truncate((GIB / BLOCK) as usize);
    let mut random = Random(3);
    for round in 0..150 {
        linux
            .rig
            .mem
            .set_requested(random.below(GIB / BLOCK + 1) * BLOCK)
            .unwrap();
        if round % 10 == 0 {
            linux.rig.faults.fail(Step::Plug, random.below(5) as u32);
            linux.rig.faults.fail(Step::Discard, random.below(5) as u32);
        }
        while linux.step() {}
        assert_eq!(linux.rig.mem.status().progress, Progress::Reached);
    }
    assert!(linux.rig.mem.metrics().host_failures > 10);
}
