// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The balloon: pages go and come back, somebody forbids it, reports, statistics, drivers that misbehave.

use std::sync::Arc;
use std::time::Duration;

use ebbtide_iothread::{Receiver, channel};
use ebbtide_lab_driver::{Board, DriverQueue, Layout, Part, VirtioDriver, common, poll};
use ebbtide_memory::{Access, Backing, Gpa, RamSpec, Region};
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::balloon::{BalloonEvent, BalloonSpec, Stat, VirtioBalloon, feature};
use ebbtide_virtio::status;

const RAM_BYTES: u64 = 32 << 20;
const PAGE: u64 = 4096;
const ALL: u64 = u64::MAX;
const SOON: Duration = Duration::from_millis(50);

struct Rig {
    board: Board,
    balloon: Arc<VirtioBalloon>,
    driver: VirtioDriver,
    queues: Vec<DriverQueue>,
    events: Receiver<BalloonEvent>,
}

fn spec() -> BalloonSpec {
    let mut spec = BalloonSpec::new("balloon0");
    spec.free_page_reporting = true;
    spec.deflate_on_oom = true;
    spec
}

impl Rig {
    fn new() -> Rig {
        Rig::with(spec(), ALL, 4)
    }

    fn with(spec: BalloonSpec, features: u64, queues: u16) -> Rig {
        let board = Board::new(RAM_BYTES).unwrap();
        let (sender, events) = channel();
        let balloon = VirtioBalloon::new(spec, board.remote(), sender);
        let function = VirtioPci::new(
            "balloon0",
            Arc::clone(&balloon) as _,
            board.space(),
            board.interrupts(),
            &board.remote(),
        )
        .unwrap();
        let mut driver = VirtioDriver::attach(&board, function as _, features).unwrap();
        let queues = start(&mut driver, queues);
        Rig {
            board,
            balloon,
            driver,
            queues,
            events,
        }
    }

    fn restart(&mut self) {
        self.driver.negotiate(ALL).unwrap();
        self.queues = start(&mut self.driver, 4);
    }

    /// Names pages on a queue and waits for the answer.
    fn name(&mut self, queue: u16, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let ram = self.board.ram().clone();
        let gpa = ram.alloc(bytes.len(), 4);
        ram.write(gpa, &bytes);
        self.exchange(queue, &[Part::readable(gpa, bytes.len())]);
        ram.free(gpa, bytes.len());
    }

    fn exchange(&mut self, queue: u16, parts: &[Part]) {
        let rings = &mut self.queues[usize::from(queue)];
        let used = self
            .driver
            .roundtrip(queue, rings, parts, Layout::Direct)
            .unwrap();
        assert_eq!(used.written, 0);
    }

    /// `count` pages of sevens, one behind the other.
    fn pages(&self, count: usize, align: u64) -> Gpa {
        let len = count * PAGE as usize;
        let gpa = self.board.ram().alloc(len, align);
        self.board.ram().write(gpa, &vec![7; len]);
        gpa
    }

    /// The first byte of a page.
    fn byte(&self, gpa: Gpa, page: u64) -> u8 {
        self.board.ram().get(Gpa(gpa.0 + page * PAGE))
    }
}

fn start(driver: &mut VirtioDriver, queues: u16) -> Vec<DriverQueue> {
    let queues = (0..queues).map(|at| driver.add_queue(at, 64)).collect();
    driver.driver_ok().unwrap();
    queues
}

fn number(gpa: Gpa, page: u64) -> u32 {
    u32::try_from(gpa.0 / PAGE + page).unwrap()
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let mut rig = Rig::new();
    let gpa = rig.pages(6, PAGE);
    // As Linux names them: from the highest down.
    rig.name(0, &[4, 2, 1].map(|page| number(gpa, page)));
    let bytes = [0, 1, 2, 3, 4, 5].map(|page| rig.byte(gpa, page));
    assert_eq!(bytes, [7, 0, 0, 7, 0, 7]);
    rig.board.ram().write(gpa, &vec![8; 6 * PAGE as usize]);
    rig.name(1, &[number(gpa, 1), number(gpa, 2)]);
    assert_eq!(rig.byte(gpa, 1), 8, "deflating changes nothing");
    let metrics = rig.balloon.metrics();
    assert_eq!((metrics.inflated_pages, metrics.deflated_pages), (3, 2));
    assert_eq!((metrics.discarded_bytes, metrics.not_ram), (3 * PAGE, 0));
}

#[test]
fn more_pages_than_one_step() {
    let mut rig = Rig::new();
    let gpa = rig.pages(1000, PAGE);
    let named: Vec<_> = (0..1000).map(|page| number(gpa, page)).collect();
    rig.name(0, &named);
    assert!((0..1000).all(|page| rig.byte(gpa, page) == 0));
    assert_eq!(rig.balloon.metrics().discarded_bytes, 1000 * PAGE);
}

/// Nobody is told of a balloon's discards: who cannot bear that forbids them, and the guest notices nothing.
#[test]
fn forbidden_discards_are_left_out() {
    let mut rig = Rig::new();
    let gpa = rig.pages(2, PAGE);
    let rules = rig.board.memory().discards().clone();
    for token in [rules.disable("gpu0"), rules.disable_uncoordinated("gpu0")] {
        let _token = token.unwrap();
        rig.name(0, &[number(gpa, 0)]);
        rig.exchange(3, &[Part::writable(gpa, PAGE as usize)]);
        assert_eq!(rig.byte(gpa, 0), 7);
    }
    let metrics = rig.balloon.metrics();
    assert_eq!((metrics.kept_bytes, metrics.discarded_bytes), (4 * PAGE, 0));
    // Who coordinates, as virtio-mem does, is not in the way.
    let _token = rules.require_coordinated("vmem0").unwrap();
    rig.name(0, &[number(gpa, 1)]);
    assert_eq!(rig.byte(gpa, 1), 0);
}

#[test]
fn reported_pages_are_the_hosts_until_they_are_used() {
    let mut rig = Rig::new();
    let gpa = rig.pages(8, PAGE);
    let at = |byte: u64, len: u64| Part::writable(Gpa(gpa.0 + byte), len as usize);
    // Only whole pages go.
    rig.exchange(
        3,
        &[at(0, PAGE), at(2 * PAGE - 1, 2 * PAGE), at(5 * PAGE, 100)],
    );
    let bytes = [0, 1, 2, 3, 4, 5].map(|page| rig.byte(gpa, page));
    assert_eq!(bytes, [0, 7, 0, 7, 7, 7]);
    let metrics = rig.balloon.metrics();
    assert_eq!(metrics.discarded_bytes, 2 * PAGE);
    assert_eq!(metrics.reported_bytes, 3 * PAGE + 100);
}

/// The numbers of queues depend on how a driver reads the specification.
#[test]
fn the_reporting_queue_is_where_drivers_look_for_it() {
    for (features, queue) in [(ALL, 4), (ALL & !feature::STATS_VQ, 2)] {
        let mut rig = Rig::with(spec(), features, queue + 1);
        let gpa = rig.pages(1, PAGE);
        rig.exchange(queue, &[Part::writable(gpa, PAGE as usize)]);
        assert_eq!(rig.byte(gpa, 0), 0, "queue {queue}");
    }
}

#[test]
fn only_what_was_asked_for_is_offered() {
    let plain = Rig::with(BalloonSpec::new("balloon0"), ALL, 3);
    let own = plain.driver.features() & 0xff;
    assert_eq!(own, feature::STATS_VQ);
    let rig = Rig::new();
    let own = rig.driver.features() & 0xff;
    assert_eq!(
        own,
        feature::STATS_VQ | feature::DEFLATE_ON_OOM | feature::PAGE_REPORTING
    );
}

#[test]
fn sizes_and_events() {
    let mut rig = Rig::new();
    let message = rig.driver.config_message();
    let before = rig.driver.interrupts(message);
    rig.balloon
        .set_size(RAM_BYTES - 5 * PAGE + 1, RAM_BYTES)
        .unwrap();
    assert!(rig.driver.wait_interrupt(message, before + 1));
    assert_eq!(rig.driver.read_config(0, 4), 4);
    assert_eq!(rig.balloon.target_bytes(), 4 * PAGE);
    assert_eq!(rig.events.try_recv(), None);
    for actual in [3, 3, 4] {
        rig.driver.write_config(4, 4, actual);
    }
    assert_eq!(rig.driver.read_config(4, 4), 4);
    for pages in [3, 4] {
        let event = BalloonEvent::Changed {
            id: "balloon0".into(),
            ballooned_bytes: pages * PAGE,
        };
        assert_eq!(rig.events.try_recv(), Some(event));
    }
    assert_eq!(rig.events.try_recv(), None);
    assert_eq!(rig.balloon.actual_bytes(RAM_BYTES), RAM_BYTES - 4 * PAGE);
    // Nothing else can be written.
    rig.driver.write_config(0, 4, 99);
    rig.driver.write_config(8, 4, 99);
    assert_eq!(rig.driver.read_config(0, 4), 4);
    assert_eq!(rig.driver.read_config(8, 4), 0);
    rig.balloon.set_size(u64::MAX, RAM_BYTES).unwrap();
    assert_eq!(rig.balloon.target_bytes(), 0);
    let error = rig
        .balloon
        .set_size(1 << 20, 1 << 50)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("1048576") && error.contains("balloon0"),
        "{error}"
    );
    // The next driver begins with an empty balloon.
    rig.restart();
    assert_eq!(rig.balloon.ballooned_bytes(), 0);
    assert!(matches!(
        rig.events.try_recv(),
        Some(BalloonEvent::Changed {
            ballooned_bytes: 0,
            ..
        })
    ));
}

fn fill(rig: &Rig, gpa: Gpa, free: u64) {
    let mut bytes = Vec::new();
    for (tag, value) in [(4_u16, free), (5, RAM_BYTES)] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    rig.board.ram().write(gpa, &bytes);
}

fn send_stats(rig: &mut Rig, gpa: Gpa, free: u64) {
    fill(rig, gpa, free);
    rig.queues[2]
        .add(&[Part::readable(gpa, 20)], Layout::Direct)
        .unwrap();
    if rig.queues[2].needs_kick() {
        rig.driver.kick(2);
    }
    assert!(poll(
        || rig.balloon.stats().get(Stat::FreeMemory) == Some(free)
    ));
}

#[test]
fn statistics_when_they_are_wanted() {
    let mut rig = Rig::new();
    assert_eq!(rig.balloon.stats().updated, None);
    let gpa = rig.board.ram().alloc(20, 8);
    send_stats(&mut rig, gpa, 1000);
    assert_eq!(rig.balloon.stats().get(Stat::TotalMemory), Some(RAM_BYTES));
    assert_eq!(rig.balloon.stats().get(Stat::SwapIn), None);
    std::thread::sleep(SOON);
    assert!(rig.queues[2].poll_used().is_none(), "nobody asked");
    for free in 1..5 {
        rig.balloon.refresh_stats();
        rig.driver.wait_used(&mut rig.queues[2]).unwrap();
        send_stats(&mut rig, gpa, free);
    }
    rig.balloon.set_stats_interval(Duration::from_millis(20));
    for free in 5..10 {
        rig.driver.wait_used(&mut rig.queues[2]).unwrap();
        send_stats(&mut rig, gpa, free);
    }
    rig.balloon.set_stats_interval(Duration::ZERO);
    rig.driver.reset().unwrap();
    rig.restart();
    assert_eq!(rig.balloon.stats().updated, None, "those of another driver");
    assert_eq!(rig.balloon.metrics().stats, 10);
}

/// A second buffer of statistics is one too many: the first comes back.
#[test]
fn one_buffer_of_statistics_is_kept() {
    let mut rig = Rig::new();
    let gpas = [0, 1].map(|_| rig.board.ram().alloc(20, 8));
    send_stats(&mut rig, gpas[0], 1);
    send_stats(&mut rig, gpas[1], 2);
    rig.driver.wait_used(&mut rig.queues[2]).unwrap();
    std::thread::sleep(SOON);
    assert!(rig.queues[2].poll_used().is_none());
}

/// Numbers of pages that are no RAM are left out; those beside them are not.
#[test]
fn pages_that_are_none() {
    let mut rig = Rig::new();
    let gpa = rig.pages(1, PAGE);
    let beyond = u32::try_from(RAM_BYTES / PAGE).unwrap();
    rig.name(0, &[u32::MAX, beyond, 0xe_0000, number(gpa, 0)]);
    assert_eq!(rig.byte(gpa, 0), 0);
    assert_eq!(rig.balloon.metrics().not_ram, 3);
    rig.exchange(3, &[Part::writable(Gpa(1 << 40), 8192)]);
    assert_eq!(rig.balloon.metrics().not_ram, 4);
    // An odd end of a list, an empty list, a list the wrong way round.
    let list = rig.board.ram().alloc(7, 4);
    rig.exchange(0, &[Part::readable(list, 7)]);
    rig.exchange(0, &[Part::readable(list, 3)]);
    rig.exchange(0, &[Part::writable(list, 4)]);
    assert!(!rig.driver.needs_reset());
    assert_eq!(rig.balloon.metrics().inflated_pages, 2);
}

#[test]
fn lists_that_are_not_in_ram() {
    for queue in [0, 1, 2] {
        let mut rig = Rig::new();
        let parts = [Part::readable(Gpa(1 << 35), 64)];
        rig.queues[queue].add(&parts, Layout::Direct).unwrap();
        rig.driver.kick(queue as u16);
        assert!(rig.driver.wait_needs_reset());
        rig.restart();
        let gpa = rig.pages(1, PAGE);
        rig.name(0, &[number(gpa, 0)]);
        assert_eq!(rig.byte(gpa, 0), 0);
    }
}

/// What a guest unplugged is not touched, and a page under a transfer stays where it is.
#[test]
fn memory_that_is_going() {
    let mut rig = Rig::new();
    let ram = RamSpec {
        name: "dimm".into(),
        size_bytes: 4 << 20,
        max_size_bytes: 4 << 20,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: Some(2 << 20),
    };
    let block = rig.board.memory().ram().add(ram).unwrap();
    let base = Gpa(8 << 30);
    let region = Region::ram("dimm", &block);
    rig.board
        .memory()
        .update(|map| map.add(rig.board.root(), &region, base.0, 0))
        .unwrap();
    block.plug(0..2 << 20, false).unwrap();
    let plugged = number(base, 0);
    rig.name(0, &[plugged, plugged + 512]);
    let metrics = rig.balloon.metrics();
    assert_eq!((metrics.discarded_bytes, metrics.not_ram), (PAGE, 1));
    let gpa = rig.pages(1, PAGE);
    let pin = {
        let space = rig.board.space();
        let reader = space.memory().register();
        let guard = space.read(&reader);
        guard.pin(gpa, 512, Access::Write).unwrap()
    };
    rig.name(0, &[number(gpa, 0)]);
    pin.write_at(0, &[9; 512]).unwrap();
    drop(pin);
    assert_eq!(rig.byte(gpa, 0), 9);
}

/// A chain that names gigabytes is given up by a reset, and a reset queue is not touched.
#[test]
fn resets_end_long_chains() {
    let mut rig = Rig::new();
    let list = rig.pages(1000, PAGE);
    let parts: Vec<_> = (0..30)
        .map(|_| Part::readable(list, 1000 * PAGE as usize))
        .collect();
    for round in 0..5 {
        rig.queues[0].add(&parts, Layout::Direct).unwrap();
        rig.driver.kick(0);
        std::thread::sleep(Duration::from_millis(round * 5));
        rig.driver.write_common(common::STATUS, 1, 0);
        assert!(poll(|| rig.driver.status() == 0));
        let used = rig.queues[0].device_used_idx();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(rig.queues[0].device_used_idx(), used);
        rig.restart();
    }
    assert_eq!(rig.driver.status() & status::NEEDS_RESET, 0);
}
