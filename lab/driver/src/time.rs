// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting in the time of a board, which may be one that a test makes.
//!
//! Made time goes on when nothing happens: other threads get a moment of the host's first, then the clock is turned, in
//! steps that double. So twenty seconds cost some tens of steps, and what happens at once is not aged by them. Nothing
//! that matters may depend on how much is made while an operation of the host is under way.

use std::time::{Duration, Instant};

use ebbtide_iothread::ManualClock;

use crate::wait::LIMIT;

/// What others get of the host's time before the clock is turned.
const MOMENT: Duration = Duration::from_micros(20);
/// Moments before the first turn.
const MOMENTS: u32 = 4;
const STEP_MIN: Duration = Duration::from_millis(1);
const STEP_MAX: Duration = Duration::from_secs(5);
/// Who waits for longer waits for a thread that does not get the host's time: from then on others get more of that.
const MADE_LONG: Duration = Duration::from_secs(3600);
const LONG_MOMENT: Duration = Duration::from_millis(5);

/// How time goes on for somebody who waits.
pub(crate) struct Pace<'a> {
    clock: Option<&'a ManualClock>,
    /// By the host's clock.
    end: Instant,
    made: Duration,
    moments: u32,
    step: Duration,
}

impl<'a> Pace<'a> {
    /// By `clock`, or else by the host's.
    pub fn new(clock: Option<&'a ManualClock>) -> Pace<'a> {
        Pace {
            clock,
            end: Instant::now() + LIMIT,
            made: Duration::ZERO,
            moments: 0,
            step: STEP_MIN,
        }
    }

    /// Nothing has happened: lets time pass. False: that was all there is of it.
    pub fn pass(&mut self) -> bool {
        let long = self.made >= MADE_LONG;
        std::thread::park_timeout(if long { LONG_MOMENT } else { MOMENT });
        self.moments = self.moments.saturating_add(1);
        if let Some(clock) = self.clock
            && self.moments > MOMENTS
        {
            clock.advance(self.step);
            self.made += self.step;
            self.step = (self.step * 2).min(STEP_MAX);
        }
        Instant::now() < self.end
    }
}

/// Turns `clock` by `time`, with moments for those who are woken by it.
pub(crate) fn turn(clock: &ManualClock, time: Duration) {
    let (mut left, mut step) = (time, STEP_MIN);
    while !left.is_zero() {
        let now = step.min(left);
        clock.advance(now);
        left -= now;
        step = (step * 2).min(STEP_MAX);
        std::thread::sleep(MOMENT);
    }
    std::thread::sleep(MOMENT * MOMENTS);
}
