// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The watchdog as Linux's driver uses it, on a clock that the test turns, and its removal.

mod board;

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use board::{Board, INTX_DISABLE, Random, Slot, ready_within, wait};
use ebbtide_devices::i6300esb::{Action, I6300Esb, SharedAction};
use ebbtide_gate::Entry;
use ebbtide_iothread::{Config, IoThread, ManualClock};

const CONFIG: u64 = 0x60;
const LOCK: u64 = 0x68;
const TIMER1: u64 = 0;
const TIMER2: u64 = 4;
const STATUS: u64 = 8;
const RELOAD: u64 = 12;
const ENABLE: u32 = 2;

/// A board with a thread whose time the test makes.
struct Bench {
    board: Board,
    clock: ManualClock,
    thread: IoThread,
    action: Arc<SharedAction>,
    barks: Arc<Mutex<Vec<Action>>>,
}

impl Bench {
    fn new() -> Self {
        let clock = ManualClock::new();
        let config = Config {
            clock: clock.clock(),
            ..Config::default()
        };
        Self {
            board: Board::new(),
            thread: IoThread::spawn_with("timers", config).unwrap(),
            clock,
            action: Arc::default(),
            barks: Arc::default(),
        }
    }

    fn device(&self) -> Arc<I6300Esb> {
        let barks = Arc::clone(&self.barks);
        let bark = Box::new(move |action| barks.lock().unwrap().push(action));
        I6300Esb::new("watchdog0", &self.thread.remote(), &self.action, bark).unwrap()
    }

    fn plug(&self) -> (Arc<I6300Esb>, Slot<'_>) {
        let device = self.device();
        let slot = self.board.plug(device.clone());
        (device, slot)
    }

    /// Until the thread has done what it was woken for: a turn takes what came from outside, a timer that is due is heard
    /// of at its end, and its task runs in the next one. Each answer here is from a later turn than the last.
    fn settle(&self) {
        for _ in 0..4 {
            let (done, wait) = mpsc::channel();
            let job = move |_| async move { done.send(()).unwrap() };
            self.thread.remote().spawn(job).unwrap();
            wait.recv_timeout(Duration::from_secs(60)).unwrap();
        }
    }

    /// Time passes, after everything ordered before has been taken.
    fn pass(&self, millis: u64) {
        self.settle();
        self.clock.advance(Duration::from_millis(millis));
        self.settle();
    }

    fn barks(&self) -> Vec<Action> {
        std::mem::take(&mut self.barks.lock().unwrap())
    }
}

fn unlock(slot: &Slot<'_>) {
    slot.store(0, RELOAD, 2, 0x80);
    slot.store(0, RELOAD, 2, 0x86);
}

fn keepalive(slot: &Slot<'_>) {
    unlock(slot);
    slot.store(0, RELOAD, 2, 0x100);
}

/// What the driver does at probe and at open: two stages of half the time each.
fn start(slot: &Slot<'_>, seconds: u64) {
    slot.set_config(CONFIG, 2, 3);
    slot.set_config(LOCK, 1, 0);
    for timer in [TIMER1, TIMER2] {
        unlock(slot);
        slot.store(0, timer, 4, seconds << 9);
    }
    keepalive(slot);
    slot.set_config(LOCK, 1, ENABLE);
}

#[test]
fn it_is_what_linux_looks_for() {
    let bench = Bench::new();
    let (_device, slot) = bench.plug();
    assert_eq!(slot.config(0, 4), 0x25ab_8086);
    assert_eq!(slot.config(0x3d, 1), 1, "INTA#");
    assert_eq!(slot.config(CONFIG, 4), 0);
    slot.set_config(CONFIG, 2, 0xffff);
    assert_eq!(slot.config(CONFIG, 2), 0x27);
    assert_eq!(slot.config(CONFIG + 1, 1), 0);
    assert_eq!(slot.load(0, TIMER1, 8), 0x000f_ffff_000f_ffff);
    assert_eq!(slot.load(0, 16, 4), 0);
}

#[test]
fn a_guest_that_answers_lives_and_one_that_does_not_is_reset() {
    let bench = Bench::new();
    let (_device, slot) = bench.plug();
    start(&slot, 30);
    for _ in 0..10 {
        bench.pass(29_000);
        keepalive(&slot);
    }
    assert!(bench.barks().is_empty());
    assert_eq!(slot.load(0, RELOAD, 2), 0);
    bench.pass(15_100);
    assert_eq!(slot.load(0, STATUS, 4), 1, "the second stage");
    assert!(!slot.line().is_high() && bench.barks().is_empty());
    bench.pass(15_000);
    assert!(bench.barks().is_empty(), "30.2 s");
    bench.pass(200);
    assert_eq!(bench.barks(), [Action::Reset]);
    assert_eq!(slot.load(0, RELOAD, 2), 0x200);
    bench.pass(3_600_000);
    assert!(bench.barks().is_empty(), "once");
    // The next system learns of it, and clears it.
    bench.board.bridge.reset();
    bench.board.bridge.assign_bars().unwrap();
    assert_eq!(slot.load(0, RELOAD, 2), 0x200);
    unlock(&slot);
    slot.store(0, RELOAD, 2, 0x300);
    assert_eq!(slot.load(0, RELOAD, 2), 0);
}

#[test]
fn it_can_be_stopped_unless_it_is_locked() {
    let bench = Bench::new();
    let (_device, slot) = bench.plug();
    start(&slot, 2);
    bench.pass(1_500);
    slot.set_config(LOCK, 1, 0);
    bench.pass(60_000);
    assert!(bench.barks().is_empty());
    slot.set_config(LOCK, 1, ENABLE | 1);
    slot.set_config(LOCK, 4, 0);
    assert_eq!(slot.config(LOCK, 1), 3, "no way out");
    bench.action.set(Action::Pause);
    bench.pass(1_100);
    bench.pass(1_100);
    assert_eq!(bench.barks(), [Action::Pause], "the action of the moment");
}

#[test]
fn the_first_stage_interrupts_until_it_is_acknowledged() {
    let bench = Bench::new();
    let (_device, slot) = bench.plug();
    start(&slot, 2);
    slot.set_config(CONFIG, 2, 0);
    bench.pass(1_010);
    assert!(slot.line().is_high());
    assert_eq!(slot.config(6, 2) & 8, 8);
    slot.store(0, STATUS, 4, 1);
    assert!(!slot.line().is_high());
    keepalive(&slot);
    bench.pass(1_010);
    assert!(slot.line().is_high() && bench.barks().is_empty());
    bench.board.bridge.reset();
    assert!(!slot.line().is_high());
    bench.pass(60_000);
    assert!(bench.barks().is_empty(), "a reset stops it");
}

#[test]
fn quiesced_it_is_as_at_power_on_but_for_the_sticky_bit() {
    let bench = Bench::new();
    let (device, slot) = bench.plug();
    start(&slot, 2);
    bench.pass(1_010);
    bench.pass(1_010);
    assert_eq!(bench.barks(), [Action::Reset]);
    start(&slot, 2);
    bench.pass(900);
    wait(device.quiesce());
    bench.pass(60_000);
    assert!(bench.barks().is_empty());
    assert_eq!(slot.config(LOCK, 1), 0);
    assert_eq!(slot.load(0, TIMER1, 8), 0x000f_ffff_000f_ffff);
    assert_eq!(slot.load(0, RELOAD, 2), 0x200);
}

#[test]
fn time_stands_still_with_the_machine() {
    let bench = Bench::new();
    let (device, slot) = bench.plug();
    start(&slot, 2);
    bench.pass(900);
    device.pause();
    device.pause();
    bench.pass(3_600_000);
    device.resume();
    bench.pass(100);
    assert_eq!(slot.load(0, STATUS, 4), 0, "983 ms of the machine's time");
    bench.pass(10);
    assert_eq!(slot.load(0, STATUS, 4), 1);
    device.pause();
    keepalive(&slot);
    bench.pass(10_000);
    device.resume();
    bench.pass(950);
    assert!(bench.barks().is_empty());
    bench.pass(60);
    bench.pass(1_010);
    assert_eq!(bench.barks(), [Action::Reset]);
}

#[test]
fn removed_with_its_timer_pending_it_is_silent_and_leaves_no_task() {
    let bench = Bench::new();
    let (device, slot) = bench.plug();
    start(&slot, 2);
    bench.pass(1_500);
    let bar = slot.bar(0);
    let closed = device.close();
    let reader = bench.board.memory.register();
    assert_eq!(bench.board.space.load(&reader, bar, 4), 0xffff_ffff);
    bench.pass(60_000);
    drop(slot.remove(closed));
    assert!(bench.barks().is_empty());
    assert_eq!(Arc::strong_count(&device), 1);
    drop(device);
    assert_eq!(Arc::strong_count(&bench.barks), 1);
    assert_eq!(Arc::strong_count(&bench.action), 1);
}

#[test]
fn a_shut_gate_is_enough_to_silence_it() {
    // Isolation comes first, on a vCPU's thread; the rest may come much later.
    let bench = Bench::new();
    let (device, slot) = bench.plug();
    start(&slot, 2);
    device.gate().close();
    bench.pass(5_000);
    bench.pass(5_000);
    assert!(bench.barks().is_empty());
    drop(slot.remove(device.close()));
}

#[test]
fn the_removal_waits_for_a_bark_that_is_under_way() {
    let bench = Bench::new();
    let (barking, heard) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel::<()>();
    let bark = Mutex::new((barking, goes_on));
    let bark = Box::new(move |_| {
        let bark = bark.lock().unwrap();
        bark.0.send(()).unwrap();
        bark.1.recv().unwrap();
    });
    let device = I6300Esb::new("watchdog0", &bench.thread.remote(), &bench.action, bark).unwrap();
    let slot = bench.board.plug(device.clone());
    start(&slot, 2);
    bench.pass(1_010);
    bench.settle();
    bench.clock.advance(Duration::from_secs(2));
    heard.recv_timeout(Duration::from_secs(60)).unwrap();
    let mut closed = Box::pin(device.close());
    assert!(ready_within(&mut closed, Duration::from_millis(20)).is_none());
    go_on.send(()).unwrap();
    drop(slot.remove(closed));
}

#[test]
fn dropped_without_ceremony_it_leaves_no_task() {
    let bench = Bench::new();
    let (device, slot) = bench.plug();
    start(&slot, 2);
    device.gate().close();
    let at = ebbtide_bus::pci::Devfn::new(slot.slot, 0).unwrap();
    bench.board.bridge.unmap(at).unwrap();
    wait(device.gate().drained());
    drop(bench.board.bridge.detach(slot.slot).unwrap());
    drop(device);
    bench.pass(10_000);
    assert_eq!(Arc::strong_count(&bench.barks), 1);
}

#[test]
fn a_thread_that_is_gone_is_an_error() {
    let thread = IoThread::spawn("gone").unwrap();
    let remote = thread.remote();
    drop(thread);
    let error = I6300Esb::new("watchdog0", &remote, &Arc::default(), Box::new(|_| ()));
    let error = error.err().unwrap().to_string();
    assert!(error.contains("watchdog0: thread gone"), "{error}");
}

#[test]
fn a_reload_counts_though_the_time_is_up_as_long_as_nobody_has_noticed() {
    let bench = Bench::new();
    let (_device, slot) = bench.plug();
    start(&slot, 2);
    bench.pass(1_010);
    bench.settle();
    // The thread is busy while the second stage ends.
    let (busy, is_busy) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel::<()>();
    let job = move |_| async move {
        busy.send(()).unwrap();
        goes_on.recv().unwrap();
    };
    bench.thread.remote().spawn(job).unwrap();
    is_busy.recv_timeout(Duration::from_secs(60)).unwrap();
    bench.clock.advance(Duration::from_secs(2));
    keepalive(&slot);
    go_on.send(()).unwrap();
    bench.pass(900);
    assert!(bench.barks().is_empty());
    assert_eq!(slot.load(0, RELOAD, 2), 0);
}

#[test]
fn any_access_is_harmless() {
    let bench = Bench::new();
    let (device, slot) = bench.plug();
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..30_000 {
        let (value, size) = (random.next(), [1, 2, 4, 8][random.below(4) as usize]);
        match random.below(16) {
            0..=3 => slot.store(0, random.below(24), size, value),
            4 | 5 => unlock(&slot),
            6 | 7 => slot.store(0, RELOAD, 2, value & 0x300),
            8 => drop(slot.load(0, random.below(24), size)),
            9 | 10 => {
                let at = CONFIG + random.below(12);
                slot.set_config(at, size.min(4), value as u32);
            }
            11 => drop(slot.config(CONFIG + random.below(12), size.min(4))),
            12 => slot.set_config(4, 2, 2 | value as u32 & INTX_DISABLE),
            13 => bench
                .clock
                .advance(Duration::from_millis(value % 2_000_000)),
            14 if value & 63 == 0 => {
                bench.board.bridge.reset();
                bench.board.bridge.assign_bars().unwrap();
            }
            _ if value & 1 == 0 => device.pause(),
            _ => device.resume(),
        }
    }
    bench.settle();
    let lease = device.gate().enter(Entry::Io);
    assert!(lease.is_some());
    drop(lease);
    // Whatever it was told: after a reset it is as new.
    device.resume();
    bench.board.bridge.reset();
    bench.board.bridge.assign_bars().unwrap();
    bench.settle();
    bench.barks();
    start(&slot, 2);
    bench.pass(1_010);
    bench.pass(1_010);
    assert_eq!(bench.barks(), [Action::Reset]);
    drop(slot.remove(device.close()));
}
