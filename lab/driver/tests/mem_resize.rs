// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A resize as its operator sees it: progress, events, and interrupts for a driver that has gone idle.

mod plugging;

use std::time::{Duration, Instant};

use ebbtide_lab_driver::mem::Answer;
use ebbtide_lab_driver::{block_on, poll};
use ebbtide_virtio::mem::{DriverState, MemEvent, MemSpec, Pacing, Progress, Reason};
use plugging::{BLOCK, GIB, LATER, MIB, Rig};

/// The default pacing, two hundred times as fast.
fn hasty(spec: &mut MemSpec) {
    spec.pacing = Pacing {
        grow_pause: Duration::from_millis(20),
        shrink_pause: Duration::from_millis(40),
        pause_max: Duration::from_millis(150),
        kicks_max: 5,
        patience: Duration::from_millis(200),
        absent_patience: Duration::from_millis(300),
    };
}

fn size_changed(event: &MemEvent) -> bool {
    matches!(event, MemEvent::SizeChanged { .. })
}

impl Rig {
    /// The next time that it stalls for `reason`. To a hasty device a driver on a busy host is idle before that.
    fn stalled_for(&mut self, reason: Reason) -> MemEvent {
        let other = |event: &MemEvent| !matches!(event, MemEvent::Stalled { reason: it, .. } if *it == reason);
        self.event(other).expect("it never stalls for that")
    }
}

#[test]
fn reaching_the_target_is_told() {
    let mut rig = Rig::new(GIB, 0);
    rig.mem.set_requested(4 * BLOCK).unwrap();
    assert_eq!(rig.mem.status().progress, Progress::Working);
    assert_eq!(rig.plug(0, 2), Answer::Ack);
    assert_eq!(rig.mem.status().progress, Progress::Working);
    assert_eq!(rig.plug(2, 2), Answer::Ack);
    assert_eq!(rig.mem.status().progress, Progress::Reached);
    let id = || "vmem0".into();
    let events: Vec<_> = (0..3).map(|_| rig.event(|_| false).unwrap()).collect();
    assert_eq!(
        events,
        [
            MemEvent::SizeChanged {
                id: id(),
                plugged_bytes: 2 * BLOCK
            },
            MemEvent::SizeChanged {
                id: id(),
                plugged_bytes: 4 * BLOCK
            },
            MemEvent::TargetReached {
                id: id(),
                plugged_bytes: 4 * BLOCK
            },
        ]
    );
    // What is reached already is reached again.
    rig.mem.set_requested(4 * BLOCK).unwrap();
    assert_eq!(
        rig.event(|_| false),
        Some(MemEvent::TargetReached {
            id: id(),
            plugged_bytes: 4 * BLOCK
        })
    );
}

#[test]
fn a_driver_that_stops_short_is_told_again_and_then_given_up() {
    // One that a busy host keeps from its work is told before it begins.
    assert!((0..200).any(|_| stops_short_and_is_told_again()));
}

/// Whether the driver began before it was told.
fn stops_short_and_is_told_again() -> bool {
    let mut rig = Rig::with(GIB, 0, hasty);
    let interrupts = rig.config_interrupts();
    let began = Instant::now();
    rig.mem.set_requested(64 * BLOCK).unwrap();
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    if began.elapsed() > Duration::from_millis(15) {
        return false;
    }
    let stalled = rig.event(size_changed).unwrap();
    let MemEvent::Stalled {
        requested_bytes,
        plugged_bytes,
        partial,
        reason,
        ..
    } = stalled
    else {
        panic!("{stalled:?}")
    };
    assert_eq!(
        (requested_bytes, plugged_bytes, partial),
        (64 * BLOCK, 4 * BLOCK, true)
    );
    assert_eq!(reason, Reason::DriverIdle);
    assert_eq!(
        rig.mem.status().progress,
        Progress::Partial(Reason::DriverIdle)
    );
    assert!(poll(|| rig.mem.metrics().kicks == 5));
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(
        rig.mem.metrics().kicks,
        5,
        "a driver that does not react is left alone in the end"
    );
    assert!(rig.config_interrupts() >= interrupts + 4);
    // It goes on, and all is well.
    assert_eq!(rig.plug(4, 60), Answer::Ack);
    assert!(matches!(
        rig.event(size_changed),
        Some(MemEvent::TargetReached { .. })
    ));
    assert!(rig.mem.status().last_request_age.unwrap() < Duration::from_secs(60));
    true
}

#[test]
fn a_driver_at_work_is_left_alone() {
    // One that a busy host keeps from its work for a while is at work no more.
    assert!((0..20).any(|_| works_and_is_left_alone()));
}

/// Whether the driver was at work all the time: then it is left alone.
fn works_and_is_left_alone() -> bool {
    let mut rig = Rig::with(GIB, 0, |spec| {
        hasty(spec);
        spec.pacing.grow_pause = Duration::from_millis(500);
        spec.pacing.patience = Duration::from_secs(60);
    });
    rig.mem.set_requested(64 * BLOCK).unwrap();
    let interrupts = rig.config_interrupts();
    let began = Instant::now();
    let (mut first, mut last) = (0, began);
    while began.elapsed() < Duration::from_millis(1500) {
        assert_eq!(rig.plug(first, 1), Answer::Ack);
        first += 1;
        if last.elapsed() > Duration::from_millis(200) {
            return false;
        }
        last = Instant::now();
        std::thread::sleep(Duration::from_millis(30));
    }
    assert!(first < 64);
    let seen = (rig.config_interrupts(), rig.mem.metrics().kicks);
    if last.elapsed() > Duration::from_millis(200) {
        return false;
    }
    assert_eq!(seen, (interrupts, 0));
    true
}

#[test]
fn no_driver_is_a_reason() {
    let mut rig = Rig::with(GIB, 0, |spec| {
        spec.pacing.absent_patience = Duration::from_millis(300);
    });
    rig.driver.reset().unwrap();
    assert!(poll(|| rig.mem.status().driver == DriverState::Absent));
    rig.mem.set_requested(BLOCK).unwrap();
    let event = rig.event(size_changed).unwrap();
    assert!(
        matches!(
            event,
            MemEvent::Stalled {
                reason: Reason::NoDriver,
                partial: false,
                ..
            }
        ),
        "{event:?}"
    );
    assert_eq!(rig.mem.metrics().kicks, 0);
    rig.restart();
    assert_eq!(rig.mem.status().progress, Progress::Working);
    assert_eq!(rig.plug(0, 1), Answer::Ack);
    assert!(matches!(
        rig.event(size_changed),
        Some(MemEvent::TargetReached { .. })
    ));
}

#[test]
fn a_broken_driver_is_a_reason() {
    let mut rig = Rig::with(GIB, 0, hasty);
    rig.mem.set_requested(BLOCK).unwrap();
    let request = ebbtide_lab_driver::mem::Request::raw(rig.board.ram(), 77, 0, 0);
    rig.queue
        .add(&request.parts(), ebbtide_lab_driver::Layout::Direct)
        .unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    rig.stalled_for(Reason::DriverBroken);
    assert_eq!(rig.mem.status().driver, DriverState::Broken);
}

#[test]
fn memory_that_does_not_come_back_is_a_reason() {
    let mut rig = Rig::with(GIB, 64 * BLOCK, hasty);
    assert_eq!(rig.plug(0, 64), Answer::Ack);
    rig.mem.set_requested(0).unwrap();
    assert_eq!(rig.unplug(32, 32), Answer::Ack);
    let event = rig.stalled_for(Reason::Unmovable);
    assert!(
        matches!(event, MemEvent::Stalled { partial: true, .. }),
        "{event:?}"
    );
}

#[test]
fn the_operator_can_have_the_driver_told() {
    let rig = Rig::new(GIB, 64 * MIB);
    let interrupts = rig.config_interrupts();
    rig.mem.rekick();
    assert!(
        rig.driver
            .wait_interrupt(rig.driver.config_message(), interrupts + 1)
    );
}

#[test]
fn a_reboot_with_memory_plugged() {
    let mut rig = Rig::new(GIB, 64 * BLOCK);
    assert_eq!(rig.plug(0, 64), Answer::Ack);
    block_on(rig.function.quiesce(), LATER).unwrap();
    block_on(rig.mem.system_reset(), LATER).unwrap().unwrap();
    let gone = |event: &MemEvent| {
        !matches!(
            event,
            MemEvent::SizeChanged {
                plugged_bytes: 0,
                ..
            }
        )
    };
    assert!(rig.event(gone).is_some());
    assert_eq!(rig.mem.status().progress, Progress::Working);
    // The device's task hears of the end when everybody does.
    assert!(poll(|| rig.mem.status().driver == DriverState::Absent));
}

#[test]
fn a_device_that_is_dropped_leaves_no_task() {
    let rig = Rig::with(GIB, 64 * BLOCK, hasty);
    let Rig {
        board,
        mem,
        function,
        driver,
        mut events,
        ..
    } = rig;
    block_on(function.close(), LATER).unwrap();
    let slot = driver.pci().devfn().slot();
    board.bridge().detach(slot).unwrap();
    drop((driver, mem, function));
    // The last sender goes with the last task that knows the device.
    let ended = async { while events.recv().await.is_some() {} };
    assert!(block_on(ended, LATER).is_some());
}
