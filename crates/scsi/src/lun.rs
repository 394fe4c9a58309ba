// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Logical unit numbers and their eight-byte form (SAM-5, 4.7).

use std::fmt;

/// A logical unit number of one level, at most 16383.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lun(u16);

impl Lun {
    /// The largest there is.
    pub const MAX: Lun = Lun(0x3fff);

    /// `None` above 16383.
    pub fn new(number: u16) -> Option<Lun> {
        (number <= Lun::MAX.0).then_some(Lun(number))
    }

    /// The number.
    pub fn number(self) -> u16 {
        self.0
    }

    /// The first two bytes of the eight; the others are zero. Peripheral addressing up to 255, flat space addressing
    /// above: what REPORT LUNS says, and initiators want to see again everywhere else.
    pub fn to_bytes(self) -> [u8; 2] {
        let [high, low] = self.0.to_be_bytes();
        if high == 0 {
            [0, low]
        } else {
            [high | 0x40, low]
        }
    }

    /// Reads the first two bytes in either form. `None`: another form of addressing, or another bus.
    pub fn from_bytes([high, low]: [u8; 2]) -> Option<Lun> {
        match high >> 6 {
            0 if high != 0 => None,
            0 | 1 => Some(Lun(u16::from_be_bytes([high & 0x3f, low]))),
            _ => None,
        }
    }
}

impl fmt::Display for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
