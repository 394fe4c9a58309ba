// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI host device, honestly driven: commands, data, residues, units, events.

mod hba;

use std::sync::Arc;

use ebbtide_block::fault::{Fault, Rule};
use ebbtide_block::{Discard, Disk, NullSpec, OpKind};
use ebbtide_lab_driver::Layout;
use ebbtide_lab_driver::scsi::{self, Answer, Command, Data, cdb10, response};
use ebbtide_scsi::Identity;
use ebbtide_virtio::scsi::{ScsiError, ScsiSpec};
use hba::{ALL, DISK_BYTES, Image, Rig, pattern};

const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 74, 0];

fn check(key: u8, asc: u8, ascq: u8, residual: u32) -> Answer {
    Answer {
        status: 2,
        residual,
        sense: Some((key, asc, ascq)),
        ..Answer::GOOD
    }
}

fn failed(response: u8, residual: u32) -> Answer {
    Answer {
        response,
        residual,
        ..Answer::GOOD
    }
}

#[test]
fn what_is_written_is_read() {
    let (mut rig, image) = Rig::with_unit();
    for (block, blocks) in [(0_u32, 1_u16), (7, 8), (100, 1000), (8191, 1)] {
        let bytes = pattern(block as usize, usize::from(blocks) * 512, 3);
        let (answer, _) = rig.run(0, 0, &cdb10(0x2a, block, blocks), Data::Out(&bytes));
        assert_eq!(answer, Answer::GOOD);
        assert_eq!(image.bytes(u64::from(block) * 512, bytes.len()), bytes);
        assert_eq!(rig.read(0, 0, block, blocks), (Answer::GOOD, bytes));
    }
    let metrics = rig.scsi.metrics();
    assert_eq!((metrics.in_flight, metrics.check_conditions), (0, 1));
}

#[test]
fn every_form_of_read_and_write() {
    let (mut rig, image) = Rig::with_unit();
    let reads: [&[u8]; 4] = [
        &[0x08, 0, 0, 9, 2, 0],
        &cdb10(0x28, 9, 2),
        &[0xa8, 0, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0],
        &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0],
    ];
    for read in reads {
        let answer = rig.run(0, 0, read, Data::In(1024));
        assert_eq!(answer, (Answer::GOOD, pattern(9 * 512, 1024, 0)));
        let bytes = vec![read[0]; 1024];
        let mut write = read.to_vec();
        write[0] += 2;
        let (answer, _) = rig.run(0, 0, &write, Data::Out(&bytes));
        assert_eq!(answer, Answer::GOOD);
        assert_eq!(image.bytes(9 * 512, 1024), bytes);
        let restored = pattern(9 * 512, 1024, 0);
        rig.run(0, 0, &cdb10(0x2a, 9, 2), Data::Out(&restored));
    }
}

#[test]
fn residues_and_overruns() {
    let (mut rig, image) = Rig::with_unit();
    // More room than data: what is left is left alone.
    let (answer, data) = rig.run(0, 0, &cdb10(0x28, 0, 1), Data::In(1500));
    assert_eq!(answer, failed(response::OK, 1500 - 512));
    assert_eq!(data[..512], pattern(0, 512, 0));
    assert!(data[512..].iter().all(|byte| *byte == 0));
    let (answer, data) = rig.run(0, 0, &[0x12, 0, 0, 0, 255, 0], Data::In(255));
    assert_eq!(answer, failed(response::OK, 255 - 74));
    assert_eq!(&data[8..16], b"Ebbtide ");
    let (answer, _) = rig.run(0, 0, &cdb10(0x2a, 0, 1), Data::Out(&[7; 1000]));
    assert_eq!(answer, failed(response::OK, 488));
    assert_eq!(image.bytes(0, 512), [7; 512]);
    assert_eq!(image.bytes(512, 512), pattern(512, 512, 0));
    // Less: nothing happens.
    let (answer, data) = rig.run(0, 0, &cdb10(0x28, 8, 2), Data::In(1023));
    assert_eq!(answer, failed(response::OVERRUN, 1023));
    assert!(data.iter().all(|byte| *byte == 0));
    let (answer, _) = rig.run(0, 0, &cdb10(0x2a, 8, 2), Data::Out(&[7; 512]));
    assert_eq!(answer, failed(response::OVERRUN, 512));
    assert_eq!(image.bytes(8 * 512, 512), pattern(8 * 512, 512, 0));
    assert_eq!(
        rig.run(0, 0, &cdb10(0x28, 8, 2), Data::None).0.response,
        response::OVERRUN
    );
    let bad = rig.read(0, 0, 8191, 2);
    assert_eq!(bad.0, check(5, 0x21, 0, 1024));
    assert_eq!(rig.scsi.metrics().overruns, 3);
}

#[test]
fn used_lengths_have_no_gap() {
    let (mut rig, _image) = Rig::with_unit();
    let ram = rig.board.ram().clone();
    let lun = scsi::address(0, 0);
    let read = Command::read(&ram, lun, 1, 0, 2);
    assert_eq!(
        rig.run_laid_out(&read, &read.parts(), Layout::Direct),
        108 + 1024
    );
    let write = Command::write(&ram, lun, 2, 0, &[0; 512]);
    assert_eq!(
        rig.run_laid_out(&write, &write.parts(), Layout::Direct),
        108
    );
    let bad = Command::read(&ram, lun, 3, 9000, 1);
    assert_eq!(rig.run_laid_out(&bad, &bad.parts(), Layout::Direct), 108);
}

/// The device must not depend on how a command is cut into descriptors.
#[test]
fn commands_in_any_pieces() {
    let (mut rig, _image) = Rig::with_unit();
    let ram = rig.board.ram().clone();
    for layout in [Layout::Direct, Layout::Indirect, Layout::Mixed(2)] {
        for cut in [1, 11, 19, 50, 107] {
            let read = Command::read(&ram, scsi::address(0, 0), 1, 3, 2);
            let parts: Vec<_> = read
                .parts()
                .into_iter()
                .flat_map(|part| match part.len > cut {
                    true => part.split(cut).to_vec(),
                    false => vec![part],
                })
                .collect();
            rig.run_laid_out(&read, &parts, layout);
            assert_eq!(read.answer(), Answer::GOOD);
            assert_eq!(read.data(), pattern(3 * 512, 1024, 0));
        }
    }
}

#[test]
fn sizes_the_driver_chose() {
    let (mut rig, _image) = Rig::with_unit();
    assert_eq!(rig.driver.read_config(20, 4), 96);
    rig.driver.negotiate(ALL).unwrap();
    rig.driver.write_config(20, 4, 20);
    rig.driver.write_config(24, 4, 16);
    let mut queue = rig.driver.add_queue(scsi::REQUEST, 64);
    rig.driver.driver_ok().unwrap();
    for expected in [check(6, 0x29, 0, 0), Answer::GOOD] {
        let (ram, lun) = (rig.board.ram(), scsi::address(0, 0));
        let ready = Command::sized(ram, lun, 1, &[0; 6], Data::None, 16, 20);
        let used = rig
            .driver
            .roundtrip(scsi::REQUEST, &mut queue, &ready.parts(), Layout::Direct)
            .unwrap();
        assert_eq!((used.written, ready.answer()), (32, expected));
    }
    rig.restart();
    assert_eq!(rig.driver.read_config(20, 4), 96);
    assert_eq!(rig.driver.read_config(24, 4), 32);
}

#[test]
fn configuration() {
    let mut spec = ScsiSpec::new("scsi0");
    (spec.queues, spec.queue_size) = (3, 128);
    let rig = Rig::with(spec, ALL);
    let fields = [0, 4, 12, 16].map(|at| rig.driver.read_config(at, 4));
    assert_eq!(fields, [3, 126, 128, 16]);
    assert_eq!(rig.driver.read_config(30, 2), 255);
    assert_eq!(rig.driver.read_config(32, 4), 16383);
    assert_eq!(rig.driver.max_queue_size(4), 128);
    assert_eq!(rig.driver.max_queue_size(5), 0);
}

#[test]
fn units_of_many_targets() {
    let mut rig = Rig::new();
    let places = [(0, 0), (0, 3), (255, 0), (7, 16383), (7, 300)];
    let images: Vec<_> = (1..=5).map(Image::new).collect();
    for ((target, lun), image) in places.into_iter().zip(&images) {
        rig.add(target, lun, image);
    }
    // A second unit of a target is news for the first.
    assert_eq!(rig.attention(0, 0), (0x3f, 0x0e));
    assert_eq!(rig.attention(7, 16383), (0x3f, 0x0e));
    for (seed, (target, lun)) in (1..=5).zip(places) {
        let read = rig.read(target, lun, 5, 1);
        assert_eq!(read, (Answer::GOOD, pattern(5 * 512, 512, seed)));
        let (_, page) = rig.run(target, lun, &[0x12, 1, 0x80, 0, 64, 0], Data::In(64));
        let serial = format!("EBB-{target}-{lun}");
        assert_eq!(&page[4..4 + serial.len()], serial.as_bytes());
    }
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    let (_, list) = rig.run(7, 300, &report, Data::In(64));
    assert_eq!(list[..4], [0, 0, 0, 16]);
    assert_eq!(
        (&list[8..10], &list[16..18]),
        (&[0x41, 44][..], &[0x7f, 0xff][..])
    );
    assert_eq!(rig.scsi.luns().len(), 5);
    // LUN 0 of target 7 is not there; the target says so, and reports.
    let (answer, data) = rig.run(7, 0, &INQUIRY, Data::In(74));
    assert_eq!((answer, data[0]), (Answer::GOOD, 0x7f));
    assert_eq!(rig.run(7, 0, &report, Data::In(64)).1, list);
    assert_eq!(rig.read(7, 0, 0, 1).0, check(5, 0x25, 0, 512));
    // Target 1 is not there.
    assert_eq!(
        rig.run(1, 0, &INQUIRY, Data::In(74)).0,
        failed(response::BAD_TARGET, 74)
    );
}

#[test]
fn addresses_are_unique_and_checked() {
    let (rig, _image) = Rig::with_unit();
    let disk = || Arc::new(Disk::null(1 << 20));
    let occupied = rig.scsi.add_lun(0, 0, disk(), Identity::new());
    assert!(matches!(
        occupied,
        Err(ScsiError::Occupied {
            target: 0,
            lun: 0,
            ..
        })
    ));
    let error = rig
        .scsi
        .add_lun(0, 16384, disk(), Identity::new())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "scsi device 'scsi0': LUN 16384 is more than 16383"
    );
    assert!(rig.scsi.remove_lun(0, 1).is_err());
    assert!(rig.scsi.capacity_changed(3, 1).is_err());
}

#[test]
fn errors_of_the_backend() {
    let (mut rig, image) = Rig::with_unit();
    let cases = [
        (OpKind::Read, 5, cdb10(0x28, 0, 1), check(3, 0x11, 0, 512)),
        (OpKind::Write, 5, cdb10(0x2a, 0, 1), check(3, 0x0c, 0, 512)),
        (OpKind::Write, 28, cdb10(0x2a, 0, 1), check(7, 0x27, 7, 512)),
        (OpKind::Flush, 5, cdb10(0x35, 0, 0), check(3, 0x0c, 0, 0)),
    ];
    for (kind, errno, cdb, expected) in cases {
        image
            .faults
            .inject(Rule::once(Fault::Fail(errno)).only(kind));
        let data = match kind {
            OpKind::Read => Data::In(512),
            OpKind::Write => Data::Out(&[0; 512]),
            _ => Data::None,
        };
        assert_eq!(rig.run(0, 0, &cdb, data).0, expected);
    }
    let _abandoned = image.disk.abandon();
    assert_eq!(rig.read(0, 0, 0, 1).0, check(4, 0x44, 0, 512));
}

#[test]
fn write_same_unmap_and_verify() {
    let (mut rig, image) = Rig::with_unit();
    let same = |flags: u8| [0x93, flags, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 4, 0, 0, 0];
    // 1024 blocks of one block, more than one step.
    let block = pattern(0, 512, 9);
    assert_eq!(rig.run(0, 0, &same(0), Data::Out(&block)).0, Answer::GOOD);
    assert_eq!(image.bytes(16 * 512, 512 * 1024), block.repeat(1024));
    assert_eq!(image.bytes(1040 * 512, 512), pattern(1040 * 512, 512, 0));
    let verify = [0x2f, 0, 0, 0, 0, 16, 0, 4, 0, 0];
    assert_eq!(rig.run(0, 0, &verify, Data::None).0, Answer::GOOD);
    let mut compare = verify;
    compare[1] = 2;
    let mut expected = block.repeat(1024);
    assert_eq!(
        rig.run(0, 0, &compare, Data::Out(&expected)).0,
        Answer::GOOD
    );
    *expected.last_mut().unwrap() ^= 1;
    let differs = rig.run(0, 0, &compare, Data::Out(&expected)).0;
    assert_eq!((differs.status, differs.sense), (2, Some((0xe, 0x1d, 0))));
    // Without data, and by giving space back.
    assert_eq!(rig.run(0, 0, &same(9), Data::None).0, Answer::GOOD);
    assert_eq!(image.bytes(16 * 512, 512 * 1024), vec![0; 512 * 1024]);
    let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
    for lba in [2048_u64, 4096] {
        list.extend(lba.to_be_bytes());
        list.extend(1024_u32.to_be_bytes());
        list.extend([0; 4]);
    }
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0];
    assert_eq!(rig.run(0, 0, &unmap, Data::Out(&list)).0, Answer::GOOD);
    assert_eq!(image.bytes(2048 * 512, 512 * 1024), vec![0; 512 * 1024]);
    assert_eq!(image.bytes(3072 * 512, 512), pattern(3072 * 512, 512, 0));
    list[8] = 0xff;
    let beyond = rig.run(0, 0, &unmap, Data::Out(&list)).0;
    assert_eq!(beyond, check(5, 0x21, 0, 40));
}

#[test]
fn disks_that_keep_their_space() {
    let mut rig = Rig::new();
    let image = Image::with(0, |mut spec| {
        spec.discard = Discard::Ignore;
        spec
    });
    rig.add(0, 0, &image);
    let mut capacity = [0; 16];
    (capacity[0], capacity[1], capacity[13]) = (0x9e, 0x10, 32);
    assert_eq!(rig.run(0, 0, &capacity, Data::In(32)).1[14], 0);
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(
        rig.run(0, 0, &unmap, Data::Out(&[0; 24])).0,
        check(5, 0x20, 0, 24)
    );
}

#[test]
fn the_cache_can_be_switched_off() {
    let (mut rig, image) = Rig::with_unit();
    let mut page = vec![0, 0, 0, 0, 8, 18];
    page.resize(24, 0);
    let select = [0x15, 0x10, 0, 0, 24, 0];
    assert_eq!(rig.run(0, 0, &select, Data::Out(&page)).0, Answer::GOOD);
    let sense = [0x1a, 8, 8, 0, 24, 0];
    assert_eq!(rig.run(0, 0, &sense, Data::In(24)).1[6], 0);
    // Each write ends with a flush now.
    let flushes = Rule::once(Fault::Fail(5)).only(OpKind::Flush);
    image.faults.inject(flushes);
    let write = cdb10(0x2a, 0, 1);
    assert_eq!(rig.run(0, 0, &write, Data::Out(&[1; 512])).0.status, 2);
    assert_eq!(rig.run(0, 0, &write, Data::Out(&[1; 512])).0, Answer::GOOD);
    page[6] = 4;
    assert_eq!(rig.run(0, 0, &select, Data::Out(&page)).0, Answer::GOOD);
    image.faults.inject(flushes);
    assert_eq!(rig.run(0, 0, &write, Data::Out(&[1; 512])).0, Answer::GOOD);
    let mut fua = write;
    fua[1] = 8;
    assert_eq!(rig.run(0, 0, &fua, Data::Out(&[1; 512])).0.status, 2);
}

#[test]
fn a_disk_that_grows() {
    let (mut rig, image) = Rig::with_unit();
    let buffer = rig.offer_event();
    image.disk.grow(2 * DISK_BYTES).unwrap();
    rig.scsi.capacity_changed(0, 0).unwrap();
    let event = rig.wait_event(buffer);
    assert_eq!(event, [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x2a, 9, 0, 0]);
    assert_eq!(rig.attention(0, 0), (0x2a, 9));
    let (_, capacity) = rig.run(0, 0, &cdb10(0x25, 0, 0), Data::In(8));
    assert_eq!(capacity, [0, 0, 0x3f, 0xff, 0, 0, 2, 0]);
    assert_eq!(rig.read(0, 0, 16383, 1), (Answer::GOOD, vec![0; 512]));
}

#[test]
fn reservations_are_refused() {
    let (mut rig, _image) = Rig::with_unit();
    let mut cdb = [0; 10];
    for opcode in [0x5e, 0x5f, 0x56, 0x57] {
        cdb[0] = opcode;
        assert_eq!(rig.run(0, 0, &cdb, Data::None).0, check(5, 0x20, 0, 0));
    }
}

#[test]
fn an_empty_disk_has_no_medium() {
    let mut rig = Rig::new();
    let spec = NullSpec {
        size_bytes: 0,
        ..NullSpec::default()
    };
    let disk = Arc::new(Disk::null_co(&spec).unwrap());
    rig.scsi.add_lun(0, 0, disk, Identity::new()).unwrap();
    assert_eq!(rig.attention(0, 0), (0x29, 0));
    assert_eq!(rig.run(0, 0, &[0; 6], Data::None).0, check(2, 0x3a, 0, 0));
}

#[test]
fn many_commands_on_many_queues() {
    let mut spec = ScsiSpec::new("scsi0");
    spec.queues = 2;
    let second = ebbtide_iothread::IoThread::spawn("iothread1").unwrap();
    spec.more_iothreads = vec![second.remote()];
    let mut rig = Rig::with(spec, ALL);
    let image = Image::new(0);
    rig.add(0, 0, &image);
    let ram = rig.board.ram().clone();
    for round in 0..20 {
        let commands: Vec<_> = (0..40_u32)
            .map(|at| Command::read(&ram, scsi::address(0, 0), at.into(), at * 3 + round, 1))
            .collect();
        for (at, command) in commands.iter().enumerate() {
            rig.send(at % 2, command);
        }
        for at in 0..commands.len() {
            rig.driver.wait_used(&mut rig.requests[at % 2]).unwrap();
        }
        for (at, command) in (0..).zip(&commands) {
            assert_eq!(command.answer(), Answer::GOOD);
            let block = at * 3 + round as usize;
            assert_eq!(command.data(), pattern(block * 512, 512, 0));
        }
    }
    assert_eq!(rig.scsi.metrics().in_flight, 0);
}

/// As many pieces as the device says there may be, from a driver that chose a smaller queue than it could have.
#[test]
fn as_many_segments_as_are_told_in_a_small_queue() {
    let spec = ScsiSpec {
        queue_size: 4096,
        ..ScsiSpec::new("scsi0")
    };
    let mut rig = Rig::with(spec, ALL);
    let image = Image::new(0);
    rig.add(0, 0, &image);
    let told = usize::try_from(rig.driver.read_config(4, 4)).unwrap();
    let ram = rig.board.ram().clone();
    let blocks = u16::try_from(told).unwrap();
    let cdb = scsi::cdb10(0x28, 0, blocks);
    let read = Command::new(&ram, scsi::address(0, 0), 1, &cdb, Data::In(512));
    let mut parts = read.parts();
    let last = parts.len() - 1;
    let piece = parts[last];
    parts.splice(last.., vec![piece; told]);
    rig.run_laid_out(&read, &parts, Layout::Indirect);
    assert_eq!(read.answer(), Answer::GOOD, "{told}");
    assert_eq!(read.data(), pattern((told - 1) * 512, 512, 0));
}
