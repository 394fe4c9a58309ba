// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The grace worker: one thread per memory that does what must wait for readers and for pins.
//!
//! ```text
//!   submit ──► queued ──(begin grace)──► in grace ──(readers gone)──► retired: dropped
//!                                                                 ├─► graces: told
//!                                                                 ├─► drains: wait for pins of both banks; the last
//!                                                                 │   unpin ends them, on its thread
//!                                                                 └─► fences: wait for pins of the old bank
//! ```
//!
//! Old views need not come that way: their writer has a batch of them pass a grace period itself when
//! no section is in the way.
//!
//! Everything queued when a grace period begins shares it. The worker sleeps on one wake-up
//! only: submissions, section ends and unpins it waits for all signal it, and no step blocks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ebbtide_models::seeded;
use smallvec::SmallVec;

use crate::flat::Flat;
use crate::index::{OldNodes, View};
use crate::ram::fence::Fence;
use crate::reader::barrier::Barrier;
use crate::reader::hub::Hub;
use crate::reader::wake::Level;
use crate::sweeper::Sweeper;
use crate::sync::{Mutex, lock};
use crate::ticket::Drain;

/// How long retired views may wait for company before they get a grace period of their own.
const LINGER: Duration = Duration::from_millis(5);
/// A read section that is open for longer is reported.
const LATE: Duration = Duration::from_secs(1);
/// Retired views after which they no longer wait.
const LINGER_COUNT: usize = 128;
/// Retired views after which their writer looks whether it can have them back.
const RECLAIM_COUNT: usize = 64;
/// Spare views that are kept when there have been no changes for a while.
const SPARES: usize = 2;

/// Sections that a view no longer shows.
pub(crate) type OldFlats = SmallVec<[Arc<Flat>; 2]>;

/// What a new view has taken the place of.
pub(crate) struct OldView {
    pub(crate) view: Option<Box<View>>,
    pub(crate) _nodes: OldNodes,
    pub(crate) flats: OldFlats,
    pub(crate) sweeper: Arc<Sweeper>,
}

impl OldView {
    /// Drops all but the view, which can serve again.
    fn retire(self) -> Option<Box<View>> {
        let sweeper = self.sweeper;
        self.flats
            .into_iter()
            .for_each(|flat| sweeper.drop_section(flat));
        self.view
    }
}

/// Something to be done after a grace period.
pub(crate) enum Job {
    /// Drop an old view, or keep it for the next one. Not urgent.
    View(OldView),
    /// Drop what readers may still see. Not urgent.
    Retire(Box<dyn FnOnce() + Send>),
    /// Tell that the grace period is over.
    Grace(Arc<Level>),
    /// Then wait for the pins of an unplugged block.
    Drain(Arc<Drain>),
    /// Then wait for the pins on the sealed ranges of a block.
    Fence(Arc<Fence>),
}

/// The worker's mailbox, and the readers it works for.
pub(crate) struct Grace {
    hub: &'static Hub,
    inbox: Mutex<Inbox>,
    /// Views that no reader sees any more. Who makes a view takes the memory of one of these:
    /// what one thread allocates for another to free makes the two wait for each other.
    #[allow(clippy::vec_box, reason = "readers know a view by where it is")]
    spare: Mutex<Vec<Box<View>>>,
}

#[derive(Default)]
struct Inbox {
    jobs: Vec<Job>,
    /// The worker will look by itself soon.
    lingering: bool,
    /// The memory is gone: end when nothing is left to do.
    closing: bool,
    /// The worker has ended, and with it all readers and pins.
    closed: bool,
}

impl Grace {
    pub(crate) fn new(barrier: Barrier) -> Arc<Grace> {
        Arc::new(Grace {
            hub: Hub::take(barrier),
            inbox: Mutex::new(Inbox::default()),
            spare: Mutex::new(Vec::new()),
        })
    }

    pub(crate) fn hub(&self) -> &'static Hub {
        self.hub
    }

    /// Hands a job to the worker. Never waits.
    pub(crate) fn submit(&self, job: Job) {
        self.submit_all([job]);
    }

    /// Hands jobs to the worker as one batch. Never waits.
    pub(crate) fn submit_all(&self, jobs: impl IntoIterator<Item = Job>) {
        let mut inbox = lock(&self.inbox);
        if inbox.closed {
            drop(inbox);
            jobs.into_iter().for_each(Job::finish_without_readers);
            return;
        }
        let before = inbox.jobs.len();
        inbox.jobs.extend(jobs);
        let count = inbox.jobs.len();
        let urgent = inbox.jobs.iter().skip(before).any(Job::is_urgent);
        let filled = |batch: usize| before / batch != count / batch;
        let wake = urgent || !inbox.lingering || filled(LINGER_COUNT);
        // A model says when.
        let mine = !cfg!(loom) && filled(RECLAIM_COUNT);
        drop(inbox);
        if !(mine && self.reclaim()) && wake {
            self.hub.wake().signal();
        }
    }

    /// Has the grace period of old views pass on the thread of their writer, if no section is in the
    /// way: one that changes the map all the time then needs no other thread for it, and has the
    /// memory of its views back while it is still in the cache. Otherwise they are the worker's.
    pub(crate) fn reclaim(&self) -> bool {
        let mut inbox = lock(&self.inbox);
        if inbox.jobs.iter().any(Job::is_urgent) {
            return false;
        }
        let mut old = std::mem::take(&mut inbox.jobs);
        drop(inbox);
        let passed = self.hub.try_grace();
        if passed {
            let views: Vec<Box<View>> = old.drain(..).filter_map(Job::into_view).collect();
            let mut spare = lock(&self.spare);
            let room = LINGER_COUNT.saturating_sub(spare.len());
            spare.extend(views.into_iter().take(room));
        }
        let mut inbox = lock(&self.inbox);
        // Ahead of what has come since; or for the room that the list has.
        old.append(&mut inbox.jobs);
        inbox.jobs = old;
        let lingering = inbox.lingering;
        drop(inbox);
        if !passed && !lingering && !seeded!("reclaim_tells_nobody") {
            // It may have found the inbox empty, and sleep.
            self.hub.wake().signal();
        }
        passed
    }

    /// A view to make a new one of.
    pub(crate) fn spare_view(&self) -> Option<Box<View>> {
        lock(&self.spare).pop()
    }

    /// Keeps a view that no reader sees any more, of those that come at once.
    fn keep(&self, view: Box<View>) {
        let mut spare = lock(&self.spare);
        if spare.len() < LINGER_COUNT {
            spare.push(view);
        } else {
            drop(spare);
            drop(view);
        }
    }

    /// Tells the worker to end once nothing is left to do.
    pub(crate) fn close(&self) {
        lock(&self.inbox).closing = true;
        self.hub.wake().signal();
    }
}

impl Inbox {
    /// Whether nothing in it is urgent, nor a lot.
    fn can_wait(&self) -> bool {
        self.jobs.len() < LINGER_COUNT && !self.jobs.iter().any(Job::is_urgent)
    }
}

impl Drop for Grace {
    fn drop(&mut self) {
        // Whoever uses the hub holds this object: readers and blocks by the memory, the worker
        // itself until the last pin is gone.
        self.hub.give_back();
    }
}

impl Job {
    fn is_urgent(&self) -> bool {
        !matches!(self, Job::Retire(_) | Job::View(_))
    }

    /// Drops an old view, whose grace period is over; what can serve again of it.
    fn into_view(self) -> Option<Box<View>> {
        match self {
            Job::View(old) => old.retire(),
            other => {
                other.finish_without_readers();
                None
            }
        }
    }

    /// There are no readers and no pins any more: nothing to wait for.
    fn finish_without_readers(self) {
        match self {
            Job::View(old) => drop(old.retire()),
            Job::Retire(retire) => retire(),
            Job::Grace(level) => level.raise(1),
            Job::Drain(drain) => drain.finish(),
            Job::Fence(fence) => {
                fence.begin();
                while fence.finish() {
                    fence.begin();
                }
            }
        }
    }
}

/// The worker's state.
pub(crate) struct Worker {
    grace: Arc<Grace>,
    queued: Vec<Job>,
    lingering_since: Option<Instant>,
    in_grace: Option<(u64, Vec<Job>)>,
    /// Some may be over: ended by the last unpin.
    drains: Vec<Arc<Drain>>,
    fences: Vec<Arc<Fence>>,
    /// Slots armed while closing.
    closing_slots: Option<u32>,
    /// Nothing has come for as long as a view lingers.
    quiet: bool,
}

/// What the worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Sleep until signalled.
    Sleep,
    /// Sleep until signalled, no longer than `LINGER`.
    Linger,
    /// All is done and the memory is gone.
    End,
}

impl Worker {
    pub(crate) fn new(grace: Arc<Grace>) -> Worker {
        Worker {
            grace,
            queued: Vec::new(),
            lingering_since: None,
            in_grace: None,
            drains: Vec::new(),
            fences: Vec::new(),
            closing_slots: None,
            quiet: false,
        }
    }

    #[cfg(loom)]
    pub(crate) fn hub(&self) -> &'static Hub {
        self.grace.hub
    }

    /// Runs until the memory is gone and nothing is left to do.
    pub(crate) fn run(mut self) {
        let mut reported = 0;
        loop {
            let next = self.turn();
            let alarm = self.ring_alarms();
            let wake = self.grace.hub.wake();
            match (next, &self.in_grace) {
                (Next::End, _) => break,
                (Next::Linger, _) => self.quiet = !wake.wait(Some(LINGER)),
                (Next::Sleep, Some((target, _))) if *target != reported => {
                    let limit = alarm.map_or(LATE, |alarm| alarm.min(LATE));
                    if !wake.wait(Some(limit)) && limit == LATE {
                        reported = *target;
                        let readers = self.grace.hub.late_readers(*target);
                        tracing::warn!(?readers, "a read section is open for long: unplugs wait");
                    }
                }
                (Next::Sleep, _) => {
                    wake.wait(alarm);
                }
            }
        }
    }

    /// Tells who wanted to know of unplugs that take long; the time until the next wants to.
    fn ring_alarms(&self) -> Option<Duration> {
        let waiting = self.in_grace.iter().flat_map(|(_, jobs)| jobs);
        let waiting = waiting.chain(&self.queued).filter_map(|job| match job {
            Job::Drain(drain) => Some(drain),
            Job::View(_) | Job::Retire(_) | Job::Grace(_) | Job::Fence(_) => None,
        });
        let next = waiting.chain(&self.drains).filter_map(|drain| drain.ring());
        let next = next.min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Does all that can be done now.
    pub(crate) fn turn(&mut self) -> Next {
        let closing = {
            let mut inbox = lock(&self.grace.inbox);
            self.queued.append(&mut inbox.jobs);
            inbox.lingering = false;
            inbox.closing
        };
        if std::mem::take(&mut self.quiet) && self.queued.is_empty() {
            // Outside the lock, which a change of the map takes.
            let mut spare = lock(&self.grace.spare);
            let keep = spare.len().min(SPARES);
            let surplus = spare.split_off(keep);
            drop(spare);
            drop(surplus);
        }
        loop {
            if let Some((target, mut jobs)) = self.in_grace.take() {
                if !self.grace.hub.grace_passed(target) {
                    self.in_grace = Some((target, jobs));
                    break;
                }
                if seeded!("late_joins_grace") {
                    jobs.append(&mut self.queued);
                }
                self.after_grace(jobs);
            }
            if !self.should_begin(closing) {
                break;
            }
            let jobs = std::mem::take(&mut self.queued);
            for job in &jobs {
                if let Job::Fence(fence) = job {
                    fence.begin();
                }
                if seeded!("drain_before_grace")
                    && let Job::Drain(drain) = job
                {
                    self.grace.hub.begin_drain(drain);
                }
            }
            let target = self.grace.hub.begin_grace();
            self.in_grace = Some((target, jobs));
        }
        self.check_drains();
        self.check_fences();
        self.next(closing)
    }

    /// Whether a grace period is worth beginning for what is queued.
    fn should_begin(&mut self, closing: bool) -> bool {
        if self.queued.is_empty() {
            self.lingering_since = None;
            return false;
        }
        // A model has no clock: nothing lingers.
        let mut ready = cfg!(loom)
            || closing
            || self.queued.len() >= LINGER_COUNT
            || self.queued.iter().any(Job::is_urgent);
        if !ready {
            let now = Instant::now();
            let since = *self.lingering_since.get_or_insert(now);
            ready = now.duration_since(since) >= LINGER;
        }
        if ready {
            self.lingering_since = None;
        }
        ready
    }

    fn after_grace(&mut self, jobs: Vec<Job>) {
        for job in jobs {
            match job {
                Job::View(old) => {
                    if let Some(view) = old.retire() {
                        self.grace.keep(view);
                    }
                }
                Job::Retire(retire) => retire(),
                Job::Grace(level) => level.raise(1),
                Job::Drain(drain) => {
                    drain.begin();
                    if !seeded!("drain_before_grace") {
                        self.grace.hub.begin_drain(&drain);
                    }
                    self.drains.push(drain);
                }
                Job::Fence(fence) => {
                    if !seeded!("unarmed_fence") {
                        self.grace.hub.arm(fence.slot());
                    }
                    self.fences.push(fence);
                }
            }
        }
    }

    fn check_drains(&mut self) {
        let hub = self.grace.hub;
        self.drains.retain(|drain| !hub.end_drain(drain));
    }

    fn check_fences(&mut self) {
        let hub = self.grace.hub;
        let queued = &mut self.queued;
        let before = queued.len();
        self.fences.retain(|fence| {
            if hub.outstanding(fence.slot(), &[fence.old_bank()]) != 0 {
                return true;
            }
            hub.disarm(fence.slot());
            if fence.finish() {
                queued.push(Job::Fence(Arc::clone(fence)));
            }
            false
        });
        if queued.len() > before {
            // Seals that came meanwhile need a flip and a grace period of their own.
            hub.wake().signal();
        }
    }

    fn next(&mut self, closing: bool) -> Next {
        let idle = self.in_grace.is_none()
            && self.queued.is_empty()
            && self.drains.is_empty()
            && self.fences.is_empty();
        if closing && idle && self.all_pins_gone() {
            let mut inbox = lock(&self.grace.inbox);
            if inbox.jobs.is_empty() {
                inbox.closed = true;
                return Next::End;
            }
            self.grace.hub.wake().signal();
        }
        let surplus = || lock(&self.grace.spare).len() > SPARES;
        if self.in_grace.is_none() && (!self.queued.is_empty() || surplus()) {
            let mut inbox = lock(&self.grace.inbox);
            // What has come meanwhile waits as well, or the worker would go round for each view of a
            // writer that is as fast, and the two take turns at the inbox.
            inbox.lingering = inbox.jobs.is_empty() || !cfg!(loom) && inbox.can_wait();
            if !inbox.lingering {
                self.grace.hub.wake().signal();
            }
            return Next::Linger;
        }
        Next::Sleep
    }

    /// What decides what comes next.
    #[cfg(loom)]
    pub(crate) fn state(&self) -> String {
        let kind = |job: &Job| match job {
            Job::View(_) => "view".to_owned(),
            Job::Retire(_) => "retire".to_owned(),
            Job::Grace(_) => "grace".to_owned(),
            Job::Drain(drain) => format!("drain {}", drain.slot()),
            Job::Fence(fence) => format!("fence {}", fence.slot()),
        };
        let kinds = |jobs: &Vec<Job>| jobs.iter().map(kind).collect::<Vec<_>>();
        let inbox = kinds(&lock(&self.grace.inbox).jobs);
        let waiting = self.in_grace.as_ref().map(|(_, jobs)| kinds(jobs));
        let drains: Vec<_> = self.drains.iter().map(|drain| drain.slot()).collect();
        let queued = kinds(&self.queued);
        format!("{inbox:?} {queued:?} {waiting:?} {drains:?}")
    }

    fn all_pins_gone(&mut self) -> bool {
        let hub = self.grace.hub;
        let slots = hub.slots();
        let armed = self.closing_slots.get_or_insert(0);
        (*armed..slots).for_each(|slot| hub.arm(slot));
        *armed = slots.max(*armed);
        // Slots that are free count nothing, so all can be asked.
        (0..slots).all(|slot| hub.outstanding(slot, &[0, 1]) == 0)
    }
}
