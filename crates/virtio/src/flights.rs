// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests that are under way: since when, for reports, and which memory they have pinned, for a reset that does not
//! wait for them. A relaxed store when one begins and one when it ends; the memory is noted under a lock of the request's
//! own, which nobody else takes but a reset.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::device::{InFlight, PinnedList};

/// Nothing is under way.
const NONE: u64 = 0;

/// The requests of a device, by queue and chain: a chain's head names one request of its queue at a time.
#[derive(Debug)]
pub(crate) struct Flights {
    base: Instant,
    queues: Box<[Box<[Flight]>]>,
}

#[derive(Debug, Default)]
struct Flight {
    /// Nanoseconds from `base` to the begin, and 1; or [`NONE`].
    since: AtomicU64,
    /// Of the request that was the last to begin. Kept when it has ended, for its room.
    pinned: Mutex<Vec<(u8, Range<u64>)>>,
    /// It has more room than is kept.
    long: AtomicBool,
}

/// Pins of a request for which room is kept: a guest decides how many there are.
const ROOM_MAX: usize = 32;

impl Flight {
    fn pinned(&self) -> MutexGuard<'_, Vec<(u8, Range<u64>)>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flights {
    /// For queues of these sizes.
    pub(crate) fn new(queue_sizes: &[u16]) -> Flights {
        let queue = |size: &u16| (0..*size).map(|_| Flight::default()).collect();
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

    /// The request of chain `head` begins at this time. It has taken `pins`: the number of a list of pins, and host addresses that
    /// it is on.
    pub(crate) fn begin(
        &self,
        queue: u16,
        head: u16,
        at_ns: u64,
        pins: impl Iterator<Item = (u8, Range<u64>)>,
    ) {
        if let Some(flight) = self.flight(queue, head) {
            let mut pinned = flight.pinned();
            pinned.clear();
            pinned.extend(pins);
            if pinned.capacity() > ROOM_MAX {
                flight.long.store(true, Ordering::Relaxed);
            }
            flight
                .since
                .store(at_ns.saturating_add(1), Ordering::Relaxed);
        }
    }

    /// It is answered, and will let its pins go.
    pub(crate) fn end(&self, queue: u16, head: u16) {
        if let Some(flight) = self.flight(queue, head) {
            flight.since.store(NONE, Ordering::Relaxed);
            if flight.long.load(Ordering::Relaxed) {
                *flight.pinned() = Vec::new();
                flight.long.store(false, Ordering::Relaxed);
            }
        }
    }

    fn flight(&self, queue: u16, head: u16) -> Option<&Flight> {
        let queue = self.queues.get(usize::from(queue))?;
        queue.get(usize::from(head))
    }

    /// The host addresses of what is pinned by requests under way, for each of their lists of pins. None that has let go
    /// of its pins is among them, if none begins meanwhile.
    pub(crate) fn pinned(&self) -> Vec<PinnedList> {
        let mut lists: Vec<PinnedList> = Vec::new();
        for flight in self.queues.iter().flatten() {
            let pinned = flight.pinned();
            if flight.since.load(Ordering::Relaxed) == NONE {
                continue;
            }
            let mut last = None;
            for (list, range) in &*pinned {
                match lists.last_mut() {
                    Some(ranges) if last == Some(list) => ranges.push(range.clone()),
                    _ => lists.push(vec![range.clone()]),
                }
                last = Some(list);
            }
        }
        lists
    }

    /// What is under way `now`. Looks at every entry of every queue.
    pub(crate) fn in_flight(&self, now: Instant) -> InFlight {
        let all = self.queues.iter().flatten();
        let begun = all
            .map(|flight| flight.since.load(Ordering::Relaxed))
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
        assert_eq!(flights.in_flight(at(9)), InFlight::default());
        let begin = |queue, head, ms| {
            flights.begin(queue, head, flights.ns(at(ms)), std::iter::empty());
        };
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

    #[test]
    fn room_for_many_pins_is_given_back() {
        let flights = Flights::new(&[1]);
        let room = || flights.flight(0, 0).unwrap().pinned().capacity();
        flights.begin(0, 0, 1, (0..4).map(|at| (0, at..at + 1)));
        flights.end(0, 0);
        assert!((4..=ROOM_MAX).contains(&room()));
        flights.begin(0, 0, 1, (0..1024).map(|at| (0, at..at + 1)));
        flights.end(0, 0);
        assert_eq!(room(), 0);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of one range")]
    fn memory_is_known_by_list_until_the_request_ends() {
        let flights = Flights::new(&[4]);
        let now = Instant::now();
        let begin = |head, pins: &[(u8, Range<u64>)]| {
            flights.begin(0, head, flights.ns(now), pins.iter().cloned());
        };
        assert!(flights.pinned().is_empty());
        begin(1, &[(0, 1..2), (1, 10..20), (1, 30..40)]);
        begin(2, &[(0, 5..6)]);
        begin(3, &[]);
        assert_eq!(
            flights.pinned(),
            [vec![1..2], vec![10..20, 30..40], vec![5..6]]
        );
        flights.end(0, 1);
        assert_eq!(flights.pinned(), [vec![5..6]]);
        begin(1, &[(0, 7..8)]);
        assert_eq!(flights.pinned(), [vec![7..8], vec![5..6]]);
    }
}
