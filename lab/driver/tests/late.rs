// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a backend does after the machine was reset without waiting for it: to the memory of the last guest, of which it is
//! known what is in use, and never to that of the next.

mod disk;
mod hba;
mod plugging;

use std::ops::Range;
use std::time::Duration;

use disk::{Rig, SECTOR, pattern};
use ebbtide_block::fault::{Fault, Faults, Order, Point, Rule};
use ebbtide_lab_driver::blk::{Request, status};
use ebbtide_lab_driver::mem::Answer;
use ebbtide_lab_driver::scsi::{self, Command, Control, function};
use ebbtide_lab_driver::{Board, LIMIT, Layout, block_on, poll};
use ebbtide_memory::{Access, Gpa, Phase, Region, Ticket};
use ebbtide_virtio::VirtioPci;

const SOON: Duration = Duration::from_millis(50);
/// What the next guest's memory is full of.
const NEXT: u8 = 0xa5;
const RAM_BYTES: usize = 32 << 20;

/// The backend has every operation and does not carry it out.
fn hold(faults: &Faults) {
    faults.inject(Rule::always(Fault::Hold).at(Point::Begun));
}

fn release(faults: &Faults) {
    faults.clear();
    faults.release(Order::Reverse);
}

/// The machine is reset, and waits no longer.
fn forget(function: &VirtioPci) {
    assert!(block_on(function.quiesce(), SOON).is_none(), "it drains");
    assert!(block_on(function.forget_guest(), LIMIT).is_some());
    function.abandon();
}

/// Everything that is pinned of the board's RAM, all of which has to be known.
fn known(board: &Board, function: &VirtioPci) -> Vec<Range<u64>> {
    let lists = function.pinned();
    assert_eq!(board.ram_block().pins(), lists.len() as u64, "{lists:x?}");
    lists.concat()
}

/// Another guest in the memory of the last one, or in memory of its own.
fn next_guest(board: &mut Board, function: &VirtioPci, parted: bool) -> Option<Ticket> {
    let pinned = known(board, function);
    let ticket = parted.then(|| {
        let ticket = board.renew_ram().expect("memory");
        assert!(ticket.wait(Phase::Draining, LIMIT));
        assert!(ticket.free_but(&pinned).expect("free") < RAM_BYTES as u64 / 2);
        ticket
    });
    board.ram().write(Gpa(0), &[NEXT; RAM_BYTES]);
    ticket
}

/// The first byte that the next guest has not put there.
fn touched(board: &Board) -> Option<usize> {
    let bytes = board.ram().read(Gpa(0), RAM_BYTES);
    bytes.iter().position(|byte| *byte != NEXT)
}

fn gone(ticket: Ticket) {
    assert!(ticket.wait(Phase::Drained, LIMIT), "{}", ticket.report());
    ticket.destroy().map_err(|(_, error)| error).expect("free");
}

/// Reads that come late are in the next guest's memory if it is the last one's, and only then: it is this that a reset has
/// to prevent.
#[test]
fn a_late_read() {
    for parted in [false, true] {
        let mut rig = Rig::new();
        hold(&rig.faults);
        let ram = rig.board.ram().clone();
        let reads: Vec<_> = (0..4).map(|i| Request::read(&ram, i * 8, 4096)).collect();
        rig.add_all(&reads);
        assert!(poll(|| rig.faults.held() == 4));
        forget(&rig.function);
        let ticket = next_guest(&mut rig.board, &rig.function, parted);
        release(&rig.faults);
        assert!(poll(|| rig.function.in_flight().requests == 0));
        if let Some(ticket) = ticket {
            assert_eq!(touched(&rig.board), None);
            gone(ticket);
            continue;
        }
        assert!(touched(&rig.board).is_some());
        // But for the answers.
        assert!(reads.iter().all(|read| read.status() == NEXT));
    }
}

/// A write that comes late writes what the last guest has given it.
#[test]
fn a_late_write() {
    let mut rig = Rig::new();
    hold(&rig.faults);
    let ram = rig.board.ram().clone();
    let data = pattern(16 * SECTOR, 5);
    let write = Request::write(&ram, 32, &data);
    rig.add_all(&[write]);
    assert!(poll(|| rig.faults.held() == 1));
    forget(&rig.function);
    let ticket = next_guest(&mut rig.board, &rig.function, true);
    // The flush behind it is not begun any more.
    release(&rig.faults);
    assert!(poll(|| rig.function.in_flight().requests == 0));
    assert_eq!(rig.image_bytes(32 * SECTOR as u64, data.len()), data);
    assert_eq!(touched(&rig.board), None);
    ticket.map_or_else(|| panic!("parted"), gone);
}

#[test]
fn a_late_command_and_a_function_that_waits_for_it() {
    let (mut rig, image) = hba::Rig::with_unit();
    hold(&image.faults);
    let ram = rig.board.ram().clone();
    let command = Command::read(&ram, scsi::address(0, 0), 7, 4, 16);
    rig.send(0, &command);
    assert!(poll(|| image.faults.held() == 1));
    let abort = Control::function(&ram, function::ABORT_TASK, scsi::address(0, 0), 7);
    let control = &mut rig.control;
    control.add(&abort.parts(), Layout::Direct).expect("room");
    rig.driver.kick(0);
    assert!(poll(|| rig.function.in_flight().requests == 2));
    forget(&rig.function);
    let ticket = next_guest(&mut rig.board, &rig.function, true);
    release(&image.faults);
    assert!(poll(|| rig.function.in_flight().requests == 0));
    assert_eq!(touched(&rig.board), None);
    ticket.map_or_else(|| panic!("parted"), gone);
}

/// What has ended holds nothing, be it by an answer or by a reset that waits.
#[test]
fn nothing_is_pinned_for_what_has_ended() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(1, SECTOR), Ok(disk::pattern_at(SECTOR, SECTOR, 0)));
    assert_eq!(rig.write(2, &pattern(SECTOR, 1)), status::OK);
    assert!(poll(|| known(&rig.board, &rig.function).is_empty()));
    hold(&rig.faults);
    let ram = rig.board.ram().clone();
    rig.add_all(&[Request::read(&ram, 0, SECTOR)]);
    assert!(poll(|| rig.faults.held() == 1));
    assert_eq!(known(&rig.board, &rig.function).len(), 2);
    let drained = rig.function.quiesce();
    release(&rig.faults);
    assert!(block_on(drained, LIMIT).is_some());
    assert!(poll(|| known(&rig.board, &rig.function).is_empty()));
}

/// The memory of a virtio-mem device that something is read into: the next guest plugs the same blocks, which are others.
#[test]
fn a_late_read_into_device_memory() {
    use plugging::{BASE, BLOCK, GIB, MIB};
    let mut rig = plugging::Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 4), Answer::Ack);
    let (space, reader) = (rig.board.space(), rig.board.memory().register());
    let read = space
        .read(&reader)
        .pin(Gpa(BASE), 4096, Access::Write)
        .expect("plugged");
    let (memory, root) = (rig.board.memory(), rig.board.root());
    assert!(block_on(rig.function.quiesce(), LIMIT).is_some());
    let emptied = block_on(rig.mem.system_reset(), SOON);
    assert!(emptied.is_none(), "taken from under a read");

    let new = memory.ram().renew(&rig.block).expect("memory");
    let region = Region::ram("vmem0", &new);
    let ticket = memory.update(|map| {
        map.remove(&rig.region)?;
        let ticket = map.retire(&rig.block)?;
        map.add(root, &region, BASE, 0)?;
        Ok(ticket)
    });
    let ticket = ticket.expect("the same place");
    rig.mem.renew(&new);
    assert_eq!(rig.mem.status().plugged_bytes, 0);
    assert!(block_on(rig.mem.system_reset(), LIMIT).is_some_and(|it| it.is_ok()));
    rig.restart();
    assert_eq!(rig.plug(0, 2), Answer::Ack);
    assert_eq!(
        (rig.mem.status().plugged_bytes, new.plugged_bytes()),
        (2 * BLOCK, 2 * BLOCK)
    );
    rig.board.ram().write(Gpa(BASE), &[NEXT; 4096]);
    read.write_at(0, &[0x66; 4096]).expect("still there");
    assert_eq!(rig.board.ram().read(Gpa(BASE), 4096), [NEXT; 4096]);
    drop(read);
    gone(ticket);
}
