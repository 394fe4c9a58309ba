// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The executor of one thread: its tasks, its timers, its ring, and the loop that turns them.
//!
//! One turn: take what other threads sent, poll what is ready (a bounded number, so that a task which keeps waking
//! itself does not hold up completions), wake what is due, then one io_uring_enter that submits everything staged
//! and sleeps if there is nothing else to do.

use std::cell::{Cell, RefCell, RefMut};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::config::Config;
use crate::error::Error;
use crate::event;
use crate::inbox::{MainWaker, Shared};
use crate::local::Local;
use crate::ring::{Completed, Ring, Wait};
use crate::task::Registry;
use crate::timers::Timers;

/// How many tasks are polled before the ring is looked at again.
const POLLS_PER_TURN: usize = 64;

/// How many calls that need not wait a task makes in one poll before it has to yield.
const CALLS_PER_POLL: u32 = 32;

/// How often operations that do not end are cancelled anew while stopping.
const CANCEL_AGAIN: Duration = Duration::from_millis(100);

pub(crate) struct Core {
    shared: Arc<Shared>,
    ring: RefCell<Ring>,
    timers: RefCell<Timers>,
    tasks: RefCell<Registry>,
    clock: Clock,
    /// The time in this turn, once somebody has asked for it.
    turn_time: Cell<Option<Instant>>,
    stop_limit: Duration,
    stopping: Cell<bool>,
    /// Calls without waiting that are left to the task being polled.
    calls_left: Cell<u32>,
}

impl Core {
    pub fn new(name: &str, config: &Config) -> Result<Rc<Core>, Error> {
        let bell = event::new_bell().map_err(|source| Error::Eventfd {
            name: name.to_owned(),
            source,
        })?;
        let bell = Arc::new(bell);
        let ring = Ring::new(name, config, Arc::clone(&bell))?;
        let shared = Shared::new(name, bell);
        config.clock.watch(&shared);
        Ok(Rc::new(Core {
            shared,
            ring: RefCell::new(ring),
            timers: RefCell::default(),
            tasks: RefCell::default(),
            clock: config.clock.clone(),
            turn_time: Cell::new(None),
            stop_limit: config.stop_limit,
            stopping: Cell::new(false),
            calls_left: Cell::new(CALLS_PER_POLL),
        }))
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub fn ring(&self) -> RefMut<'_, Ring> {
        self.ring.borrow_mut()
    }

    pub fn timers(&self) -> RefMut<'_, Timers> {
        self.timers.borrow_mut()
    }

    pub fn tasks(&self) -> RefMut<'_, Registry> {
        self.tasks.borrow_mut()
    }

    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    pub fn turn_time(&self) -> Instant {
        let now = self.turn_time.get().unwrap_or_else(|| self.now());
        self.turn_time.set(Some(now));
        now
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Turns until `main` is ready.
    pub fn drive<T>(
        self: &Rc<Self>,
        mut main: Pin<&mut impl Future<Output = T>>,
    ) -> Result<T, Error> {
        let local = Local::new(Rc::clone(self));
        let waker = Waker::from(Arc::new(MainWaker(Arc::clone(&self.shared))));
        let mut cx = Context::from_waker(&waker);
        let mut completed = Completed::default();
        loop {
            self.turn_time.set(None);
            self.take_arrived(&local);
            if self.shared.take_main_woken() {
                self.calls_left.set(CALLS_PER_POLL);
                if let Poll::Ready(result) = main.as_mut().poll(&mut cx) {
                    return Ok(result);
                }
            }
            self.poll_tasks();
            self.fire_timers();
            let wait = self.wait();
            let turned = self.ring().turn(wait, &mut completed);
            turned.map_err(|source| Error::Failed {
                name: self.shared.name().to_owned(),
                source,
            })?;
            completed.dispose();
        }
    }

    fn take_arrived(&self, local: &Local) {
        if !self.shared.doorbell().take() {
            return;
        }
        let arrived = self.shared.arrived();
        for runnable in arrived.runnables {
            self.shared.schedule(runnable);
        }
        for job in arrived.jobs {
            job(local);
        }
    }

    /// Polls those that are ready now. Who gets ready meanwhile, as one that yields, waits for the next turn: completions
    /// go first.
    fn poll_tasks(&self) {
        for _ in 0..self.shared.ready_count().min(POLLS_PER_TURN) {
            let Some(runnable) = self.shared.next_ready() else {
                return;
            };
            self.calls_left.set(CALLS_PER_POLL);
            runnable.run();
        }
    }

    /// Counts a call that did not have to wait. True when the task has had its share and must yield.
    pub fn spend_call(&self) -> bool {
        match self.calls_left.get().checked_sub(1) {
            Some(left) => {
                self.calls_left.set(left);
                false
            }
            None => true,
        }
    }

    fn fire_timers(&self) {
        if self.timers().is_empty() {
            return;
        }
        let now = self.now();
        loop {
            let due = self.timers().pop_due(now);
            let Some(waker) = due else { return };
            waker.wake();
        }
    }

    /// How long this turn may sleep. The last step before it does: a notification after this rings the bell.
    fn wait(&self) -> Wait {
        if self.shared.has_ready() || !self.shared.doorbell().try_sleep() {
            return Wait::No;
        }
        let deadline = self.timers().next_deadline();
        match deadline.and_then(|deadline| self.clock.wait_until(deadline)) {
            Some(duration) if duration.is_zero() => Wait::No,
            Some(duration) => Wait::For(duration),
            None => Wait::Forever,
        }
    }

    /// Ends everything: refuses work, drops all tasks, cancels all operations and waits until the kernel is
    /// through with them. What has not ended by the limit keeps its memory for good.
    pub fn shut_down(&self) {
        self.stopping.set(true);
        self.shared.close();
        self.drop_tasks();
        let timers = self.timers().clear();
        drop(timers);
        let leaked = self.drain_ring();
        if leaked > 0 {
            tracing::error!(
                name = self.shared.name(),
                operations = leaked,
                limit_ms = self.stop_limit.as_millis() as u64,
                "operations did not end after they were cancelled: their memory is leaked, not freed"
            );
        }
        self.shared.set_abandoned(leaked);
    }

    fn drop_tasks(&self) {
        loop {
            // A task that is woken comes up as a runnable, and dropping that drops its future, here.
            let wakers = self.tasks().wakers();
            wakers.into_iter().for_each(Waker::wake);
            let arrived = self.shared.arrived();
            drop(arrived);
            while let Some(runnable) = self.shared.next_ready() {
                drop(runnable);
            }
            if self.tasks().is_empty() {
                return;
            }
            // Another thread is just about to hand in the task it has woken.
            std::thread::yield_now();
        }
    }

    /// Returns how many operations had to be given up.
    fn drain_ring(&self) -> usize {
        // The system's clock, not a test's: this waits for the kernel.
        let deadline = Instant::now() + self.stop_limit;
        let mut completed = Completed::default();
        self.ring().close();
        while self.ring().in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let turned = {
                let mut ring = self.ring();
                ring.cancel_all();
                ring.turn(Wait::For(left.min(CANCEL_AGAIN)), &mut completed)
            };
            completed.dispose();
            if let Err(error) = turned {
                tracing::error!(name = self.shared.name(), %error, "the io_uring failed while stopping");
                break;
            }
        }
        self.ring().leak_in_flight()
    }
}

/// Shuts an executor down when dropped, also when its main future panicked.
pub(crate) struct ShutDown(pub Rc<Core>);

impl Drop for ShutDown {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{IoThread, oneshot, run_with};
    use io_uring::opcode;

    fn impatient() -> Config {
        Config {
            stop_limit: Duration::from_millis(50),
            ..Config::default()
        }
    }

    /// Starts an operation that the kernel never hears of, and so never ends.
    fn start_endless(local: &Local, keep: Arc<()>) {
        // SAFETY: the entry points to nothing.
        let endless = unsafe { local.submit(opcode::Nop::new().build(), keep) };
        local.core().ring().lose_staged();
        local.spawn(endless).detach();
    }

    #[test]
    fn what_never_ends_is_leaked_and_stopping_goes_on() {
        let kept = Arc::new(());
        let began = Instant::now();
        let core = run_with("test", impatient(), |local| async move {
            start_endless(&local, Arc::clone(&kept));
            local.sleep(Duration::from_millis(1)).await;
            (Rc::clone(local.core()), kept)
        });
        let (core, kept) = core.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(50));
        assert_eq!(core.shared().abandoned(), 1);
        drop(core);
        assert_eq!(Arc::strong_count(&kept), 2, "never freed");
    }

    #[test]
    fn an_iothread_with_such_an_operation_is_left_behind() {
        let iothread = IoThread::spawn_with("test", impatient()).unwrap();
        let kept = Arc::new(());
        let inner = Arc::clone(&kept);
        let (started, starting) = oneshot::channel();
        let remote = iothread.remote();
        let spawned = remote.spawn(move |local| async move {
            start_endless(&local, inner);
            let _ = started.send(());
        });
        spawned.unwrap();
        crate::run("control", |_| starting)
            .unwrap()
            .expect("it runs");
        drop(iothread);
        assert_eq!(Arc::strong_count(&kept), 2, "never freed");
        assert!(remote.spawn(|_| async {}).is_err());
    }
}
