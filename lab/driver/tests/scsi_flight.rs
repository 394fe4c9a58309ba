// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI host device with commands in flight: units that go, task management, resets, chains that are no commands.

mod hba;

use std::sync::Arc;
use std::time::Duration;

use ebbtide_block::fault::{Fault, Order, Point, Rule};
use ebbtide_block::{Disk, NullSpec, OpKind};
use ebbtide_iothread::ManualClock;
use ebbtide_lab_driver::scsi::{self, Answer, Command, Control, Data, cdb10, function, response};
use ebbtide_lab_driver::{Board, LIMIT, Layout, Part, block_on, common, poll};
use ebbtide_memory::Gpa;
use ebbtide_scsi::Identity;
use ebbtide_virtio::scsi::{ScsiSpec, feature};
use hba::{ALL, Image, Rig, pattern};

const SOON: Duration = Duration::from_millis(50);

fn hold(image: &Image) {
    image.faults.inject(Rule::always(Fault::Hold));
}

fn wait_held(image: &Image, count: usize) {
    assert!(poll(|| image.faults.held() == count));
}

/// A unit goes while the disk reads for it: nothing new, the old one to its end, then the news, then the disk.
#[test]
fn a_unit_goes_behind_its_last_command() {
    let (mut rig, image) = Rig::with_unit();
    let other = Image::new(1);
    rig.add(0, 1, &other);
    rig.attention(0, 0);
    hold(&image);
    let ram = rig.board.ram().clone();
    let late = Command::read(&ram, scsi::address(0, 0), 7, 4, 1);
    rig.send(0, &late);
    wait_held(&image, 1);
    let told = rig.events.device_used_idx();
    let buffer = rig.offer_event();
    // It does not wait: the command is held for longer.
    let removal = rig.scsi.remove_lun(0, 0).unwrap();
    assert_eq!(removal.gate().held().io, 1);
    assert_eq!(rig.read_second(), Answer::GOOD);
    let (answer, _) = rig.read(0, 0, 0, 1);
    assert_eq!(answer.response, response::BAD_TARGET);
    let taken = rig
        .scsi
        .add_lun(0, 0, Arc::clone(&other.disk), Identity::new());
    assert!(taken.is_err(), "it is still there");
    assert!(block_on(removal.gone(), SOON).is_none());
    assert_eq!(rig.events.device_used_idx(), told, "told before the drain");
    image.faults.clear();
    image.faults.release(Order::Arrival);
    let disk = block_on(removal.gone(), LIMIT).unwrap().unwrap();
    rig.driver.wait_used(&mut rig.requests[0]).unwrap();
    assert_eq!(late.answer(), Answer::GOOD);
    assert_eq!(late.data(), pattern(4 * 512, 512, 0));
    let event = rig.wait_event(buffer);
    assert_eq!(event, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    drop(image.disk);
    assert_eq!(Arc::strong_count(&disk), 1, "somebody keeps the disk");
    assert_eq!(rig.scsi.luns(), [(0, 1)]);
    assert_eq!(rig.attention(0, 1), (0x3f, 0x0e));
    assert_eq!(rig.read(0, 0, 0, 1).0.sense, Some((5, 0x25, 0)));
    // The place is free again.
    let buffer = rig.offer_event();
    rig.scsi.add_lun(0, 0, disk, Identity::new()).unwrap();
    let event = rig.wait_event(buffer);
    assert_eq!(event, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(rig.attention(0, 0), (0x29, 0));
    assert_eq!(
        rig.read(0, 0, 4, 1),
        (Answer::GOOD, pattern(4 * 512, 512, 0))
    );
}

impl Rig {
    /// The other unit of the target is not bothered: a command for it, once its news are taken.
    fn read_second(&mut self) -> Answer {
        self.run(0, 1, &[0; 6], Data::None).0
    }
}

#[test]
fn a_disk_that_takes_its_time_is_waited_for() {
    let clock = ManualClock::new();
    let mut rig = Rig::on(
        Board::with_clock(32 << 20, &clock).unwrap(),
        ScsiSpec::new("scsi0"),
        ALL,
    );
    let spec = NullSpec {
        latency: Duration::from_millis(300),
        read_zeroes: true,
        ..NullSpec::default()
    };
    let disk = Arc::new(Disk::null_co(&spec).unwrap());
    rig.scsi
        .add_lun(3, 0, Arc::clone(&disk), Identity::new())
        .unwrap();
    rig.attention(3, 0);
    let ram = rig.board.ram().clone();
    let commands: Vec<_> = (0..64)
        .map(|tag| Command::read(&ram, scsi::address(3, 0), tag, 0, 1))
        .collect();
    for command in &commands {
        rig.send(0, command);
    }
    assert!(poll(|| disk.in_flight().reads == 64));
    let removal = rig.scsi.remove_lun(3, 0).unwrap();
    assert!(block_on(removal.gone(), SOON).is_none());
    assert_eq!(disk.in_flight().reads, 64);
    clock.advance(spec.latency);
    assert!(block_on(removal.gone(), LIMIT).unwrap().is_some());
    for _ in &commands {
        rig.driver.wait_used(&mut rig.requests[0]).unwrap();
    }
    assert!(
        commands
            .iter()
            .all(|command| command.answer() == Answer::GOOD)
    );
    assert!(block_on(removal.gone(), LIMIT).unwrap().is_none(), "twice");
    assert_eq!(Arc::strong_count(&disk), 1);
}

#[test]
fn events_wait_for_buffers() {
    let (mut rig, image) = Rig::with_unit();
    for lun in 1..=66 {
        rig.scsi
            .add_lun(9, lun, Arc::clone(&image.disk), Identity::new())
            .unwrap();
    }
    // Of which 64 fit.
    let mut events = Vec::new();
    for _ in 0..64 {
        let buffer = rig.offer_event();
        events.push(rig.wait_event(buffer));
    }
    assert_eq!(
        events[0][..8],
        [1, 0, 0, 0x80, 1, 9, 0, 1],
        "the loss is told"
    );
    assert_eq!(events[63][..8], [1, 0, 0, 0, 1, 9, 0, 64]);
    let buffer = rig.offer_event();
    std::thread::sleep(SOON);
    assert!(rig.events.poll_used().is_none());
    rig.scsi.capacity_changed(9, 66).unwrap();
    assert_eq!(rig.wait_event(buffer)[..8], [3, 0, 0, 0, 1, 9, 0, 66]);
}

#[test]
fn a_driver_that_does_not_listen_is_told_nothing() {
    let spec = ebbtide_virtio::scsi::ScsiSpec::new("scsi0");
    let mut rig = Rig::with(spec, ALL & !feature::HOTPLUG);
    let image = Image::new(0);
    let buffer = rig.offer_event();
    rig.add(0, 0, &image);
    std::thread::sleep(SOON);
    assert!(rig.events.poll_used().is_none());
    rig.scsi.capacity_changed(0, 0).unwrap();
    assert_eq!(rig.wait_event(buffer)[0], 3);
    // What happened before a driver came is no news for it.
    let disk = Arc::clone(&image.disk);
    rig.scsi.add_lun(0, 1, disk, Identity::new()).unwrap();
    rig.restart();
    rig.offer_event();
    std::thread::sleep(SOON);
    assert!(rig.events.poll_used().is_none());
}

#[test]
fn aborting_waits_for_the_disk() {
    let (mut rig, image) = Rig::with_unit();
    hold(&image);
    let ram = rig.board.ram().clone();
    let lun = scsi::address(0, 0);
    let commands: Vec<_> = (1..=3)
        .map(|tag| Command::read(&ram, lun, tag, tag as u32, 1))
        .collect();
    for command in &commands {
        rig.send(0, command);
    }
    wait_held(&image, 3);
    assert_eq!(
        rig.manage(function::QUERY_TASK, 0, 0, 2),
        response::FUNCTION_SUCCEEDED
    );
    assert_eq!(rig.manage(function::QUERY_TASK, 0, 0, 9), response::OK);
    assert_eq!(
        rig.manage(function::QUERY_TASK_SET, 0, 0, 0),
        response::FUNCTION_SUCCEEDED
    );
    assert_eq!(rig.manage(function::ABORT_TASK, 0, 0, 9), response::OK);
    let abort = Control::function(&ram, function::ABORT_TASK, lun, 2);
    rig.send_control(&abort);
    std::thread::sleep(SOON);
    assert_eq!(
        abort.response(),
        response::UNTOUCHED,
        "the disk still has it"
    );
    image.faults.clear();
    image.faults.release(Order::Reverse);
    rig.driver.wait_used(&mut rig.control).unwrap();
    assert_eq!(abort.response(), response::OK);
    // When the function is answered, the command is: no waiting.
    let mut answers = 0;
    while rig.requests[0].poll_used().is_some() {
        answers += 1;
    }
    assert!(answers > 0 && commands[1].answer().response == response::ABORTED);
    for _ in answers..3 {
        rig.driver.wait_used(&mut rig.requests[0]).unwrap();
    }
    assert_eq!(commands[0].answer(), Answer::GOOD);
    assert_eq!(commands[2].answer(), Answer::GOOD);
    assert_eq!(rig.manage(function::QUERY_TASK_SET, 0, 0, 0), response::OK);
    assert_eq!(rig.scsi.metrics().aborted, 1);
}

#[test]
fn resets_of_units_and_targets() {
    let (mut rig, image) = Rig::with_unit();
    let other = Image::new(1);
    rig.add(0, 1, &other);
    rig.attention(0, 0);
    let ram = rig.board.ram().clone();
    for (kind, attention, second) in [
        (
            function::LOGICAL_UNIT_RESET,
            (0x29, 3),
            Answer::GOOD.response,
        ),
        (function::I_T_NEXUS_RESET, (0x29, 7), response::RESET),
    ] {
        hold(&image);
        hold(&other);
        let commands = [0, 1].map(|lun| Command::read(&ram, scsi::address(0, lun), 5, 0, 1));
        for command in &commands {
            rig.send(0, command);
        }
        wait_held(&image, 1);
        wait_held(&other, 1);
        let reset = Control::function(&ram, kind, scsi::address(0, 0), 0);
        rig.send_control(&reset);
        std::thread::sleep(SOON);
        assert_eq!(reset.response(), response::UNTOUCHED);
        for image in [&image, &other] {
            image.faults.clear();
            image.faults.release(Order::Arrival);
        }
        rig.driver.wait_used(&mut rig.control).unwrap();
        assert_eq!(reset.response(), response::OK);
        for _ in 0..2 {
            rig.driver.wait_used(&mut rig.requests[0]).unwrap();
        }
        assert_eq!(commands[0].answer().response, response::RESET);
        assert_eq!(commands[1].answer().response, second);
        assert_eq!(rig.attention(0, 0), attention);
        if second == response::RESET {
            assert_eq!(rig.attention(0, 1), attention);
        }
        assert_eq!(rig.read(0, 1, 0, 1).0, Answer::GOOD);
    }
}

#[test]
fn functions_for_nobody() {
    let (mut rig, _image) = Rig::with_unit();
    let abort = function::ABORT_TASK;
    assert_eq!(rig.manage(abort, 1, 0, 0), response::BAD_TARGET);
    assert_eq!(rig.manage(abort, 0, 1, 0), response::INCORRECT_LUN);
    assert_eq!(rig.manage(function::I_T_NEXUS_RESET, 0, 9, 0), response::OK);
    assert_eq!(rig.attention(0, 0), (0x29, 7));
    assert_eq!(
        rig.manage(function::CLEAR_ACA, 0, 0, 0),
        response::FUNCTION_REJECTED
    );
    assert_eq!(rig.manage(99, 0, 0, 0), response::FUNCTION_REJECTED);
    let ram = rig.board.ram().clone();
    let mut query = vec![1, 0, 0, 0];
    query.extend(scsi::address(0, 0));
    query.extend([0xff; 4]);
    let query = Control::raw(&ram, &query, 5);
    rig.send_control(&query);
    rig.driver.wait_used(&mut rig.control).unwrap();
    assert_eq!(query.answer(), [0; 5]);
}

/// A long command ends between two operations when it is aborted.
#[test]
fn an_aborted_command_begins_nothing_more() {
    let (mut rig, image) = Rig::with_unit();
    image.faults.inject(
        Rule::always(Fault::Hold)
            .at(Point::After)
            .only(OpKind::Read),
    );
    let ram = rig.board.ram().clone();
    let lun = scsi::address(0, 0);
    let verify = Command::new(&ram, lun, 5, &cdb10(0x2f, 0, 8192), Data::None);
    rig.send(0, &verify);
    wait_held(&image, 1);
    let abort = Control::function(&ram, function::ABORT_TASK_SET, lun, 0);
    rig.send_control(&abort);
    std::thread::sleep(SOON);
    assert_eq!(image.faults.release(Order::Arrival), 1);
    rig.driver.wait_used(&mut rig.control).unwrap();
    assert_eq!(verify.answer().response, response::ABORTED);
    assert_eq!(image.faults.held(), 0);
}

#[test]
fn reset_with_commands_and_functions_in_flight() {
    let (mut rig, image) = Rig::with_unit();
    hold(&image);
    let ram = rig.board.ram().clone();
    let lun = scsi::address(0, 0);
    let read = Command::read(&ram, lun, 5, 0, 8);
    rig.send(0, &read);
    wait_held(&image, 1);
    let abort = Control::function(&ram, function::ABORT_TASK, lun, 5);
    rig.send_control(&abort);
    let late = Command::write(&ram, lun, 6, 0, &[1; 512]);
    std::thread::sleep(SOON);
    rig.driver.write_common(common::STATUS, 1, 0);
    rig.send(0, &late);
    std::thread::sleep(SOON);
    assert_ne!(rig.driver.status(), 0, "complete with a command in flight");
    image.faults.clear();
    image.faults.release(Order::Arrival);
    assert!(poll(|| rig.driver.status() == 0));
    let used = (
        rig.requests[0].device_used_idx(),
        rig.control.device_used_idx(),
    );
    std::thread::sleep(SOON);
    assert_eq!(used.0, 1, "only the attention before");
    assert_eq!(
        used,
        (
            rig.requests[0].device_used_idx(),
            rig.control.device_used_idx()
        )
    );
    assert_eq!(late.answer().response, response::UNTOUCHED);
    rig.restart();
    assert_eq!(rig.attention(0, 0), (0x29, 0));
    assert_eq!(rig.read(0, 0, 0, 1), (Answer::GOOD, pattern(0, 512, 0)));
}

#[test]
fn memory_that_is_none() {
    let (mut rig, image) = Rig::with_unit();
    let ram = rig.board.ram().clone();
    let lun = scsi::address(0, 0);
    for gpa in [Gpa(1 << 35), Gpa((32 << 20) - 256)] {
        let read = Command::read(&ram, lun, 1, 0, 1);
        let mut parts = read.parts();
        parts[2].gpa = gpa;
        rig.run_laid_out(&read, &parts, Layout::Direct);
        assert_eq!(read.answer().sense, Some((0xb, 0x4b, 0)));
        let write = Command::write(&ram, lun, 1, 0, &[1; 512]);
        let mut parts = write.parts();
        parts[1].gpa = gpa;
        rig.run_laid_out(&write, &parts, Layout::Direct);
        assert_eq!(write.answer().sense, Some((0xb, 0x4b, 0)));
    }
    assert_eq!(image.bytes(0, 512), pattern(0, 512, 0));
    // Half a header, both directions, no unit's address.
    let read = Command::read(&ram, lun, 1, 0, 1);
    let mut parts = read.parts();
    parts[0].len = 50;
    rig.run_laid_out(&read, &parts, Layout::Direct);
    assert_eq!(read.answer().response, response::FAILURE);
    let both = Command::read(&ram, lun, 1, 0, 1);
    let mut parts = both.parts();
    parts.insert(1, Part::readable(both.data_gpa(), 512));
    rig.run_laid_out(&both, &parts, Layout::Direct);
    assert_eq!(both.answer().response, response::FAILURE);
    let nowhere = Command::read(&ram, [0xc1, 1, 0, 0, 0, 0, 0, 0], 1, 0, 1);
    rig.run_laid_out(&nowhere, &nowhere.parts(), Layout::Direct);
    assert_eq!(nowhere.answer().response, response::BAD_TARGET);
    assert!(!rig.driver.needs_reset());
    // No room for a response.
    let read = Command::read(&ram, lun, 1, 0, 1);
    rig.requests[0]
        .add(&read.parts()[..1], Layout::Direct)
        .unwrap();
    rig.driver.kick(scsi::REQUEST);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(rig.scsi.metrics().malformed, 1);
}

#[test]
fn a_command_that_is_made_available_again_in_flight_breaks_the_queue() {
    let (mut rig, image) = Rig::with_unit();
    hold(&image);
    let ram = rig.board.ram().clone();
    let read = Command::read(&ram, scsi::address(0, 0), 1, 0, 1);
    let head = rig.send(0, &read);
    wait_held(&image, 1);
    let (used, pinned) = (rig.requests[0].device_used_idx(), rig.function.pinned());
    rig.requests[0].make_available(head);
    rig.driver.kick(scsi::REQUEST);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(rig.scsi.metrics().malformed, 1);
    assert_eq!(rig.function.pinned(), pinned);
    image.faults.clear();
    assert_eq!(image.faults.release(Order::Arrival), 1);
    assert!(poll(|| rig.board.ram_block().pins() == 0));
    assert_eq!(rig.requests[0].device_used_idx(), used);
    rig.restart();
    rig.attention(0, 0);
    assert_eq!(rig.read(0, 0, 0, 1), (Answer::GOOD, pattern(0, 512, 0)));
}

#[test]
fn control_requests_that_are_none() {
    for bytes in [&[][..], &[9, 0, 0, 0][..], &[0; 23][..], &[1; 8][..]] {
        let (mut rig, _image) = Rig::with_unit();
        let ram = rig.board.ram().clone();
        let control = Control::raw(&ram, bytes, 5);
        rig.send_control(&control);
        assert!(rig.driver.wait_needs_reset(), "{bytes:?}");
        assert_eq!(rig.scsi.metrics().malformed, 1, "{bytes:?}");
        rig.restart();
        assert_eq!(rig.manage(function::QUERY_TASK, 0, 0, 0), response::OK);
    }
}

/// A write that ends when the cache is off is on the medium then, also one that began before.
#[test]
fn the_cache_is_switched_off_under_a_write() {
    let (mut rig, image) = Rig::with_unit();
    let ram = rig.board.ram().clone();
    let held = Rule::always(Fault::Hold).only(OpKind::Write);
    for (cdb, at) in [(cdb10(0x2a, 0, 1), 0), (cdb10(0x41, 8, 8), 8)] {
        image.faults.inject(held.at(Point::After));
        let data = Data::Out(&[7; 512]);
        let write = Command::new(&ram, scsi::address(0, 0), 900 + at, &cdb, data);
        rig.send(0, &write);
        wait_held(&image, 1);
        let mut page = [0; 24];
        (page[4], page[5]) = (8, 18);
        let select = [0x15, 0x10, 0, 0, 24, 0];
        let (answer, _) = rig.run(0, 0, &select, Data::Out(&page));
        assert_eq!(answer, Answer::GOOD);
        image.faults.clear();
        // It ends with a flush, which fails.
        image
            .faults
            .inject(Rule::once(Fault::Fail(5)).only(OpKind::Flush));
        assert_eq!(image.faults.release(Order::Arrival), 1);
        rig.driver.wait_used(&mut rig.requests[0]).unwrap();
        assert_eq!(write.answer().sense, Some((3, 0x0c, 0)));
        image.faults.clear();
        assert_eq!(image.bytes(512 * at, 512), [7; 512]);
        page[6] = 4;
        let (answer, _) = rig.run(0, 0, &select, Data::Out(&page));
        assert_eq!(answer, Answer::GOOD);
    }
}

/// An event that has nowhere to go to is the driver's fault, as any other of its queues is.
#[test]
fn a_broken_event_queue_is_counted() {
    let (mut rig, _image) = Rig::with_unit();
    rig.events.set_avail_idx(1000);
    rig.scsi.capacity_changed(0, 0).unwrap();
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(rig.scsi.metrics().malformed, 1);
}

/// Random CDBs for random units: each is answered, and what is not written stays what it is.
#[test]
fn random_commands() {
    let mut rig = Rig::new();
    let image = Image::with(0, |spec| spec.readonly());
    rig.add(0, 0, &image);
    let ram = rig.board.ram().clone();
    let mut seed = 7_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as u8
    };
    for round in 0..5000_u64 {
        let mut cdb = [0; 32];
        let sparse = round % 2 == 0;
        cdb.fill_with(|| random() & if sparse { random() & random() } else { 0xff });
        let bytes = vec![random(); usize::from(random()) * 9];
        let data = match random() % 3 {
            0 => Data::None,
            1 => Data::In(bytes.len()),
            _ => Data::Out(&bytes),
        };
        let lun = scsi::address(random() % 2, u16::from(random() % 3));
        let command = Command::new(&ram, lun, round, &cdb, data);
        rig.run_laid_out(&command, &command.parts(), Layout::Direct);
        assert_ne!(command.answer().response, response::UNTOUCHED, "{cdb:x?}");
    }
    assert!(!rig.driver.needs_reset());
    assert_eq!(image.bytes(0, 4 << 20), pattern(0, 4 << 20, 0));
}
