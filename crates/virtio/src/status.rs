// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device status (virtio 1.3, 2.1) and which driver session it belongs to, in one word.
//!
//! ```text
//!            driver sets bits          DRIVER_OK                     writes 0, in use
//!   0 ───────────────────────▶ setup ───────────▶ active ──────────────────────────────▶ resetting
//!   ▲                            │                  │  ▲ needs_reset: of this session only    │
//!   └──────── writes 0, idle ────┘                  └──┘                                      │
//!   └──────────────────────────────────────── drained ◀───────────────────────────────────────┘
//! ```
//!
//! A session begins when a reset begins. What is left of an earlier one can then no longer mark the device, although the
//! status still reads as before until the reset is complete.

use ebbtide_models::seeded;

use crate::sync::{AtomicU64, Ordering};

/// The driver has noticed the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive the device.
pub const DRIVER: u8 = 2;
/// The driver is set up.
pub const DRIVER_OK: u8 = 4;
/// The features are agreed upon.
pub const FEATURES_OK: u8 = 8;
/// The device met an error that only a reset mends.
pub const NEEDS_RESET: u8 = 64;
/// The driver has given up.
pub const FAILED: u8 = 128;

/// Bits a driver can set; the others are the device's or reserved.
const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// Counts resets. Two sessions with the same number are 2^56 resets apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session(u64);

/// The status register and the session.
#[derive(Debug)]
pub struct Status(AtomicU64);

impl Status {
    /// Power-on: status 0.
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The status register.
    pub fn get(&self) -> u8 {
        bits(self.0.load(Ordering::Acquire))
    }

    /// The current session.
    pub fn session(&self) -> Session {
        Session(self.0.load(Ordering::Acquire) >> 8)
    }

    /// Whether `session` is the current one and the driver is set up.
    pub fn is_active(&self, session: Session) -> bool {
        let word = self.0.load(Ordering::Acquire);
        word >> 8 == session.0 && bits(word) & DRIVER_OK != 0
    }

    /// The driver sets bits; it cannot clear any but by a reset. Returns the status before.
    pub fn set(&self, wanted: u8) -> u8 {
        let before = self
            .0
            .fetch_or(u64::from(wanted & DRIVERS), Ordering::AcqRel);
        bits(before)
    }

    /// Sets NEEDS_RESET if `session` is still current. `Some(before)` if this call set it.
    pub fn set_needs_reset(&self, session: Session) -> Option<u8> {
        let mark = |word: u64| {
            if seeded!("needs_reset_any_session") {
                return Some(word | u64::from(NEEDS_RESET));
            }
            (word >> 8 == session.0).then_some(word | u64::from(NEEDS_RESET))
        };
        let before = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, mark)
            .ok()?;
        (bits(before) & NEEDS_RESET == 0).then_some(bits(before))
    }

    /// Begins a reset: a new session, the status reads as before.
    pub fn begin_reset(&self) -> Session {
        Session(
            self.0
                .fetch_add(1 << 8, Ordering::AcqRel)
                .wrapping_add(1 << 8)
                >> 8,
        )
    }

    /// Ends the reset that began `session`: the status reads 0. False if a later reset has begun since.
    pub fn finish_reset(&self, session: Session) -> bool {
        let clear = |word: u64| (word >> 8 == session.0).then_some(session.0 << 8);
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, clear)
            .is_ok()
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::new()
    }
}

fn bits(word: u64) -> u8 {
    (word & 0xff) as u8
}
