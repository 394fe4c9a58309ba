// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: [`Hostile`] on each processor of a machine without an operating system.
//!
//! `seed=N` and `cpus=N` on its command line say what it does. There is no interrupt table: whatever it provokes resets
//! the machine, and it begins again with the numbers of its next life. On the first serial port it says how far it is.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use ebbtide_hostile::bare::{Processor, option, say, start_other};
use ebbtide_hostile::{Board, Hostile, Width, map};

const PAGE_DIRECTORIES: u64 = 0xa000;
/// Acts between two words on the serial line.
const WORD: u64 = 200;
/// Where the lives' seed is, behind their count.
const SEED: u64 = map::LIVES + 16;
const LIVES_MAGIC: u64 = 0x6562_6274_6964_6531;

#[unsafe(no_mangle)]
extern "C" fn first(line: u64) -> ! {
    let mut board = Processor { reach: 4 << 30 };
    let (seed, cpus) = (
        option(&mut board, line, b"seed="),
        option(&mut board, line, b"cpus="),
    );
    let life = next_life(&mut board);
    let life_seed = seed.wrapping_add(life.wrapping_mul(0x1_0000_0001));
    board.write(SEED, Width::Qword, !life_seed);
    board.reach = reach_further(&mut board);
    board.write(SEED + 8, Width::Qword, board.reach);
    say(&mut board, b"hostile: life ", life);
    if cpus > 1 {
        start_other(&mut board);
    }
    let mut hostile = Hostile::new(life_seed);
    loop {
        hostile.act(&mut board);
        if hostile.acts().is_multiple_of(WORD) {
            say(&mut board, b"hostile: acts ", hostile.acts());
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn other() -> ! {
    let mut board = Processor { reach: 4 << 30 };
    let seed = board.read(SEED, Width::Qword);
    board.reach = board.read(SEED + 8, Width::Qword);
    let mut hostile = Hostile::new(seed);
    loop {
        hostile.act(&mut board);
    }
}

/// Which life this is, from 0.
fn next_life(board: &mut Processor) -> u64 {
    let known = board.read(map::LIVES, Width::Qword) == LIVES_MAGIC;
    let life = if known {
        board.read(map::LIVES + 8, Width::Qword).wrapping_add(1)
    } else {
        0
    };
    board.write(map::LIVES, Width::Qword, LIVES_MAGIC);
    board.write(map::LIVES + 8, Width::Qword, life);
    life
}

/// Maps 512 GiB instead of 4, if the processor has pages of 1 GiB.
fn reach_further(board: &mut Processor) -> u64 {
    if core::arch::x86_64::__cpuid(0x8000_0001).edx & 1 << 26 == 0 {
        return 4 << 30;
    }
    for gib in 4..512u64 {
        // Present, writable, a page of this size.
        board.write(PAGE_DIRECTORIES + gib * 8, Width::Qword, gib << 30 | 0x83);
    }
    map::END
}

#[panic_handler]
fn panicked(_: &PanicInfo<'_>) -> ! {
    let mut board = Processor { reach: 4 << 30 };
    say(&mut board, b"hostile: panicked in act ", 0);
    loop {
        board.port_write(0xcf9, Width::Byte, 6);
    }
}
