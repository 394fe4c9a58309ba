// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rest of a queue whose device is removed: a driver that is alive gets an answer for all it has put there.
//!
//! It goes on putting something there until it learns of the removal, which it does only when the device has drained: a
//! writer has its next request ready as soon as one is answered. Its kicks reach nobody any more. So the queue is looked
//! at, less and less often, until nothing has come for a while; once nothing is in flight that ends in any case. What
//! the driver adds after that is not read.

use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use std::future::{Future, poll_fn};

use super::{Done, Fault, Rings, Service, Turns};

/// A driver that has put nothing into the queue for this long has nothing more to put there.
/// The guest's processors may be slow, or not running for a while; a request that comes too late hangs in a Linux guest.
const QUIET: Duration = Duration::from_secs(1);
/// For so long the driver is answered after the last of its jobs, however much comes.
const LONGEST: Duration = Duration::from_secs(3);
/// Between two looks at the queue.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// Chains refused before answers are published and other tasks get their turn.
const CHAINS_MAX: usize = 256;

/// When to look at the queue again, and when no more.
struct Looks {
    last_chain: Instant,
    last_job: Instant,
}

impl Looks {
    fn new(now: Instant) -> Looks {
        Looks {
            last_chain: now,
            last_job: now,
        }
    }

    /// A look found `chains` in the queue and so many `jobs` in flight. The pause until the next; `None`: it was the last.
    fn after(&mut self, chains: usize, jobs: usize, now: Instant) -> Option<Duration> {
        if jobs > 0 {
            self.last_job = now;
        }
        if chains > 0 {
            self.last_chain = now;
        }
        let quiet = now.saturating_duration_since(self.last_chain);
        let alone = now.saturating_duration_since(self.last_job);
        // The driver may have been waiting for the job that ended last.
        if jobs == 0 && (quiet.min(alone) >= QUIET || alone >= LONGEST) {
            return None;
        }
        Some((quiet.min(alone) / 4).clamp(PAUSE_MIN, PAUSE_MAX))
    }
}

impl<S: Service> Turns<S> {
    /// Answers what is in the queue, if its device is being removed. After a reset the queue is not touched.
    pub(super) async fn answer_rest(&self, rings: &mut Rings) -> Result<(), Fault> {
        let Some(lease) = self.removed.take() else {
            return Ok(());
        };
        let mut looks = Looks::new(self.local.now());
        // A reset may come while the device is being removed.
        while rings.interrupt.is_active() {
            let chains = self.last_turn(rings)?;
            let now = self.local.now();
            let Some(pause) = looks.after(chains, self.inbox.jobs.get(), now) else {
                break;
            };
            let mut sleep = pin!(self.local.sleep(pause));
            poll_fn(|cx| match sleep.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(()),
                Poll::Pending => self.inbox.poll_news(cx.waker()),
            })
            .await;
        }
        drop(lease);
        Ok(())
    }

    /// Refuses what is available and gives back what is answered; returns how many chains were refused.
    fn last_turn(&self, rings: &mut Rings) -> Result<usize, Fault> {
        let (refused, interrupt) = {
            let guard = self.space.read(&self.reader);
            self.inbox.kicked.set(false);
            let mut refused = 0;
            while refused < CHAINS_MAX
                && let Some(chain) = rings.queue.pop(&guard)?
            {
                let answered = self.inbox.service.refuse(&guard, chain)?;
                // The removal's lease covers it: no other is to be had.
                self.inbox.put(Done {
                    answered,
                    lease: None,
                });
                refused += 1;
            }
            (refused, self.give_back(&guard, rings)?)
        };
        if interrupt {
            rings.interrupt.signal();
        }
        Ok(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_end_when_it_is_quiet() {
        let begin = Instant::now();
        let mut looks = Looks::new(begin);
        let mut now = begin;
        assert_eq!(looks.after(3, 0, now), Some(PAUSE_MIN));
        let mut count = 0;
        while let Some(pause) = looks.after(0, 0, now) {
            now += pause;
            count += 1;
        }
        assert!((now - begin).abs_diff(QUIET) <= PAUSE_MAX, "{count} looks");
        assert!(count < 60, "{count} looks");
    }

    #[test]
    fn a_flood_ends_and_a_job_is_waited_for() {
        let begin = Instant::now();
        let mut looks = Looks::new(begin);
        let at = |ms| begin + Duration::from_millis(ms);
        for ms in 0..5000 {
            assert!(looks.after(0, 1, at(ms)).is_some(), "{ms}");
        }
        // What waited for the job has its time.
        assert!(looks.after(0, 0, at(5010)).is_some());
        for ms in 5010..7990 {
            assert!(looks.after(9, 0, at(ms)).is_some(), "{ms}");
        }
        assert_eq!(looks.after(9, 0, at(8000)), None);
    }
}
