// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest that ejects disks whose requests are under way and takes the time of it; how it is asked to is in
//! [`ebbtide_hostile::ejector`].
//!
//! One processor does that, another one works on a disk that stays. Both sleep when there is nothing to do, as a guest
//! with an operating system would, so that who serves them has the host's processors.
#![no_std]
#![no_main]

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use ebbtide_hostile::bare::{
    ConfigPorts, Processor, Sleeper, heard, now, say, say_number, say_words, start_other,
};
use ebbtide_hostile::disk::{Disk, Operation};
use ebbtide_hostile::ejector::{self, registers};
use ebbtide_hostile::{Board, Functions, Width, map};

/// What the page tables map.
const REACH: u64 = 4 << 30;
/// Where the registers of disks go that come later; those of the work disk may be in [`map::HOLE`].
const LATER_HOLE: u64 = map::HOLE + (64 << 20);
/// Where the processors have their interrupt tables.
const TABLES: [u64; 2] = [0x180_0000, 0x180_1000];
/// Time the APIC's bus counts in nanoseconds: between looks at the serial line, and at a request.
const LISTEN: u32 = 1_000_000;
const POLL: u32 = 200_000;
/// Between two operations of the work.
const PAUSE: u32 = 5_000_000;
/// The work goes round on so many pieces of 4 KiB.
const PIECES: u64 = 1024;
const SECTORS: u64 = 8;

/// Reasons not to go on: there is no disk; it can't be brought up; so a disk that came.
const NO_WORK_DISK: u64 = 1;
const WORK_DISK: u64 = 2;
const OTHER_DISK: u64 = 3;

/// Where the work disk is: its slot and one more, 0 as long as that is not known.
static WORK_SLOT: AtomicU64 = AtomicU64::new(0);
/// The work goes on.
static WORKING: AtomicU64 = AtomicU64::new(0);
/// Operations that have ended, and errors.
static DONE: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);
/// When the last one ended, and the longest time between two, in ticks.
static LAST: AtomicU64 = AtomicU64::new(0);
static LONGEST: AtomicU64 = AtomicU64::new(0);

fn board() -> ConfigPorts {
    ConfigPorts(Processor { reach: REACH })
}

#[unsafe(no_mangle)]
extern "C" fn first(_line: u64) -> ! {
    let mut board = board();
    let sleeper = Sleeper::new(&mut board.0, TABLES[0]);
    start_other(&mut board.0);
    while WORK_SLOT.load(SeqCst) == 0 {
        sleeper.sleep(&mut board.0, LISTEN);
    }
    answer(&mut board, ejector::READY, &[WORK_SLOT.load(SeqCst) - 1]);
    board.port_write(registers::BUS, Width::Dword, registers::BUS_0);
    let mut disks = Disks {
        list: [None; 32],
        next: 0,
    };
    loop {
        while let Some(command) = heard(&mut board.0) {
            obey(&mut board, &mut disks, command);
        }
        sleeper.sleep(&mut board.0, LISTEN);
    }
}

/// The disks to be ejected, in the order of their slots.
struct Disks {
    list: [Option<Disk>; 32],
    /// Those before it have been ejected.
    next: usize,
}

fn obey(board: &mut ConfigPorts, disks: &mut Disks, command: u8) {
    let Some(word) = ejector::word(command) else {
        return;
    };
    match command {
        ejector::SUBMIT => {
            let count = submit(board, disks);
            answer(board, word, &[count]);
        }
        ejector::WORK => {
            LAST.store(now(), SeqCst);
            WORKING.store(1, SeqCst);
            answer(board, word, &[]);
        }
        ejector::REPORT => {
            let open = now().saturating_sub(LAST.load(SeqCst));
            let longest = LONGEST.load(SeqCst).max(open);
            answer(
                board,
                word,
                &[DONE.load(SeqCst), longest, ERRORS.load(SeqCst)],
            );
        }
        ejector::IDLE => {
            let ticks = timed_write(board, registers::BUS, registers::BUS_0);
            answer(board, word, &[ticks]);
        }
        ejector::EJECT => {
            let Some(disk) = disks.list.get(disks.next).copied().flatten() else {
                return answer(board, ejector::FAILED, &[OTHER_DISK]);
            };
            disks.next += 1;
            let ticks = timed_write(board, registers::EJECT, 1 << disk.slot());
            let config = board.read(disk.config(), Width::Dword);
            answer(board, word, &[disk.slot().into(), ticks, config]);
        }
        ejector::LOOK => {
            let up = board.port_read(registers::UP, Width::Dword);
            let (mut answered, mut failed) = (0, 0);
            for disk in disks.list.iter().flatten() {
                match disk.answered(board) {
                    Some(true) => answered |= 1 << disk.slot(),
                    Some(false) => failed |= 1 << disk.slot(),
                    None => {}
                }
            }
            answer(board, word, &[up.into(), answered, failed]);
        }
        _ => answer(board, word, &[now()]),
    }
}

/// Brings up all disks but the work disk and gives each a read; how many.
fn submit(board: &mut ConfigPorts, disks: &mut Disks) -> u64 {
    let work = WORK_SLOT.load(SeqCst) - 1;
    let mut functions = Functions::none(REACH, LATER_HOLE);
    functions.refresh(board);
    let mut count = 0;
    for function in functions.known() {
        let home = map::ARENA.start + (count + 1) * Disk::MEMORY;
        if !Disk::is(function) || function.config >> 15 & 0x1f == work {
            continue;
        }
        let Ok(disk) = Disk::bring_up(board, function, home) else {
            answer(board, ejector::FAILED, &[OTHER_DISK]);
            continue;
        };
        if let Some(place) = disks.list.get_mut(count as usize) {
            *place = Some(disk);
            count += 1;
        }
    }
    for disk in disks.list.iter_mut().flatten() {
        disk.submit(board, Operation::Read, 0);
    }
    count
}

/// The ticks that a write to a port takes.
fn timed_write(board: &mut ConfigPorts, port: u16, value: u32) -> u64 {
    let begun = now();
    board.port_write(port, Width::Dword, value);
    now().saturating_sub(begun)
}

/// The processor that works.
#[unsafe(no_mangle)]
extern "C" fn other() -> ! {
    let mut board = board();
    let sleeper = Sleeper::new(&mut board.0, TABLES[1]);
    let mut disk = work_disk(&mut board, &sleeper);
    WORK_SLOT.store(u64::from(disk.slot()) + 1, SeqCst);
    while WORKING.load(SeqCst) == 0 {
        sleeper.sleep(&mut board.0, LISTEN);
    }
    for piece in (0..PIECES).cycle() {
        let mark = now();
        disk.set_data(&mut board, mark);
        operation(&mut board, &sleeper, &mut disk, Operation::Write, piece);
        disk.set_data(&mut board, 0);
        operation(&mut board, &sleeper, &mut disk, Operation::Read, piece);
        if disk.data(&mut board) != mark {
            ERRORS.store(ERRORS.load(SeqCst) + 1, SeqCst);
        }
    }
    loop {
        sleeper.sleep(&mut board.0, PAUSE);
    }
}

fn work_disk(board: &mut ConfigPorts, sleeper: &Sleeper) -> Disk {
    let mut functions = Functions::none(REACH, map::HOLE);
    functions.refresh(board);
    let found = functions.known().iter().find(|it| Disk::is(it));
    let reason = match found.map(|it| Disk::bring_up(board, it, map::ARENA.start)) {
        Some(Ok(disk)) => return disk,
        Some(Err(_)) => WORK_DISK,
        None => NO_WORK_DISK,
    };
    answer(board, ejector::FAILED, &[reason]);
    loop {
        sleeper.sleep(&mut board.0, PAUSE);
    }
}

fn operation(
    board: &mut ConfigPorts,
    sleeper: &Sleeper,
    disk: &mut Disk,
    operation: Operation,
    piece: u64,
) {
    disk.submit(board, operation, piece * SECTORS);
    let well = loop {
        if let Some(well) = disk.answered(board) {
            break well;
        }
        sleeper.sleep(&mut board.0, POLL);
    };
    let ended = now();
    let gap = ended.saturating_sub(LAST.load(SeqCst));
    LAST.store(ended, SeqCst);
    // Only this processor writes these.
    LONGEST.store(LONGEST.load(SeqCst).max(gap), SeqCst);
    ERRORS.store(ERRORS.load(SeqCst) + u64::from(!well), SeqCst);
    DONE.store(DONE.load(SeqCst) + 1, SeqCst);
    sleeper.sleep(&mut board.0, PAUSE);
}

/// Says a line.
fn answer(board: &mut ConfigPorts, word: &str, numbers: &[u64]) {
    say_words(&mut board.0, ejector::LINE.as_bytes());
    say_words(&mut board.0, word.as_bytes());
    for number in numbers {
        say_words(&mut board.0, b" ");
        say_number(&mut board.0, *number);
    }
    say_words(&mut board.0, b"\n");
}

#[panic_handler]
fn panicked(_: &PanicInfo<'_>) -> ! {
    let mut board = Processor { reach: REACH };
    say(&mut board, b"flat: failed ", 0);
    loop {
        board.port_write(0xcf9, Width::Byte, 6);
    }
}
