// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rest of a queue whose device is removed: a driver that is alive gets an answer for all it has put there.
//!
//! It goes on putting something there until it learns of the removal, which it does only when the device has drained: a
//! writer has its next request ready as soon as one is answered. Its kicks reach nobody any more. So the queue is looked
//! at, less and less often, until nothing has come for a while; once nothing is in flight that ends in any case. What
//! the driver adds after that is not read.
//!
//! There is no exact end to wait for: the driver's own, a reset, cannot reach a device whose registers are gone, and the
//! guest is told only after the drain. But a guest that has ejected the device, before or meanwhile, puts nothing more
//! there: then one look is enough.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use ebbtide_iothread::Local;
use ebbtide_memory::{AddressSpace, ReadGuard, Reader};

use super::Removed;
use crate::device::ActiveQueue;
use crate::interrupt::QueueInterrupt;
use crate::virtq::{Chain, QueueError};

/// A driver that has put nothing into the queue for this long has nothing more to put there.
/// The guest's processors may be slow, or not running for a while; a request that comes too late hangs in a Linux guest.
const QUIET: Duration = Duration::from_secs(1);
/// For so long the driver is answered after the last of its jobs, however much comes.
const LONGEST: Duration = Duration::from_secs(3);
/// Between two looks at the queue.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// Chains refused before answers are published and other tasks get their turn.
pub(crate) const CHAINS_MAX: usize = 256;

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

/// What a look at a queue has found.
pub(crate) struct Look {
    /// Chains that were answered.
    pub chains: usize,
    /// Requests of the queue that are in flight.
    pub jobs: usize,
}

/// Has `look`, which is called with the right to answer, answer what is in the queue, if its device is being removed, again and again until nothing comes any more;
/// also before a pause is over when `poll_news` says so. After a reset the queue is not touched.
pub(crate) async fn answer_rest<E>(
    local: &Local,
    removed: &Removed,
    interrupt: &QueueInterrupt,
    mut look: impl FnMut() -> Result<Look, E>,
    poll_news: impl Fn(&Waker) -> Poll<()>,
) -> Result<(), E> {
    let Some(_lease) = removed.take() else {
        return Ok(());
    };
    let mut looks = Looks::new(local.now());
    // A reset may come while the device is being removed.
    while interrupt.is_active() {
        // Before the look, which then sees all there will ever be.
        let last = interrupt.driver_has_let_go();
        // None: the machine was reset, and the queue lies in the memory of the next guest.
        let Some(right) = interrupt.answer() else {
            break;
        };
        let Look { chains, jobs } = look()?;
        drop(right);
        if last && chains == 0 && jobs == 0 {
            break;
        }
        let Some(pause) = looks.after(chains, jobs, local.now()) else {
            break;
        };
        let mut sleep = pin!(local.sleep(pause));
        poll_fn(|cx| match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => poll_news(cx.waker()),
        })
        .await;
    }
    Ok(())
}

/// Where the rest of a queue is answered.
pub(crate) struct Place<'a> {
    pub local: &'a Local,
    pub space: &'a Arc<AddressSpace>,
    pub reader: &'a Reader,
}

/// [`answer_rest`] for a queue of which nothing is in flight: gives back the chain that is `held`, if there is one, and all
/// that is there, each with as many bytes as `refuse` wrote.
///
/// # Errors
/// The driver broke the queue.
pub(crate) async fn refuse_rest(
    place: Place<'_>,
    queue: &mut ActiveQueue,
    mut held: Option<Chain>,
    refuse: impl Fn(&ReadGuard<'_>, &Chain) -> u32,
) -> Result<(), QueueError> {
    let ActiveQueue {
        queue: rings,
        interrupt,
        removed,
        ..
    } = queue;
    let look = || {
        let guard = place.space.read(place.reader);
        let mut chains = 0;
        while chains < CHAINS_MAX {
            let next = match held.take() {
                Some(chain) => Some(chain),
                None => rings.pop(&guard)?,
            };
            let Some(chain) = next else { break };
            let written = refuse(&guard, &chain);
            rings.add_used(&guard, chain.head, written)?;
            chains += 1;
        }
        if chains > 0 {
            rings.publish_used(&guard)?;
            if rings.needs_interrupt(&guard)? {
                interrupt.signal();
            }
        }
        Ok(Look { chains, jobs: 0 })
    };
    answer_rest(place.local, removed, interrupt, look, |_| Poll::Pending).await
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
