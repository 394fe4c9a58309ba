// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Since when requests are under way, for reports: a relaxed store when one begins and one when it ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::device::InFlight;

/// Nothing is under way.
const NONE: u64 = 0;

/// The requests of a device, by queue and chain: a chain's head names one request of its queue at a time.
#[derive(Debug)]
pub(crate) struct Flights {
    base: Instant,
    /// Nanoseconds from `base` to the begin, and 1.
    queues: Box<[Box<[AtomicU64]>]>,
}

impl Flights {
    /// For queues of these sizes.
    pub(crate) fn new(queue_sizes: &[u16]) -> Flights {
        let queue = |size: &u16| (0..*size).map(|_| AtomicU64::new(NONE)).collect();
        Flights {
            base: Instant::now(),
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    /// A time as [`begin`](Self::begin) takes it: in nanoseconds, from some time on.
    pub(crate) fn ns(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.base).as_nanos();
        u64::try_from(since).unwrap_or(u64::MAX)
    }

    /// The request of chain `head` begins at this time.
    pub(crate) fn begin(&self, queue: u16, head: u16, at_ns: u64) {
        self.set(queue, head, at_ns.saturating_add(1));
    }

    /// It is answered.
    pub(crate) fn end(&self, queue: u16, head: u16) {
        self.set(queue, head, NONE);
    }

    fn set(&self, queue: u16, head: u16, value: u64) {
        let queue = self.queues.get(usize::from(queue));
        if let Some(since) = queue.and_then(|queue| queue.get(usize::from(head))) {
            since.store(value, Ordering::Relaxed);
        }
    }

    /// What is under way `now`. Looks at every entry of every queue.
    pub(crate) fn in_flight(&self, now: Instant) -> InFlight {
        let all = self.queues.iter().flatten();
        let begun = all
            .map(|since| since.load(Ordering::Relaxed))
            .filter(|since| *since != NONE);
        let (mut requests, mut first) = (0, None::<u64>);
        for since in begun {
            requests += 1;
            first = Some(first.map_or(since, |first| first.min(since)));
        }
        let now = now.saturating_duration_since(self.base);
        let age = |since: u64| now.saturating_sub(Duration::from_nanos(since - 1));
        InFlight {
            requests,
            oldest: first.map(age),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_found() {
        let flights = Flights::new(&[4, 2]);
        let at = |ms| flights.base + Duration::from_millis(ms);
        let begin = |queue, head, ms| flights.begin(queue, head, flights.ns(at(ms)));
        assert_eq!(flights.in_flight(at(9)), InFlight::default());
        begin(0, 3, 5);
        begin(1, 0, 0);
        begin(1, 1, 7);
        // Of no queue.
        begin(1, 2, 1);
        begin(2, 0, 1);
        let in_flight = |requests, ms| InFlight {
            requests,
            oldest: Some(Duration::from_millis(ms)),
        };
        assert_eq!(flights.in_flight(at(9)), in_flight(3, 9));
        flights.end(1, 0);
        assert_eq!(flights.in_flight(at(9)), in_flight(2, 4));
        flights.end(0, 3);
        flights.end(1, 1);
        assert_eq!(flights.in_flight(at(9)), InFlight::default());
    }
}
