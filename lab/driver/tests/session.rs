// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver's use of a device from DRIVER_OK to its end: reset, error, configuration change, quiesce, close.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ebbtide_bus::pci::Function;
use ebbtide_lab_driver::{Layout, block_on, common, poll};
use ebbtide_virtio::status;
use support::{Rig, echo, lock};

const SOON: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_secs(60);

#[test]
fn driver_ok_needs_features_ok() {
    let rig = Rig::new();
    rig.driver
        .set_status(status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK);
    assert!(rig.driver.needs_reset());
    assert_eq!(rig.driver.status() & status::DRIVER_OK, 0);
    assert_eq!(rig.echo.activations.load(Ordering::SeqCst), 0);
}

#[test]
fn a_device_that_cannot_be_activated_needs_a_reset() {
    let mut rig = Rig::new();
    rig.echo.fail_activation();
    rig.driver.negotiate(0).unwrap();
    rig.driver.add_queue(0, 16);
    assert!(rig.driver.driver_ok().is_err());
    assert!(rig.driver.wait_interrupt(rig.driver.config_message(), 1));
    rig.driver.reset().unwrap();
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let (mut rig, mut queue) = Rig::ready(0);
    rig.echo.hold.store(true, Ordering::SeqCst);
    let (parts, _) = echo(&rig, b"kept");
    queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(poll(|| rig.echo.held() == 1));

    let before = rig.driver.status();
    rig.driver.write_common(common::STATUS, 1, 0);
    std::thread::sleep(SOON);
    assert_eq!(rig.driver.status(), before, "not yet");
    // What the driver writes meanwhile is lost.
    rig.driver.set_status(status::FAILED);
    rig.driver.write_common(common::QUEUE_SELECT, 2, 1);
    rig.driver.write_common(common::STATUS, 1, 0);
    rig.driver.write_config(0, 4, 1);
    rig.driver.kick(0);
    rig.echo.active_control().needs_reset();
    assert_eq!(rig.driver.status(), before);
    assert_eq!(rig.driver.read_common(common::QUEUE_SELECT, 2), 0);
    assert!(lock(&rig.echo.config_writes).is_empty());

    rig.echo.release();
    rig.driver.reset().unwrap();
    assert!(
        poll(|| rig.echo.tasks.load(Ordering::SeqCst) == 0),
        "its tasks end"
    );
    assert_eq!(queue.device_used_idx(), 0, "a reset queue is not touched");
    assert_eq!(rig.driver.read_common(common::CONFIG_VECTOR, 2), 0xffff);
    assert_eq!(rig.driver.read_common(common::QUEUE_ENABLE, 2), 0);

    rig.echo.hold.store(false, Ordering::SeqCst);
    let mut queue = rig.start(0);
    let (parts, to) = echo(&rig, b"again");
    rig.driver
        .roundtrip(0, &mut queue, &parts, Layout::Direct)
        .unwrap();
    assert_eq!(rig.board.ram().read(to, 5), b"again");
    assert_eq!(rig.echo.activations.load(Ordering::SeqCst), 2);
}

#[test]
fn an_idle_device_is_reset_at_once() {
    let (mut rig, _queue) = Rig::ready(0);
    rig.driver.write_common(common::STATUS, 1, 0);
    assert_eq!(rig.driver.status(), 0);
    rig.driver.write_common(common::STATUS, 1, 0);
    assert_eq!(rig.driver.status(), 0);
    rig.start(0);
}

#[test]
fn a_broken_queue_needs_a_reset_and_tells() {
    let (mut rig, mut queue) = Rig::ready(0);
    queue.set_avail_idx(100);
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert!(rig.driver.wait_interrupt(rig.driver.config_message(), 1));
    assert_eq!(rig.driver.take_isr() & 2, 2);
    let stale = rig.echo.active_control();
    rig.start(0);
    stale.needs_reset();
    assert!(!rig.driver.needs_reset(), "the error was another driver's");
    rig.echo.active_control().needs_reset();
    rig.echo.active_control().needs_reset();
    assert!(rig.driver.needs_reset());
    std::thread::sleep(SOON);
    assert_eq!(
        rig.driver.interrupts(rig.driver.config_message()),
        2,
        "it is told once"
    );
}

#[test]
fn a_configuration_change_is_seen_and_announced() {
    let (rig, _queue) = Rig::ready(0);
    let generation = || rig.driver.read_common(common::GENERATION, 1);
    let change = |byte: u8| {
        rig.echo
            .control()
            .change_config(|| lock(&rig.echo.config).fill(byte))
    };
    assert_eq!(rig.driver.read_config_u64(0), 0);
    let before = generation();
    change(0x11);
    assert_ne!(generation(), before);
    assert!(rig.driver.wait_interrupt(rig.driver.config_message(), 1));
    assert_eq!(rig.driver.read_config_u64(8), 0x1111_1111_1111_1111);
    // Nothing was read in between: the driver cannot tell the states apart, and a whole round of the counter cannot
    // hide a change.
    let before = generation();
    rig.driver.read_config(0, 4);
    (0..=255).for_each(change);
    assert_ne!(generation(), before);
    assert_eq!(rig.driver.read_config(15, 2), 0xff, "zero behind the end");
}

#[test]
fn a_change_before_driver_ok_is_announced_after_it() {
    let mut rig = Rig::new();
    rig.driver.negotiate(0).unwrap();
    rig.driver.add_queue(0, 16);
    rig.driver.write_common(common::CONFIG_VECTOR, 2, 0);
    rig.echo.control().config_changed();
    assert_eq!(rig.driver.interrupts(rig.driver.config_message()), 0);
    rig.driver.driver_ok().unwrap();
    assert!(rig.driver.wait_interrupt(rig.driver.config_message(), 1));
    // Not to the next driver, which reads everything anyway.
    rig.driver.reset().unwrap();
    rig.echo.control().config_changed();
    rig.start(0);
    std::thread::sleep(SOON);
    assert_eq!(rig.driver.interrupts(rig.driver.config_message()), 1);
}

#[test]
fn a_quiesced_device_is_as_at_power_on() {
    let (rig, mut queue) = Rig::ready(0);
    rig.echo.hold.store(true, Ordering::SeqCst);
    let (parts, _) = echo(&rig, b"kept");
    queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(poll(|| rig.echo.held() == 1));
    assert_eq!(
        block_on(rig.function.quiesce(), SOON),
        None,
        "a request is in flight"
    );
    let quiesced = rig.function.quiesce();
    rig.echo.release();
    assert_eq!(block_on(quiesced, LATER), Some(()));
    assert_eq!(rig.driver.status(), 0);
    assert_eq!(
        block_on(rig.function.quiesce(), LATER),
        Some(()),
        "nothing to wait for"
    );
    rig.function.reset();
    assert_eq!(rig.driver.pci().bar(0), 0);
}

#[test]
fn a_closed_function_reads_all_ones_and_takes_nothing() {
    let (rig, mut queue) = Rig::ready(0);
    rig.echo.hold.store(true, Ordering::SeqCst);
    let (parts, _) = echo(&rig, b"kept");
    queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(poll(|| rig.echo.held() == 1));

    let closed = rig.function.close();
    assert_eq!(rig.driver.read_common(common::STATUS, 1), 0xff);
    assert_eq!(rig.driver.read_common(common::QUEUE_DESC, 8), u64::MAX);
    assert_eq!(rig.driver.pci().read_config(0, 4), u32::MAX);
    rig.driver.write_config(0, 4, 1);
    rig.driver.kick(0);
    assert!(lock(&rig.echo.config_writes).is_empty());
    assert_eq!(
        block_on(rig.function.close(), SOON),
        None,
        "a request is in flight"
    );
    rig.echo.release();
    assert_eq!(block_on(closed, LATER), Some(()));
    assert_eq!(queue.device_used_idx(), 0);
    assert!(poll(|| rig.echo.tasks.load(Ordering::SeqCst) == 0));
}

#[test]
fn nothing_is_left_of_a_removed_function() {
    let (rig, _queue) = Rig::ready(0);
    assert_eq!(rig.board.interrupts().routes(), 4);
    assert_eq!(block_on(rig.function.close(), LATER), Some(()));
    assert!(poll(|| rig.echo.tasks.load(Ordering::SeqCst) == 0));
    let slot = rig.driver.pci().devfn().slot();
    let Rig {
        board,
        echo,
        function,
        driver,
    } = rig;
    drop((driver, function));
    drop(board.bridge().detach(slot).unwrap());
    assert!(
        poll(|| Arc::strong_count(&echo) == 1),
        "the device is the test's alone"
    );
    drop(echo);
    // The MSI-X table's region is part of the last view until nobody can be reading that any more.
    assert!(
        poll(|| board.interrupts().routes() == 0),
        "{} routes",
        board.interrupts().routes()
    );
}
