// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rate limits on events.
//!
//! The first event of a source goes out at once and starts an interval. Of those that come within it only the
//! last is kept; it goes out when the interval ends and starts the next. So nobody gets more than one
//! an interval, and everybody gets the last one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::schema::Event;

type Source = (&'static str, String);

#[derive(Debug)]
struct Interval<T> {
    ends: Instant,
    length: Duration,
    kept: Option<T>,
}

/// Intervals that have begun, with what each keeps back of type `T`.
#[derive(Debug)]
pub(crate) struct Throttle<T> {
    begun: BTreeMap<Source, Interval<T>>,
}

impl<T> Throttle<T> {
    pub(crate) fn new() -> Self {
        Self {
            begun: BTreeMap::new(),
        }
    }

    /// Takes an event that happened now, `message` being what goes out; returns it when it may go at once.
    pub(crate) fn offer(&mut self, now: Instant, event: &Event, message: T) -> Option<T> {
        let Some(limit) = event.info.limit else {
            return Some(message);
        };
        let source = limit
            .per_member
            .and_then(|member| event.data.get(member))
            .and_then(Value::as_str);
        let key = (event.info.name, source.unwrap_or_default().to_owned());
        if let Some(interval) = self.begun.get_mut(&key) {
            interval.kept = Some(message);
            return None;
        }
        self.begun.insert(
            key,
            Interval {
                ends: now + limit.interval,
                length: limit.interval,
                kept: None,
            },
        );
        Some(message)
    }

    /// When [`Throttle::due`] has something to do.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.begun.values().map(|interval| interval.ends).min()
    }

    /// Ends the intervals that are over by `now`; returns what they kept back.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<T> {
        let mut out = Vec::new();
        self.begun.retain(|_, interval| {
            if interval.ends > now {
                return true;
            }
            match interval.kept.take() {
                Some(message) => {
                    interval.ends = now + interval.length;
                    out.push(message);
                    true
                }
                None => false,
            }
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::events::{MEMORY_DEVICE_SIZE_CHANGE, MemoryDeviceSizeChange, STOP};

    const SECOND: Duration = Duration::from_secs(1);

    fn change(device: &str, size: u64) -> Event {
        let qom_path = format!("/machine/peripheral/{device}");
        MEMORY_DEVICE_SIZE_CHANGE.with(MemoryDeviceSizeChange {
            id: Some(device.into()),
            size,
            qom_path,
        })
    }

    #[test]
    fn the_first_goes_at_once_and_the_last_when_the_interval_ends() {
        let (mut throttle, start) = (Throttle::new(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(throttle.offer(at(0), &change("a", 1), 1), Some(1));
        assert_eq!(throttle.next_due(), Some(at(1000)));
        assert_eq!(throttle.offer(at(10), &change("a", 2), 2), None);
        assert_eq!(throttle.offer(at(999), &change("a", 3), 3), None);
        assert!(throttle.due(at(999)).is_empty());
        assert_eq!(throttle.due(at(1000)), [3]);
        // That one began an interval of its own.
        assert_eq!(throttle.offer(at(1500), &change("a", 4), 4), None);
        assert_eq!(throttle.next_due(), Some(at(2000)));
        assert_eq!(throttle.due(at(2100)), [4]);
        assert!(throttle.due(at(3100)).is_empty());
        assert_eq!(throttle.next_due(), None);
        assert_eq!(throttle.offer(at(3101), &change("a", 5), 5), Some(5));
    }

    #[test]
    fn devices_do_not_disturb_each_other_and_other_events_are_not_limited() {
        let (mut throttle, now) = (Throttle::new(), Instant::now());
        assert_eq!(throttle.offer(now, &change("a", 1), 1), Some(1));
        assert_eq!(throttle.offer(now, &change("b", 2), 2), Some(2));
        assert_eq!(throttle.offer(now, &change("b", 3), 3), None);
        let stop = STOP.with(crate::schema::Empty {});
        assert_eq!(throttle.offer(now, &stop, 4), Some(4));
        assert_eq!(throttle.offer(now, &stop, 5), Some(5));
        assert_eq!(throttle.due(now + SECOND), [3]);
    }
}
