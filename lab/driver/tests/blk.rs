// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device as a driver meets it (virtio 1.3, 5.2).

mod disk;

use disk::{ALL, DISK_BYTES, Options, Rig, SECTOR, SERIAL, pattern, pattern_at};
use ebbtide_block::OpKind;
use ebbtide_block::fault::{Fault, Rule};
use ebbtide_lab_driver::blk::{Request, Segment, UNMAP, status};
use ebbtide_lab_driver::{Layout, Part};
use ebbtide_memory::Gpa;
use ebbtide_virtio::blk::feature;

/// ENOSPC
const NO_SPACE: i32 = 28;
/// EIO
const IO_ERROR: i32 = 5;
const SECTORS: u64 = DISK_BYTES / SECTOR as u64;

#[test]
fn what_is_written_is_read_and_flushed() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(8, 4096), Ok(pattern_at(4096, 4096, 0)));
    let data = pattern(64 * 1024, 1);
    assert_eq!(rig.write(16, &data), status::OK);
    let flush = Request::flush(rig.board.ram());
    assert_eq!(rig.run(&flush), status::OK);
    assert_eq!(rig.read(16, data.len()), Ok(data.clone()));
    assert_eq!(rig.image_bytes(16 * 512, data.len()), data);
    assert_eq!(
        rig.image_bytes(16 * 512 + data.len() as u64, 512),
        pattern_at(73728, 512, 0)
    );
}

#[test]
fn the_serial_number() {
    let mut rig = Rig::new();
    let request = Request::get_id(rig.board.ram());
    assert_eq!(rig.run(&request), status::OK);
    assert_eq!(request.data(), &SERIAL.as_bytes()[..20]);
    // A longer buffer keeps what is behind the 20 bytes.
    let request = Request::raw(rig.board.ram(), 8, 0, &[0xee; 32], Some(32));
    let used = rig
        .driver
        .roundtrip(0, &mut rig.queue, &request.parts(), Layout::Direct)
        .unwrap();
    assert_eq!(used.written, 20, "the status lies behind a gap");
    assert_eq!(request.status(), status::OK);
    assert_eq!(request.data()[20..], [0xee; 12]);
}

/// Cuts parts into pieces of `len` bytes.
fn cut(parts: &[Part], len: u32) -> Vec<Part> {
    let mut pieces = Vec::new();
    for part in parts {
        let mut rest = *part;
        while rest.len > len {
            let [front, back] = rest.split(len);
            pieces.push(front);
            rest = back;
        }
        pieces.push(rest);
    }
    pieces
}

#[test]
fn any_descriptor_layout() {
    let mut rig = Rig::new();
    for (round, piece) in [1, 3, 7, 16, 100, 511, 4096].into_iter().enumerate() {
        let len = if piece < 16 { 512 } else { 2048 };
        let data = pattern(len, round as u8 + 1);
        let write = Request::write(rig.board.ram(), 40, &data);
        let read = Request::read(rig.board.ram(), 40, len);
        for layout in [Layout::Indirect, Layout::Mixed(5)] {
            assert_eq!(
                rig.run_laid_out(&write, &cut(&write.parts(), piece), layout),
                status::OK,
                "{piece} {layout:?}"
            );
            assert_eq!(
                rig.run_laid_out(&read, &cut(&read.parts(), piece), layout),
                status::OK,
                "{piece} {layout:?}"
            );
            assert_eq!(read.data(), data, "{piece} {layout:?}");
        }
    }
}

#[test]
fn one_buffer_for_header_and_data_and_one_for_data_and_status() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    // Header and data in one.
    let out = ram.alloc(16 + 512, 8);
    let mut bytes = [0; 16 + 512];
    bytes[0] = 1;
    bytes[8] = 3;
    bytes[16..].copy_from_slice(&pattern(512, 9));
    ram.write(out, &bytes);
    let code = ram.alloc(1, 1);
    let parts = [Part::readable(out, bytes.len()), Part::writable(code, 1)];
    rig.driver
        .roundtrip(0, &mut rig.queue, &parts, Layout::Direct)
        .unwrap();
    assert_eq!(rig.image_bytes(3 * 512, 512), pattern(512, 9));
    // Data and status in one.
    ram.write(out, &[0]);
    let answer = ram.alloc(513, 1);
    ram.write(answer, &[0xff; 513]);
    let parts = [Part::readable(out, 16), Part::writable(answer, 513)];
    let used = rig
        .driver
        .roundtrip(0, &mut rig.queue, &parts, Layout::Direct)
        .unwrap();
    assert_eq!(used.written, 513);
    let expected = [pattern(512, 9), vec![status::OK]].concat();
    assert_eq!(ram.read(answer, 513), expected);
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Segment {
    Segment {
        sector,
        sectors,
        flags,
    }
}

#[test]
fn discard_and_write_zeroes() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let zeroes = Request::write_zeroes(&ram, &[segment(8, 8, UNMAP), segment(32, 1, 0)]);
    assert_eq!(rig.run(&zeroes), status::OK);
    assert_eq!(rig.image_bytes(8 * 512, 8 * 512), vec![0; 8 * 512]);
    assert_eq!(rig.image_bytes(32 * 512, 512), vec![0; 512]);
    assert_eq!(rig.image_bytes(16 * 512, 512), pattern_at(8192, 512, 0));
    let discard = Request::discard(&ram, &[segment(1024, 1024, 0), segment(4096, 8, 0)]);
    assert_eq!(rig.run(&discard), status::OK);
    let expected = pattern_at(2048 * 512, 512, 0);
    assert_eq!(rig.image_bytes(2048 * 512, 512), expected);
    assert_eq!(rig.blk.metrics().discard.requests, 1);
    assert_eq!(rig.blk.metrics().write_zeroes.requests, 1);
}

#[test]
fn wrong_requests_get_an_error_status_and_nothing_else() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let wrong = [
        (Request::read(&ram, SECTORS, 512), status::IOERR),
        (Request::read(&ram, SECTORS - 1, 1024), status::IOERR),
        (Request::read(&ram, u64::MAX, 512), status::IOERR),
        (Request::read(&ram, u64::MAX / 512 + 1, 512), status::IOERR),
        (Request::read(&ram, 0, 100), status::IOERR),
        (Request::write(&ram, 0, &[1; 513]), status::IOERR),
        (Request::write(&ram, SECTORS, &[1; 512]), status::IOERR),
        (Request::raw(&ram, 2, 0, &[1; 512], None), status::UNSUPP),
        (
            Request::raw(&ram, u32::MAX, 0, &[], Some(512)),
            status::UNSUPP,
        ),
        (
            Request::raw(&ram, 0x8000_0000, 0, &[], Some(512)),
            status::UNSUPP,
        ),
        (Request::discard(&ram, &[]), status::IOERR),
        (
            Request::discard(&ram, &[segment(0, 1, 0); 33]),
            status::IOERR,
        ),
        (
            Request::discard(&ram, &[segment(0, 1, UNMAP)]),
            status::UNSUPP,
        ),
        (Request::discard(&ram, &[segment(0, 1, 4)]), status::UNSUPP),
        (
            Request::discard(&ram, &[segment(SECTORS, 1, 0)]),
            status::IOERR,
        ),
        (
            Request::discard(&ram, &[segment(0, u32::MAX, 0)]),
            status::IOERR,
        ),
        (
            Request::write_zeroes(&ram, &[segment(0, 1, 2)]),
            status::UNSUPP,
        ),
        (
            Request::write_zeroes(&ram, &[segment(u64::MAX, 1, 0)]),
            status::IOERR,
        ),
        // The second range is wrong: the first must not have been zeroed.
        (
            Request::write_zeroes(&ram, &[segment(0, 1, 0), segment(SECTORS, 1, 0)]),
            status::IOERR,
        ),
        (Request::raw(&ram, 11, 0, &[0; 15], None), status::IOERR),
        (Request::raw(&ram, 13, 0, &[0; 17], None), status::IOERR),
    ];
    for (at, (request, expected)) in wrong.iter().enumerate() {
        assert_eq!(rig.run(request), *expected, "request {at}");
    }
    assert_eq!(
        rig.image_bytes(0, DISK_BYTES as usize),
        pattern(DISK_BYTES as usize, 0)
    );
    assert_eq!(rig.blk.metrics().unsupported, 3);
    rig.assert_works();
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let mut rig = Rig::with(Options {
        features: ALL & !feature::DISCARD & !feature::WRITE_ZEROES,
        ..Options::default()
    });
    let ram = rig.board.ram().clone();
    let discard = Request::discard(&ram, &[segment(0, 1, 0)]);
    assert_eq!(rig.run(&discard), status::UNSUPP);
    let zeroes = Request::write_zeroes(&ram, &[segment(0, 1, 0)]);
    assert_eq!(rig.run(&zeroes), status::UNSUPP);
    rig.assert_works();
}

#[test]
fn a_readonly_disk() {
    let mut rig = Rig::with(Options {
        readonly: true,
        ..Options::default()
    });
    assert_ne!(rig.driver.features() & feature::RO, 0);
    assert_eq!(
        rig.driver.features() & (feature::DISCARD | feature::WRITE_ZEROES | feature::CONFIG_WCE),
        0
    );
    assert_eq!(rig.write(0, &[1; 512]), status::IOERR);
    let flush = Request::flush(rig.board.ram());
    assert_eq!(rig.run(&flush), status::OK);
    assert_eq!(rig.image_bytes(0, 512), pattern(512, 0));
    rig.assert_works();
}

#[test]
fn features_and_configuration() {
    let rig = Rig::new();
    let offered = rig.driver.offered();
    for bit in [
        feature::SEG_MAX,
        feature::BLK_SIZE,
        feature::FLUSH,
        feature::TOPOLOGY,
        feature::CONFIG_WCE,
        feature::DISCARD,
        feature::WRITE_ZEROES,
    ] {
        assert_ne!(offered & bit, 0, "{bit:#x}");
    }
    assert_eq!(offered & (feature::RO | feature::MQ), 0);
    assert_eq!(rig.driver.read_config_u64(0), SECTORS);
    assert_eq!(rig.driver.read_config(12, 4), 254);
    assert_eq!(rig.driver.read_config(20, 4), 512);
    assert_eq!(rig.driver.read_config(32, 1), 1);
    assert_eq!(rig.driver.read_config(34, 2), 1);
}

#[test]
fn several_queues() {
    let rig = Rig::with(Options {
        queues: 2,
        ..Options::default()
    });
    assert_ne!(rig.driver.features() & feature::MQ, 0);
    assert_eq!(rig.driver.read_config(34, 2), 2);
    assert_eq!(rig.driver.max_queue_size(1), disk::QUEUE_SIZE);
    assert_eq!(rig.driver.max_queue_size(2), 0);
}

#[test]
fn write_through_flushes_every_write() {
    let mut rig = Rig::new();
    // A write that fails with its flush has flushed.
    rig.faults
        .inject(Rule::always(Fault::Fail(IO_ERROR)).only(OpKind::Flush));
    assert_eq!(rig.write(0, &[1; 512]), status::OK);
    rig.driver.write_config(32, 1, 0);
    assert_eq!(rig.driver.read_config(32, 1), 0);
    assert_eq!(rig.write(0, &[2; 512]), status::IOERR);
    let zeroes = Request::write_zeroes(rig.board.ram(), &[segment(0, 1, 0)]);
    assert_eq!(rig.run(&zeroes), status::IOERR);
    rig.driver.write_config(32, 1, 1);
    assert_eq!(rig.write(0, &[3; 512]), status::OK);
    // A driver that cannot flush gets it done.
    rig.restart(ALL & !feature::FLUSH & !feature::CONFIG_WCE);
    assert_eq!(rig.write(0, &[4; 512]), status::IOERR);
    rig.faults.clear();
    assert_eq!(rig.write(0, &[5; 512]), status::OK);
}

#[test]
fn the_cache_mode_starts_anew_with_each_driver() {
    let mut rig = Rig::new();
    rig.driver.write_config(32, 1, 0);
    rig.restart(ALL);
    assert_eq!(rig.driver.read_config(32, 1), 1);
    rig.restart(ALL & !feature::FLUSH);
    assert_eq!(rig.driver.read_config(32, 1), 0, "5.2.5.2");
}

#[test]
fn writes_to_other_configuration_fields_change_nothing() {
    let mut rig = Rig::new();
    let before: Vec<_> = (0..64).map(|at| rig.driver.read_config(at, 1)).collect();
    for at in 0..64 {
        for size in [1, 2, 4] {
            if at + u64::from(size) <= 64 && !(at == 32 && size == 1) {
                rig.driver.write_config(at, size, 0xffff_ffff);
            }
        }
    }
    let after: Vec<_> = (0..64).map(|at| rig.driver.read_config(at, 1)).collect();
    assert_eq!(before, after);
    rig.assert_works();
}

#[test]
fn a_chain_without_room_for_a_status_wants_a_reset() {
    let mut rig = Rig::new();
    let request = Request::write(rig.board.ram(), 0, &[7; 512]);
    let parts: Vec<_> = request
        .parts()
        .into_iter()
        .filter(|part| !part.writable)
        .collect();
    rig.queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    assert_eq!(rig.blk.metrics().malformed, 1);
    assert_eq!(rig.image_bytes(0, 512), pattern(512, 0));
    rig.restart(ALL);
    rig.assert_works();
}

#[test]
fn a_short_header_is_an_error_of_the_request() {
    let mut rig = Rig::new();
    for len in [1, 15] {
        let request = Request::flush(rig.board.ram());
        let mut parts = request.parts();
        parts[0].len = len;
        assert_eq!(
            rig.run_laid_out(&request, &parts, Layout::Direct),
            status::IOERR
        );
    }
    let request = Request::flush(rig.board.ram());
    let only_status = [request.parts()[1]];
    assert_eq!(
        rig.run_laid_out(&request, &only_status, Layout::Direct),
        status::IOERR
    );
    rig.assert_works();
}

#[test]
fn data_outside_ram_is_an_error_of_the_request() {
    let mut rig = Rig::new();
    let nowhere = Gpa(1 << 35);
    for request in [
        Request::read(rig.board.ram(), 0, 1024),
        Request::write(rig.board.ram(), 0, &[1; 1024]),
    ] {
        let mut parts = request.parts();
        let [front, mut back] = parts[1].split(512);
        back.gpa = nowhere;
        parts.splice(1..2, [front, back]);
        assert_eq!(
            rig.run_laid_out(&request, &parts, Layout::Direct),
            status::IOERR
        );
        parts[0].gpa = nowhere;
        assert_eq!(
            rig.run_laid_out(&request, &parts, Layout::Direct),
            status::IOERR,
            "header"
        );
    }
    assert_eq!(rig.blk.metrics().bad_memory, 4);
    assert_eq!(rig.image_bytes(0, 1024), pattern(1024, 0));
    rig.assert_works();
}

#[test]
fn a_status_outside_ram_wants_a_reset() {
    let mut rig = Rig::new();
    let request = Request::flush(rig.board.ram());
    let mut parts = request.parts();
    parts[1].gpa = Gpa(1 << 35);
    rig.queue.add(&parts, Layout::Direct).unwrap();
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    rig.restart(ALL);
    rig.assert_works();
}

#[test]
fn errors_of_the_host_are_errors_of_the_request() {
    let mut rig = Rig::new();
    for (errno, kind) in [
        (NO_SPACE, OpKind::Write),
        (IO_ERROR, OpKind::Read),
        (IO_ERROR, OpKind::Flush),
    ] {
        rig.faults.inject(Rule::once(Fault::Fail(errno)).only(kind));
        let ram = rig.board.ram().clone();
        let request = match kind {
            OpKind::Write => Request::write(&ram, 0, &pattern(512, 0)),
            OpKind::Read => Request::read(&ram, 0, 512),
            _ => Request::flush(&ram),
        };
        assert_eq!(rig.run(&request), status::IOERR);
        assert_eq!(rig.run(&request), status::OK);
    }
    let metrics = rig.blk.metrics();
    assert_eq!(
        (
            metrics.write.requests,
            metrics.write.failures,
            metrics.write.bytes
        ),
        (2, 1, 512)
    );
    assert_eq!((metrics.read.failures, metrics.flush.failures), (1, 1));
    assert!(metrics.read.latency_max > std::time::Duration::ZERO);
    assert_eq!(metrics.in_flight, 0);
}

#[test]
fn an_image_that_shrinks_gives_errors() {
    let mut rig = Rig::new();
    rig.image.as_file().set_len(DISK_BYTES / 2).unwrap();
    assert_eq!(rig.read(SECTORS / 2, 512), Err(status::IOERR));
    rig.assert_works();
}

/// The name of an open file is of no use to anybody but the operator.
#[test]
fn an_image_that_is_deleted_goes_on() {
    let mut rig = Rig::new();
    std::fs::remove_file(rig.image.path()).unwrap();
    assert_eq!(rig.write(8, &pattern(512, 7)), status::OK);
    assert_eq!(rig.read(8, 512), Ok(pattern(512, 7)));
    rig.assert_works();
}
