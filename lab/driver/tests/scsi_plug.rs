// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Units that come and go while commands keep coming on two queues of two threads.

mod hba;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ebbtide_block::fault::{Fault, Rule};
use ebbtide_block::{Disk, DiskSpec, Faults};
use ebbtide_iothread::IoThread;
use ebbtide_lab_driver::scsi::{self, Command, function, response};
use ebbtide_lab_driver::{LIMIT, block_on};
use ebbtide_virtio::scsi::{Identity, ScsiSpec, VirtioScsi};
use hba::{ALL, Image, Rig, pattern};

/// Adds and removes the unit 0:1 until told to stop; how often it did.
fn come_and_go(scsi: &VirtioScsi, path: &std::path::Path, stop: &AtomicBool) -> u32 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let faults = Faults::new();
        let jitter = Fault::Jitter(Duration::from_micros(300));
        faults.inject(Rule::always(jitter));
        // It was closed with the unit before: nobody else has the image locked.
        let disk = Disk::open(&DiskSpec::new(path)).expect("the lock is free");
        let disk = disk.with_faults(&faults).expect("not attached");
        scsi.add_lun(0, 1, Arc::new(disk), Identity::new())
            .expect("the place is free");
        std::thread::sleep(Duration::from_micros(u64::from(rounds % 7) * 150));
        let removal = scsi.remove_lun(0, 1).expect("it is there");
        let disk = block_on(removal.gone(), LIMIT).expect("it drains");
        drop(disk.expect("removed once"));
        rounds += 1;
    }
    rounds
}

#[test]
fn every_command_is_answered_whatever_becomes_of_its_unit() {
    let second = IoThread::spawn("iothread1").unwrap();
    let mut spec = ScsiSpec::new("scsi0");
    (spec.queues, spec.more_iothreads) = (2, vec![second.remote()]);
    let mut rig = Rig::with(spec, ALL);
    let steady = Image::new(0);
    rig.add(0, 0, &steady);
    let passing = Image::new(5);
    let path = passing.file.path().to_owned();
    drop(passing.disk);
    let scsi = Arc::clone(&rig.scsi);
    let stop = AtomicBool::new(false);
    let (rounds, good, gone) = std::thread::scope(|scope| {
        let plugging = scope.spawn(|| come_and_go(&scsi, &path, &stop));
        let (mut good, mut gone) = (0_u32, 0_u32);
        for round in 0..400_usize {
            let ram = rig.board.ram().clone();
            let commands: Vec<_> = (0..24_u16)
                .map(|at| {
                    let lun = scsi::address(0, at % 3 % 2);
                    Command::read(&ram, lun, at.into(), u32::from(at), 1)
                })
                .collect();
            for (at, command) in commands.iter().enumerate() {
                rig.send(at % 2, command);
            }
            if round % 50 == 0 {
                rig.manage(function::LOGICAL_UNIT_RESET, 0, 1, 0);
            }
            for at in 0..commands.len() {
                rig.driver.wait_used(&mut rig.requests[at % 2]).unwrap();
            }
            for (at, command) in commands.iter().enumerate() {
                let (steady, answer) = (at % 3 % 2 == 0, command.answer());
                match (answer.response, answer.sense) {
                    (response::OK, None) => {
                        let seed = if steady { 0 } else { 5 };
                        assert_eq!(command.data(), pattern(at * 512, 512, seed));
                        good += u32::from(!steady);
                    }
                    // News of units, or none there.
                    (response::OK, Some((6, 0x29 | 0x3f, _) | (5, 0x25, 0))) => {}
                    (response::BAD_TARGET | response::RESET, None) if !steady => gone += 1,
                    other => panic!("unit {}: {other:?}", u8::from(!steady)),
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        (plugging.join().unwrap(), good, gone)
    });
    assert!(
        rounds > 10 && good > 0 && gone > 0,
        "{rounds} {good} {gone}"
    );
    assert_eq!(rig.scsi.metrics().in_flight, 0);
    assert_eq!(rig.scsi.luns(), [(0, 0)]);
    assert!(!rig.driver.needs_reset());
}
