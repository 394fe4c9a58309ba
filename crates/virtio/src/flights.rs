// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests that are under way: since when, for reports, and which memory they have pinned, for a reset that does not
//! wait for them. Plain stores when one begins and one when it ends, for every request of a disk does this; what more than
//! a few pieces have pinned is noted under a lock of the request's own, which nobody else takes but a reset.

use std::ops::Range;
use std::time::{Duration, Instant};

use ebbtide_models::seeded;

use crate::device::{InFlight, PinnedList};
use crate::sync::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Mutex, Ordering, lock};

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
    /// What the request that was the last to begin has pinned: so many of these, and what is in `more`.
    count: AtomicU32,
    few: [Noted; FEW],
    /// Empty but for a request that is under way. Keeps its room.
    more: Mutex<Vec<(u8, Range<u64>)>>,
    has_more: AtomicBool,
}

/// Pins that are noted without a lock: an answer's, and data in three pieces.
const FEW: usize = if cfg!(loom) { 1 } else { 4 };

/// Pins of a request for which room is kept: a guest decides how many there are.
const ROOM_MAX: usize = 32;

/// Host addresses, and the number of the list of pins that they are on.
#[derive(Debug, Default)]
struct Noted {
    start: AtomicU64,
    end: AtomicU64,
    list: AtomicU8,
}

impl Noted {
    fn set(&self, (list, range): (u8, Range<u64>)) {
        let Self {
            start,
            end,
            list: own,
        } = self;
        start.store(range.start, Ordering::Relaxed);
        end.store(range.end, Ordering::Relaxed);
        own.store(list, Ordering::Relaxed);
    }

    fn get(&self) -> (u8, Range<u64>) {
        let get = |at: &AtomicU64| at.load(Ordering::Relaxed);
        let range = get(&self.start)..get(&self.end);
        (self.list.load(Ordering::Relaxed), range)
    }
}

impl Flight {
    fn note(&self, pins: impl Iterator<Item = (u8, Range<u64>)>) {
        let (mut pins, mut count) = (pins.fuse(), 0);
        for (place, pin) in self.few.iter().zip(pins.by_ref()) {
            place.set(pin);
            count += 1;
        }
        self.count.store(count, Ordering::Relaxed);
        if let Some(next) = pins.next() {
            let mut more = lock(&self.more);
            more.push(next);
            more.extend(pins);
            self.has_more.store(true, Ordering::Relaxed);
        }
    }

    fn begin(&self, since: u64, pins: impl Iterator<Item = (u8, Range<u64>)>) {
        if seeded!("under_way_before_noted") {
            self.since.store(since, Ordering::Release);
            return self.note(pins);
        }
        self.note(pins);
        // Release: who sees that it is under way sees what it has pinned.
        self.since.store(since, Ordering::Release);
    }

    fn end(&self) {
        if seeded!("forgotten_under_way") {
            self.forget_more();
        }
        self.since.store(NONE, Ordering::Relaxed);
        if self.has_more.load(Ordering::Relaxed) {
            self.forget_more();
        }
    }

    fn forget_more(&self) {
        let mut more = lock(&self.more);
        if more.capacity() > ROOM_MAX {
            *more = Vec::new();
        }
        more.clear();
        self.has_more.store(false, Ordering::Relaxed);
    }

    /// Calls `f` with what it has pinned, if it is under way.
    fn each_pin(&self, f: impl FnMut((u8, Range<u64>))) {
        // A request that ends forgets under this lock, after it is not under way.
        let more = lock(&self.more);
        if self.since.load(Ordering::Acquire) == NONE {
            return;
        }
        let count = self.count.load(Ordering::Relaxed) as usize;
        let few = self.few.iter().take(count).map(Noted::get);
        few.chain(more.iter().cloned()).for_each(f);
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

    /// The request of chain `head`, of which none is under way, begins at this time. It has taken `pins`: the number of a list
    /// of pins, and host addresses that it is on.
    pub(crate) fn begin(
        &self,
        queue: u16,
        head: u16,
        at_ns: u64,
        pins: impl Iterator<Item = (u8, Range<u64>)>,
    ) {
        if let Some(flight) = self.flight(queue, head) {
            flight.begin(at_ns.saturating_add(1), pins);
        }
    }

    /// It is answered, and will let its pins go.
    pub(crate) fn end(&self, queue: u16, head: u16) {
        if let Some(flight) = self.flight(queue, head) {
            flight.end();
        }
    }

    fn flight(&self, queue: u16, head: u16) -> Option<&Flight> {
        let queue = self.queues.get(usize::from(queue))?;
        queue.get(usize::from(head))
    }

    /// The host addresses of what is pinned by requests under way, for each of their lists of pins. None that has let go
    /// of its pins is among them, and all of each is, if none begins meanwhile: to be called when the gate is closed and no
    /// turn that began before is under way any more.
    pub(crate) fn pinned(&self) -> Vec<PinnedList> {
        let mut lists: Vec<PinnedList> = Vec::new();
        for flight in self.queues.iter().flatten() {
            let mut last = None;
            flight.each_pin(|(list, range)| {
                match lists.last_mut() {
                    Some(ranges) if last == Some(list) => ranges.push(range),
                    _ => lists.push(vec![range]),
                }
                last = Some(list);
            });
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

/// For the models.
#[cfg(loom)]
#[doc(hidden)]
pub mod modelled {
    use super::*;

    /// A chain, and the request that it may be.
    pub struct Chain(Flights);

    impl Chain {
        /// None is under way.
        pub fn new() -> Chain {
            Chain(Flights::new(&[1]))
        }

        /// A request begins, which has pinned memory in so many pieces.
        pub fn begin(&self, pieces: u64) {
            self.0
                .begin(0, 0, 0, (1..=pieces).map(|at| (0, at..at + 1)));
        }

        /// It ends.
        pub fn end(&self) {
            self.0.end(0, 0);
        }

        /// What is pinned by it.
        pub fn pinned(&self) -> PinnedList {
            self.0.pinned().concat()
        }
    }
}

#[cfg(all(test, not(loom)))]
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
        let room = || lock(&flights.flight(0, 0).unwrap().more).capacity();
        let begin = |pins: u64| flights.begin(0, 0, 1, (0..pins).map(|at| (0, at..at + 1)));
        let counted = || flights.pinned().concat().len() as u64;
        for (pins, rooms) in [
            (4, 0..=0),
            (16, 12..=ROOM_MAX),
            (4, 12..=ROOM_MAX),
            (1024, 0..=0),
        ] {
            begin(pins);
            assert_eq!(counted(), pins);
            flights.end(0, 0);
            assert_eq!(counted(), 0);
            assert!(rooms.contains(&room()), "{} for {pins}", room());
        }
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
        // A list may go on where no place is left for it.
        for data in 2..6_u64 {
            flights.end(0, 1);
            let data = (1..=data).map(|at| at * 10..at * 10 + 1);
            let pins: Vec<_> = data.clone().map(|range| (1, range)).collect();
            begin(1, &[&[(0, 7..8)], &*pins].concat());
            assert_eq!(flights.pinned(), [vec![7..8], data.collect(), vec![5..6]]);
        }
    }
}
