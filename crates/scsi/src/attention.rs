// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unit attention conditions (SAM-5, 5.14) of a unit with one initiator.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::sense::{Key, Sense};

/// Something the initiator is to hear of with its next command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED.
    PowerOn,
    /// BUS DEVICE RESET FUNCTION OCCURRED: a LOGICAL UNIT RESET.
    UnitReset,
    /// I_T NEXUS LOSS OCCURRED.
    NexusLoss,
    /// REPORTED LUNS DATA HAS CHANGED.
    LunsChanged,
    /// CAPACITY DATA HAS CHANGED.
    CapacityChanged,
}

/// By precedence (SAM-5, table 49).
const ALL: [(Condition, Sense); 5] = [
    (Condition::PowerOn, attention(0x29, 0x00)),
    (Condition::UnitReset, attention(0x29, 0x03)),
    (Condition::NexusLoss, attention(0x29, 0x07)),
    (Condition::LunsChanged, attention(0x3f, 0x0e)),
    (Condition::CapacityChanged, attention(0x2a, 0x09)),
];

const fn attention(asc: u8, ascq: u8) -> Sense {
    Sense::new(Key::UnitAttention, asc, ascq)
}

/// The conditions that are pending.
#[derive(Debug, Default)]
pub struct Attention(AtomicU8);

impl Attention {
    /// Establishes one. A reset makes those before it obsolete.
    pub fn establish(&self, condition: Condition) {
        let bit = bit(condition);
        if condition == Condition::PowerOn {
            self.0.store(bit, Ordering::Relaxed);
        } else {
            self.0.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// The first one, which is then not pending any more.
    pub fn take(&self) -> Option<Sense> {
        // Every command looks here; hardly any finds something.
        if self.0.load(Ordering::Relaxed) == 0 {
            return None;
        }
        ALL.iter().find_map(|&(condition, sense)| {
            let bit = bit(condition);
            (self.0.fetch_and(!bit, Ordering::Relaxed) & bit != 0).then_some(sense)
        })
    }

    /// Forgets one that was told in another way.
    pub fn clear(&self, condition: Condition) {
        self.0.fetch_and(!bit(condition), Ordering::Relaxed);
    }
}

impl Condition {
    /// Its sense data.
    pub fn sense(self) -> Sense {
        ALL.iter()
            .find(|(condition, _)| *condition == self)
            .map_or(Sense::NONE, |(_, sense)| *sense)
    }
}

fn bit(condition: Condition) -> u8 {
    1 << condition as u8
}
