// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One io_uring and what is in flight on it.
//!
//! Entries are staged here and handed to the kernel in [`Ring::turn`], which returns only when the kernel has
//! taken them all: so an entry can still be withdrawn before its turn, and after it the kernel holds its own
//! references to the files.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};

use crate::config::{Config, Kernel};
use crate::error::Error;
use crate::setup;
use crate::slots::{Completion, InFlight, Keep, Key, NOBODY, Phase, Slots};

/// How long a turn may wait for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    For(Duration),
    Forever,
}

/// What came out of a turn. To be disposed of when the ring is no longer borrowed: wakers and the memory of
/// operations may run any code when woken and dropped.
#[derive(Default)]
pub(crate) struct Completed {
    wakers: Vec<Waker>,
    garbage: Vec<Keep>,
    count: usize,
}

impl Completed {
    pub fn dispose(&mut self) {
        self.count = 0;
        for waker in self.wakers.drain(..) {
            waker.wake();
        }
        self.garbage.clear();
    }
}

pub(crate) struct Ring {
    uring: IoUring,
    slots: Slots,
    staged: VecDeque<squeue::Entry>,
    /// How many entries have left `staged` for the kernel so far.
    taken: u64,
    bell: Arc<OwnedFd>,
    bell_armed: bool,
    /// When the earliest time-out operation is due (kernels whose wait has no time-out).
    alarm: Option<Instant>,
    wait_has_timeout: bool,
    standing_polls: bool,
    wait_flags: EnterFlags,
    closed: bool,
}

/// What a standing operation has to tell.
pub(crate) enum News {
    /// Nothing; the waker that the one noted now replaces.
    None(Option<Waker>),
    /// It has answered.
    Some,
    /// It has answered this, and is over.
    Last(i32),
}

/// What became of an operation whose future was dropped.
pub(crate) enum Dropped {
    /// Its memory is free, for the kernel never saw it or is through with it.
    Free(InFlight),
    /// It was asked to end; the ring keeps its memory until it has.
    Cancelling(Phase),
    /// There is no such operation any more.
    Gone,
}

impl Ring {
    /// A ring that this thread alone uses and that is woken by writing to `bell`.
    pub fn new(name: &str, config: &Config, bell: Arc<OwnedFd>) -> Result<Ring, Error> {
        let uring = setup::new_ring(name, config)?;
        let mut wait_flags = EnterFlags::GETEVENTS;
        if uring.params().is_feature_no_iowait() {
            // An idle machine must not show up as waiting for I/O.
            wait_flags |= EnterFlags::NO_IOWAIT;
        }
        Ok(Ring {
            wait_has_timeout: uring.params().is_feature_ext_arg()
                && config.kernel != Kernel::Linux5_6,
            standing_polls: config.kernel != Kernel::Linux5_6,
            uring,
            slots: Slots::default(),
            staged: VecDeque::new(),
            taken: 0,
            bell,
            bell_armed: false,
            alarm: None,
            wait_flags,
            closed: false,
        })
    }

    /// Stages an operation. `Err` gives `keep` back: the ring is closing.
    ///
    /// # Safety
    /// Everything `entry` points to and every descriptor it names stays valid as long as `keep` lives.
    /// The entry posts one CQE at its end, and has no link or drain flag.
    pub unsafe fn submit(&mut self, entry: squeue::Entry, keep: Keep) -> Result<Key, Keep> {
        if self.closed {
            return Err(keep);
        }
        Ok(self.stage(entry, keep, Phase::Awaited(None)))
    }

    /// As [`submit`](Self::submit), for an operation that answers again and again.
    ///
    /// # Safety
    /// As there; all CQEs but the last have F_MORE.
    pub unsafe fn submit_standing(
        &mut self,
        entry: squeue::Entry,
        keep: Keep,
    ) -> Result<Key, Keep> {
        if self.closed {
            return Err(keep);
        }
        let phase = Phase::Standing {
            waker: None,
            news: false,
        };
        Ok(self.stage(entry, keep, phase))
    }

    /// What a standing operation has answered since the last call.
    pub fn poll_standing(&mut self, key: Key, waker: &Waker) -> News {
        let Some(operation) = self.slots.get_mut(key) else {
            unreachable!("the ring lost a standing operation");
        };
        match &mut operation.phase {
            Phase::Standing { waker: noted, news } => {
                if std::mem::take(news) {
                    News::Some
                } else if noted.as_ref().is_some_and(|noted| noted.will_wake(waker)) {
                    News::None(None)
                } else {
                    News::None(noted.replace(waker.clone()))
                }
            }
            Phase::Done(result) => {
                let result = *result;
                self.slots.remove(key);
                News::Last(result)
            }
            _ => unreachable!("not a standing operation"),
        }
    }

    /// Whether this kernel may have standing polls (5.13).
    pub fn has_standing_polls(&self) -> bool {
        self.standing_polls
    }

    fn stage(&mut self, entry: squeue::Entry, keep: Keep, phase: Phase) -> Key {
        let number = self.taken + self.staged.len() as u64;
        let key = self.slots.insert(keep, phase, number);
        self.staged.push_back(entry.user_data(key.user_data()));
        key
    }

    /// The result of an operation; or `waker` is noted, and the one it replaces (if any) handed back.
    /// `None`: no such operation.
    pub fn poll(&mut self, key: Key, waker: &Waker) -> Option<Result<(i32, Keep), Option<Waker>>> {
        match &mut self.slots.get_mut(key)?.phase {
            Phase::Awaited(Some(noted)) if noted.will_wake(waker) => Some(Err(None)),
            Phase::Awaited(noted) => Some(Err(noted.replace(waker.clone()))),
            Phase::Done(result) => {
                let result = *result;
                let operation = self.slots.remove(key)?;
                Some(Ok((result, operation.keep)))
            }
            Phase::Standing { .. } | Phase::Abandoned | Phase::Bell | Phase::Alarm => None,
        }
    }

    /// The future of an operation was dropped: nobody waits for it any more.
    pub fn abandon(&mut self, key: Key) -> Dropped {
        let Some(operation) = self.slots.get_mut(key) else {
            return Dropped::Gone;
        };
        let staged = operation.staged;
        if let Some(at) = staged.checked_sub(self.taken) {
            // Not handed over yet: turn the entry into one that does nothing.
            if let Some(entry) = self.staged.get_mut(at as usize) {
                *entry = opcode::Nop::new().build().user_data(NOBODY);
            }
        } else if !matches!(operation.phase, Phase::Done(_)) {
            let was = std::mem::replace(&mut operation.phase, Phase::Abandoned);
            self.stage_cancel(key);
            return Dropped::Cancelling(was);
        }
        self.slots.remove(key).map_or(Dropped::Gone, Dropped::Free)
    }

    /// Asks an operation to end that somebody still waits for.
    pub fn cancel(&mut self, key: Key) {
        let operation = self.slots.get_mut(key);
        if operation.is_some_and(|operation| matches!(operation.phase, Phase::Awaited(_))) {
            self.stage_cancel(key);
        }
    }

    fn stage_cancel(&mut self, key: Key) {
        let cancel = opcode::AsyncCancel::new(key.user_data())
            .build()
            .user_data(NOBODY);
        self.staged.push_back(cancel);
    }

    /// Hands over what is staged, waits as told unless something has completed meanwhile, and collects what did.
    ///
    /// # Errors
    /// What io_uring_enter(2) answers to a broken ring; nothing that a caller can cause.
    pub fn turn(&mut self, wait: Wait, out: &mut Completed) -> io::Result<()> {
        if !self.bell_armed && !self.closed {
            self.arm_bell();
        }
        self.arm_alarm(wait);
        let mut wait = wait;
        loop {
            self.fill();
            let last = self.staged.is_empty();
            let waiting = last && wait != Wait::No && out.count == 0;
            match self.enter(if waiting { wait } else { Wait::No }) {
                Ok(()) => {}
                Err(error) => match error.raw_os_error() {
                    // The time is up, or a signal came: either way the caller looks around.
                    Some(libc::ETIME | libc::EINTR) => wait = Wait::No,
                    // No room for completions, or no memory for requests: collect, then again.
                    Some(libc::EBUSY | libc::EAGAIN) => self.relieve(out),
                    _ => return Err(error),
                },
            }
            if waiting {
                wait = Wait::No;
            }
            self.collect(out);
            if self.staged.is_empty() && self.uring.submission().is_empty() {
                return Ok(());
            }
        }
    }

    /// Moves staged entries to the submission queue as far as it has room.
    fn fill(&mut self) {
        let mut queue = self.uring.submission();
        while !queue.is_full() {
            let Some(entry) = self.staged.pop_front() else {
                break;
            };
            self.taken += 1;
            // SAFETY: the slot of this entry owns what it points to until its CQE (`submit`'s contract; the
            // bell's and the alarms' entries point into their own slot's memory), and the queue has room.
            if unsafe { queue.push(&entry) }.is_err() {
                unreachable!("the queue was not full");
            }
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let queue = self.uring.submission();
        let to_submit = queue.len() as u32;
        let owed = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        let timespec = match wait {
            Wait::No if to_submit == 0 && !owed => return Ok(()),
            Wait::For(duration) if self.wait_has_timeout => Some(Timespec::from(duration)),
            _ => None,
        };
        let (min_complete, mut flags) = match wait {
            Wait::No if owed => (0, EnterFlags::GETEVENTS),
            Wait::No => (0, EnterFlags::empty()),
            Wait::For(_) | Wait::Forever => (1, self.wait_flags),
        };
        let submitter = self.uring.submitter();
        let Some(timespec) = timespec else {
            // SAFETY: no argument is passed; the queue holds only what `fill` put there.
            unsafe {
                submitter.enter::<libc::sigset_t>(to_submit, min_complete, flags.bits(), None)?;
            }
            return Ok(());
        };
        flags |= EnterFlags::EXT_ARG;
        let args = SubmitArgs::new().timespec(&timespec);
        // SAFETY: with EXT_ARG the argument is this structure, and it and the timespec outlive the call.
        unsafe { submitter.enter(to_submit, min_complete, flags.bits(), Some(&args))? };
        Ok(())
    }

    /// Makes room after the kernel refused to take more.
    fn relieve(&mut self, out: &mut Completed) {
        let before = out.count;
        self.collect(out);
        if out.count == before {
            // Nothing to collect, so the host is out of memory for requests. Nothing may get lost, so wait.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes the CQEs that are there. Those that did not fit into the ring come with the next enter.
    fn collect(&mut self, out: &mut Completed) {
        let Ring {
            uring,
            slots,
            bell_armed,
            alarm,
            ..
        } = self;
        for cqe in uring.completion() {
            out.count += 1;
            let more = cqueue::more(cqe.flags());
            match slots.complete(cqe.user_data(), cqe.result(), more) {
                Completion::Wake(waker) => out.wakers.extend(waker),
                Completion::Free(keep) => out.garbage.push(keep),
                Completion::Bell(keep) => {
                    *bell_armed = false;
                    out.garbage.push(keep);
                }
                Completion::Alarm(keep) => {
                    *alarm = None;
                    out.garbage.push(keep);
                }
                Completion::NotYet | Completion::Unknown => {}
            }
        }
    }

    /// Has the ring read the eventfd, so that writing to it ends a wait.
    fn arm_bell(&mut self) {
        self.bell_armed = true;
        let mut count = Box::new([0_u8; 8]);
        let fd = Fd(self.bell.as_raw_fd());
        let entry = opcode::Read::new(fd, count.as_mut_ptr(), 8).build();
        self.stage(
            entry,
            Box::new((count, Arc::clone(&self.bell))),
            Phase::Bell,
        );
    }

    /// Where the wait itself can have no time-out, a time-out operation ends it.
    fn arm_alarm(&mut self, wait: Wait) {
        let Wait::For(duration) = wait else { return };
        if self.wait_has_timeout {
            return;
        }
        let due = Instant::now() + duration;
        if self.alarm.is_some_and(|alarm| alarm <= due) {
            return;
        }
        self.alarm = Some(due);
        let timespec = Box::new(Timespec::from(duration));
        let entry = opcode::Timeout::new(&raw const *timespec).build();
        self.stage(entry, timespec, Phase::Alarm);
    }

    /// No new operations from here on.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Asks everything in flight to end. Returns how many operations that are.
    pub fn cancel_all(&mut self) -> usize {
        let keys: Vec<Key> = self.slots.keys_in_flight().collect();
        for &key in &keys {
            self.stage_cancel(key);
        }
        keys.len()
    }

    /// Operations that the kernel is not through with.
    pub fn in_flight(&self) -> usize {
        self.slots.in_flight()
    }

    /// Forgets what is staged: as if the kernel never answered.
    #[cfg(test)]
    pub fn lose_staged(&mut self) {
        self.taken += self.staged.len() as u64;
        self.staged.clear();
    }

    /// Gives up on what never ended: its memory is never freed. Returns how many operations that were.
    pub fn leak_in_flight(&mut self) -> usize {
        self.slots.leak_in_flight()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Executors drain their ring before; after a failure of the ring itself something may be left.
        let leaked = self.slots.leak_in_flight();
        if leaked > 0 {
            tracing::error!(
                leaked,
                "an io_uring is closed with operations in flight: their memory is leaked"
            );
        }
    }
}
