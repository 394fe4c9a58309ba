// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random numbers that are the same for the same seed (SplitMix64).

use crate::Width;

/// A sequence of random numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.any().checked_rem(bound).unwrap_or(0)
    }

    /// Once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of `choices`; there must be one.
    pub fn of<T: Copy + Default>(&mut self, choices: &[T]) -> T {
        let index = self.below(choices.len() as u64) as usize;
        choices.get(index).copied().unwrap_or_default()
    }

    /// A value that registers may trip over: few bits, many bits, small, or anything.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => !(1 << self.below(64)),
            4 | 5 => self.below(32),
            6 => self.below(1 << 16),
            _ => self.any(),
        }
    }

    /// Any width a port access can have.
    pub fn port_width(&mut self) -> Width {
        match self.below(3) {
            0 => Width::Byte,
            1 => Width::Word,
            _ => Width::Dword,
        }
    }

    /// Any width.
    pub fn width(&mut self) -> Width {
        match self.below(4) {
            0 => Width::Qword,
            _ => self.port_width(),
        }
    }
}
