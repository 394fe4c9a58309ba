// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many bytes there are in each period.
//!
//! A period begins with the first request behind the end of the one before, so that a guest that asks rarely is never
//! kept waiting. Bytes are taken from the allowance before the source is asked and those it did not give are put back:
//! a driver that resets the device while it waits gains nothing.

use std::time::{Duration, Instant};

/// The allowance.
#[derive(Debug)]
pub(super) struct Limit {
    max_bytes: u64,
    period: Duration,
    /// When the current period ends; `None` before the first.
    end: Option<Instant>,
    left: u64,
}

/// What may be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grant {
    /// Ask the source for so many bytes, at least one.
    Bytes(u64),
    /// Nothing is left before this time.
    Until(Instant),
}

impl Limit {
    pub(super) fn new(max_bytes: u64, period: Duration) -> Limit {
        Limit {
            max_bytes,
            period,
            end: None,
            left: max_bytes,
        }
    }

    /// Takes up to `wanted` bytes, at least one, from the allowance.
    pub(super) fn take(&mut self, now: Instant, wanted: u64) -> Grant {
        let end = match self.end {
            Some(end) if now < end => end,
            _ => {
                self.left = self.max_bytes;
                // A period too long for the clock never ends.
                let end = now.checked_add(self.period).unwrap_or(now + FOREVER);
                self.end = Some(end);
                end
            }
        };
        if self.left == 0 {
            return Grant::Until(end);
        }
        let granted = wanted.max(1).min(self.left);
        self.left -= granted;
        Grant::Bytes(granted)
    }

    /// Puts back what was taken and not used.
    pub(super) fn put_back(&mut self, bytes: u64) {
        // A new period may have begun with a full allowance meanwhile.
        self.left = self.left.saturating_add(bytes).min(self.max_bytes);
    }
}

const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(100);

    #[test]
    fn a_period_has_its_bytes_and_no_more() {
        let start = Instant::now();
        let mut limit = Limit::new(100, PERIOD);
        assert_eq!(limit.take(start, 64), Grant::Bytes(64));
        assert_eq!(limit.take(start, 64), Grant::Bytes(36));
        let later = start + PERIOD / 2;
        assert_eq!(limit.take(later, 1), Grant::Until(start + PERIOD));
        assert_eq!(limit.take(start + PERIOD, 500), Grant::Bytes(100));
        let end = start + PERIOD * 2;
        assert_eq!(limit.take(end - PERIOD / 10, 1), Grant::Until(end));
    }

    #[test]
    fn a_period_begins_with_the_first_request() {
        let start = Instant::now();
        let mut limit = Limit::new(10, PERIOD);
        assert_eq!(limit.take(start, 10), Grant::Bytes(10));
        let much_later = start + PERIOD * 7 + PERIOD / 3;
        assert_eq!(limit.take(much_later, 10), Grant::Bytes(10));
        let until = much_later + PERIOD;
        assert_eq!(limit.take(much_later, 10), Grant::Until(until));
    }

    #[test]
    fn what_was_not_used_can_be_used() {
        let start = Instant::now();
        let mut limit = Limit::new(10, PERIOD);
        assert_eq!(limit.take(start, 10), Grant::Bytes(10));
        limit.put_back(4);
        assert_eq!(limit.take(start, 10), Grant::Bytes(4));
        limit.put_back(u64::MAX);
        assert_eq!(limit.take(start, 100), Grant::Bytes(10));
    }

    #[test]
    fn nothing_at_all() {
        let start = Instant::now();
        let mut limit = Limit::new(0, PERIOD);
        assert_eq!(limit.take(start, 1), Grant::Until(start + PERIOD));
        let end = start + PERIOD;
        assert_eq!(limit.take(end, 1), Grant::Until(end + PERIOD));
    }

    #[test]
    fn an_endless_period() {
        let start = Instant::now();
        let mut limit = Limit::new(1, Duration::MAX);
        assert_eq!(limit.take(start, 1), Grant::Bytes(1));
        assert!(matches!(limit.take(start, 1), Grant::Until(end) if end > start));
    }
}
