// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest against a board that answers at random.

use super::*;

/// Answers at random and remembers what was done.
struct Nothing {
    random: Random,
    accesses: u64,
    ejects: u64,
    unaligned: u64,
    faults: u64,
    off: bool,
    sum: u64,
}

impl Nothing {
    fn new(seed: u64) -> Nothing {
        Nothing {
            random: Random::new(seed),
            accesses: 0,
            ejects: 0,
            unaligned: 0,
            faults: 0,
            off: false,
            sum: 0,
        }
    }

    fn note(&mut self, at: u64, width: Width, value: u64) {
        self.accesses += 1;
        self.sum = (self.sum ^ at ^ value ^ width as u64).wrapping_mul(0x100_0000_01b3);
        let bytes = 1 << (width as u64);
        self.unaligned += u64::from(!at.is_multiple_of(bytes));
    }
}

impl Board for Nothing {
    fn port_read(&mut self, port: u16, width: Width) -> u32 {
        assert_ne!(width, Width::Qword);
        self.note(port.into(), width, 0);
        self.random.any() as u32
    }
    fn port_write(&mut self, port: u16, width: Width, value: u32) {
        assert_ne!(width, Width::Qword);
        self.note(port.into(), width, value.into());
        self.ejects += u64::from(port == 0xae08 || port == 0xa14);
        self.off |= (0x600..0x604).contains(&port);
    }
    fn read(&mut self, at: u64, width: Width) -> u64 {
        self.note(at, width, 0);
        // Some functions are there, some are not.
        let value = self.random.value();
        match width {
            Width::Byte => value & 0xff,
            Width::Word => value & 0xffff,
            Width::Dword => value & 0xffff_ffff,
            Width::Qword => value,
        }
    }
    fn write(&mut self, at: u64, width: Width, value: u64) {
        self.note(at, width, value);
    }
    fn fault(&mut self) {
        self.faults += 1;
    }
}

fn lived(seed: u64, answers: u64) -> Nothing {
    let mut board = Nothing::new(answers);
    let mut hostile = Hostile::new(seed);
    for _ in 0..20_000 {
        hostile.act(&mut board);
    }
    board
}

#[test]
fn it_survives_whatever_it_reads_and_never_turns_the_machine_off() {
    for seed in 0..8 {
        let board = lived(seed, seed ^ 0x5555);
        assert!(board.accesses > 20_000 && board.ejects > 1_000 && board.unaligned > 1_000);
        assert!(!board.off);
    }
}

#[test]
fn the_same_seed_does_the_same() {
    assert_eq!(lived(7, 1).sum, lived(7, 1).sum);
    assert_ne!(lived(7, 1).sum, lived(8, 1).sum);
}
