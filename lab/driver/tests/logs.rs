// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! No guest fills the host's log, whatever it does.

mod card;
mod device;
mod disk;
mod plugging;
mod ports;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use ebbtide_lab_driver::mem::{Answer, Kind, Request};
use ebbtide_lab_driver::{Board, Layout, Part};
use ebbtide_memory::Gpa;
use ebbtide_virtio::mem::Patience;
use ebbtide_virtio::mem::fault::Step;
use ebbtide_virtio::rng::{Builtin, RngBackend, RngSpec, VirtioRng};
use plugging::{BASE, GIB, MIB};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Where the messages of this process came from.
static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Hears warnings and errors.
struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let place = format!(
            "{}:{}",
            metadata.file().unwrap_or_default(),
            metadata.line().unwrap_or_default()
        );
        HEARD.lock().unwrap().push(place);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Messages of `f` from one place in the code.
fn heard(place: &str, f: impl FnOnce()) -> usize {
    let count = || {
        let heard = HEARD.lock().unwrap();
        heard.iter().filter(|it| it.contains(place)).count()
    };
    let before = count();
    f();
    count() - before
}

/// One test, for the log is the process's.
#[test]
fn a_guest_cannot_fill_the_log() {
    tracing::subscriber::set_global_default(Listener).unwrap();
    // In ten seconds five are allowed.
    let begun = Instant::now();
    let few =
        |count: usize| (1..=10 + 5 * (begun.elapsed().as_secs() / 10) as usize).contains(&count);

    let mut rig = plugging::Rig::with(GIB, 64 * MIB, |spec| {
        spec.patience = Patience {
            drain: Duration::ZERO,
            host: Duration::ZERO,
        };
    });
    rig.faults.fail(Step::Plug, u32::MAX);
    let failing = heard("mem/blocks.rs", || {
        for _ in 0..200 {
            assert_eq!(rig.plug(0, 1), Answer::Busy);
        }
    });
    assert!(few(failing), "{failing} for a host that fails");

    let malformed = heard("mem/serve.rs", || {
        for _ in 0..100 {
            let request = Request::raw(rig.board.ram(), 9, BASE, 1);
            rig.queue.add(&request.parts(), Layout::Direct).unwrap();
            rig.driver.kick(0);
            assert!(rig.driver.wait_needs_reset());
            rig.restart();
        }
    });
    assert!(few(malformed), "{malformed} for no requests");
    assert_eq!(rig.ask(Kind::State, 0, 1), Answer::Ack);

    let mut rig = disk::Rig::new();
    let broken = heard("src/service.rs", || {
        for _ in 0..100 {
            let nowhere = Part::writable(Gpa(1 << 35), 1);
            rig.queue.add(&[nowhere], Layout::Direct).unwrap();
            rig.driver.kick(0);
            assert!(rig.driver.wait_needs_reset());
            rig.restart(disk::ALL);
        }
    });
    assert!(few(broken), "{broken} for broken queues");

    let (mut rig, _peer) = card::Rig::new();
    let broken = heard("net/shared.rs", || {
        for _ in 0..100 {
            rig.queues[1].set_avail_idx(1000);
            rig.driver.kick(1);
            assert!(rig.driver.wait_needs_reset());
            rig.restart(device::ALL);
        }
    });
    assert!(few(broken), "{broken} for a card's broken queues");

    let mut rig = ports::Rig::new();
    let broken = heard("console/port.rs", || {
        for _ in 0..100 {
            rig.queues[1].set_avail_idx(1000);
            rig.driver.kick(1);
            assert!(rig.driver.wait_needs_reset());
            rig.restart(device::ALL);
        }
    });
    assert!(few(broken), "{broken} for a console's broken queues");

    let backend = RngBackend::new("source0", Builtin);
    let board = Board::new(16 << 20).unwrap();
    let rng = VirtioRng::new(RngSpec::new("rng0"), &backend, board.remote()).unwrap();
    let mut rig = device::Rig::new(board, rng, device::ALL, &[8]);
    let broken = heard("rng/serve.rs", || {
        for _ in 0..100 {
            rig.queues[0].set_avail_idx(1000);
            rig.driver.kick(0);
            assert!(rig.driver.wait_needs_reset());
            rig.restart(device::ALL);
        }
    });
    assert!(few(broken), "{broken} for broken queues of entropy");

    let rig = disk::Rig::new();
    let misused = heard("pci/transport.rs", || {
        for offset in 0..0x38 {
            (0..20).for_each(|_| rig.driver.write_common(offset, 8, u64::MAX));
        }
    });
    assert!(few(misused), "{misused} for misused registers");
}
