// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Keeps a guest from filling the host's log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a burst of messages through in each interval and counts the others. One for each call site of each device.
#[derive(Debug)]
pub struct LogLimit {
    burst: u32,
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    allowed: u32,
    suppressed: u64,
}

impl Default for LogLimit {
    /// Five messages in ten seconds.
    fn default() -> Self {
        Self::new(5, Duration::from_secs(10))
    }
}

impl LogLimit {
    /// At most `burst` messages in each `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            state: Mutex::default(),
        }
    }

    /// Whether to log now, and how many messages were suppressed since the last one.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state
            .since
            .is_none_or(|since| now.duration_since(since) >= self.interval)
        {
            state.since = Some(now);
            state.allowed = 0;
        }
        if state.allowed >= self.burst {
            state.suppressed = state.suppressed.saturating_add(1);
            return None;
        }
        state.allowed += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_silence_then_the_count() {
        let limit = LogLimit::new(2, Duration::from_secs(1));
        let start = Instant::now();
        let answers: Vec<_> = (0..4).map(|_| limit.allow_at(start)).collect();
        assert_eq!(answers, [Some(0), Some(0), None, None]);
        let later = start + Duration::from_secs(1);
        assert_eq!(limit.allow_at(later), Some(2));
        assert_eq!(limit.allow_at(later), Some(0));
        assert_eq!(limit.allow_at(later), None);
    }
}
