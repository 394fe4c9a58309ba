// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! For how long this machine let nobody run: a limit of time is for who is measured, and not for what is under him.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::delay;

/// A thread that has nothing to do sleeps for so long, again and again.
const NAP: Duration = Duration::from_millis(10);
/// It wakes up so much too late where others run as well: no more than that is a stall.
const USUAL: Duration = Duration::from_millis(50);

/// A watch on this machine, until dropped.
#[derive(Debug)]
pub(crate) struct Stalls {
    seen: Arc<Mutex<Seen>>,
    /// Delays that a test was given before, which are stalls of its own thread.
    delayed: Duration,
}

#[derive(Debug)]
struct Seen {
    in_all: Duration,
    woke: Instant,
}

impl Seen {
    /// The stalls that have ended, and the one that the thread was in until just now.
    fn until(&self, now: Instant) -> Duration {
        let late = now.saturating_duration_since(self.woke).saturating_sub(NAP);
        self.in_all + if late > USUAL { late } else { Duration::ZERO }
    }
}

impl Stalls {
    /// Begins.
    pub(crate) fn watch() -> Stalls {
        let seen = Seen {
            in_all: Duration::ZERO,
            woke: Instant::now(),
        };
        let stalls = Stalls {
            seen: Arc::new(Mutex::new(seen)),
            delayed: delay::passed(),
        };
        let watched = Arc::downgrade(&stalls.seen);
        std::thread::spawn(move || {
            while let Some(seen) = watched.upgrade() {
                let mut seen = lock(&seen);
                let now = Instant::now();
                *seen = Seen {
                    in_all: seen.until(now),
                    woke: now,
                };
                drop(seen);
                std::thread::sleep(NAP);
            }
        });
        stalls
    }

    /// All stalls since the watch began.
    pub(crate) fn so_far(&self) -> Duration {
        let delayed = delay::passed().saturating_sub(self.delayed);
        lock(&self.seen).until(Instant::now()) + delayed
    }

    /// What began after the watch did, and took so long, was to take less than `limit`, and the stalls.
    ///
    /// # Errors
    /// It took longer.
    pub(crate) fn within(&self, limit: Duration, took: Duration, what: &str) -> Result<()> {
        let stalls = self.so_far();
        ensure!(
            took < limit + stalls,
            "{what} took {took:?}, {limit:?} are enough, and this machine stood still for {stalls:?}"
        );
        Ok(())
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_naps_are_stalls_and_usual_ones_are_not() {
        let begun = Instant::now();
        let ms = Duration::from_millis;
        let seen = Seen {
            in_all: ms(700),
            woke: begun,
        };
        assert_eq!(seen.until(begun + NAP + USUAL), ms(700));
        assert_eq!(seen.until(begun + NAP + ms(2000)), ms(2700));
    }

    #[test]
    fn a_limit_grows_by_the_stalls_only() {
        let stalls = Stalls::watch();
        let long = Duration::from_secs(3600);
        let error = stalls.within(Duration::ZERO, long, "a nap").unwrap_err();
        assert!(error.to_string().contains("a nap took 3600s"), "{error}");
        lock(&stalls.seen).in_all += 2 * long;
        assert!(stalls.within(Duration::ZERO, long, "a nap").is_ok());
        assert!(stalls.so_far() >= 2 * long);
    }
}
