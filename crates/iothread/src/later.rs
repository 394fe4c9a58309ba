// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! News that are given without waking anybody, and heard a moment later.
//!
//! Waking a thread may cost the waker its core: on a host without one to spare the kernel lets the other run first. Here
//! a timer of the kernel does it, when the giver has gone on.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::doorbell::Doorbell;
use crate::event::Event;
use crate::local::Local;

/// Hears of what [`LaterNotifier`]s announce.
#[derive(Debug)]
pub struct LaterEvent {
    timer: Event,
    doorbell: Arc<Doorbell>,
}

/// Announces, from any thread.
#[derive(Clone, Debug)]
pub struct LaterNotifier {
    timer: Arc<OwnedFd>,
    doorbell: Arc<Doorbell>,
    delay: Timespec,
}

impl LaterEvent {
    /// With what announces; who sleeps is woken `delay` after the first of the announcements it has not heard of.
    ///
    /// # Errors
    /// Those of timerfd_create(2): out of file descriptors or memory.
    pub fn new(delay: Duration) -> io::Result<(LaterEvent, LaterNotifier)> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = Arc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?);
        let doorbell = Arc::new(Doorbell::new());
        let notifier = LaterNotifier {
            timer: Arc::clone(&timer),
            doorbell: Arc::clone(&doorbell),
            // A timer that is set to no time at all is off.
            delay: Timespec::try_from(delay.max(Duration::from_nanos(1)))
                .map_err(|_| io::ErrorKind::InvalidInput)?,
        };
        let timer = Event::of_counter(timer);
        Ok((LaterEvent { timer, doorbell }, notifier))
    }

    /// Waits until something was announced since the last time; at once if that is so already. Dropping the future loses
    /// nothing.
    ///
    /// # Errors
    /// As [`Event::wait`].
    pub async fn wait(&mut self, local: &Local) -> io::Result<()> {
        while !self.doorbell.take() {
            if self.doorbell.try_sleep() {
                self.timer.wait(local).await?;
            }
        }
        Ok(())
    }
}

impl LaterNotifier {
    /// Announces: one system call if who waits sleeps, else none. Never waits, and wakes nobody itself.
    pub fn announce(&self) {
        if !self.doorbell.notify() {
            return;
        }
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: self.delay,
        };
        // What can be wrong about it was so when it was made.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{Future, poll_fn};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Poll;
    use std::time::Instant;

    const DELAY: Duration = Duration::from_millis(20);

    #[test]
    fn a_sleeper_is_woken_later_and_one_that_is_awake_hears_at_once() {
        let ran = crate::run("test", |local| async move {
            let (mut announced, notifier) = LaterEvent::new(DELAY).unwrap();
            // It does not sleep yet.
            notifier.announce();
            let mut waits = Box::pin(announced.wait(&local));
            let at_once = poll_fn(|context| Poll::Ready(waits.as_mut().poll(context))).await;
            assert!(matches!(at_once, Poll::Ready(Ok(()))));
            drop(waits);
            let quiet = local.timeout(DELAY * 2, announced.wait(&local)).await;
            assert!(quiet.is_err(), "nothing was announced");
            // The wait was dropped asleep.
            let begun = Instant::now();
            for _ in 0..3 {
                notifier.announce();
            }
            announced.wait(&local).await.unwrap();
            // The timer that is left over tells nothing.
            let quiet = local.timeout(DELAY * 3, announced.wait(&local)).await;
            assert!(quiet.is_err(), "{:?}", begun.elapsed());
            let waits = local.spawn({
                let local = local.clone();
                async move {
                    announced.wait(&local).await.unwrap();
                    Instant::now()
                }
            });
            local.sleep(Duration::from_millis(1)).await;
            let begun = Instant::now();
            notifier.announce();
            assert!(waits.await - begun >= DELAY);
        });
        ran.unwrap();
    }

    #[test]
    fn no_announcement_of_other_threads_is_lost() {
        const EACH: u32 = 2000;
        let (mut announced, notifier) = LaterEvent::new(Duration::from_micros(50)).unwrap();
        let count = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (notifier, count) = (notifier.clone(), Arc::clone(&count));
                std::thread::spawn(move || {
                    for _ in 0..EACH {
                        count.fetch_add(1, Ordering::Relaxed);
                        notifier.announce();
                    }
                })
            })
            .collect();
        let heard = crate::run("test", |local| async move {
            while count.load(Ordering::Relaxed) < 2 * EACH {
                announced.wait(&local).await.unwrap();
            }
        });
        heard.unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
