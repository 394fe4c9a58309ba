// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task that serves one queue of requests from DRIVER_OK to the next reset, whatever the device.
//!
//! ```text
//!            kick ──┐
//!                   ▼
//!   ┌──────────► turn: chains → jobs, each begun at once; answers → used ring; one interrupt for all
//!   │               │
//!   │               ▼
//!   └── wait for a kick, the end of a backend operation or the end of the gate
//! ```
//!
//! While chains keep coming the driver is told not to kick, and the queue is looked at again after the backend had its
//! turn. Jobs are futures that this task polls (`jobs.rs`): those of a turn are handed to the backend together, and those
//! that end together are given back together. A job holds its pins from its pop until it is given back, or until its
//! backend operation ends after a reset closed the gate; then nobody touches the queue any more. The task holds a lease of
//! the activation's gate in every turn, and from one turn to the next as long as jobs are under way: one for all of them,
//! as none is begun after the gate has closed.
//!
//! When the device is removed instead, the driver may be alive: jobs are given back as ever, and what is not begun is
//! answered with an error, until nothing comes any more (`removal/rest.rs`).

mod jobs;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_gate::{Entry, Gate, Lease};
use ebbtide_iothread::{Local, Signals};
use ebbtide_memory::{AccessError, AddressSpace, ReadGuard, Reader};

use crate::control::TransportControl;
use crate::device::ActiveQueue;
use crate::interrupt::QueueInterrupt;
use crate::removal::Removed;
use crate::removal::rest::{self, Look};
use crate::virtq::{Chain, Queue, QueueError};
use jobs::Jobs;

/// What a device makes of the chains of a queue.
pub(crate) trait Service: 'static {
    /// A request that takes time. Owns the right to the guest memory it needs.
    type Job: 'static;
    /// What an answered request keeps until it is given back.
    type Kept: 'static;

    /// Begins a request, inside a read section: whatever blocks belongs into [`carry_out`](Self::carry_out). What it leaves
    /// of the chain is not looked at any more.
    ///
    /// # Errors
    /// There is no place to answer at.
    fn begin(
        &self,
        guard: &ReadGuard<'_>,
        chain: &mut Chain,
    ) -> Result<Begun<Self::Job, Self::Kept>, Unanswerable>;

    /// Answers a request that will never begin: its device is being removed. Inside a read section.
    ///
    /// # Errors
    /// There is no place to answer at.
    fn refuse(
        &self,
        guard: &ReadGuard<'_>,
        chain: Chain,
    ) -> Result<Answered<Self::Kept>, Unanswerable>;

    /// Carries a job out and answers it.
    fn carry_out(
        self: Rc<Self>,
        job: Self::Job,
    ) -> impl Future<Output = Answered<Self::Kept>> + 'static;

    /// Writes an answer that is still to be written, as it is going to be given back now; the right to write it is held.
    fn write_answer(&self, answered: &mut Answered<Self::Kept>) {
        let _ = answered;
    }

    /// Lets go of what an answered request has kept: the driver can see the answer.
    fn let_go(&self, kept: Self::Kept) {
        drop(kept);
    }

    /// The driver broke the queue, of which nothing is given back any more: a chain is none, or has no place to answer at.
    /// Called once at most.
    fn broken(&self);
}

/// A request after its first look.
pub(crate) enum Begun<J, K> {
    /// It needed no time.
    Answered(Answered<K>),
    /// It is to be carried out.
    Job(J),
}

/// A request whose answer is known.
pub(crate) struct Answered<K> {
    /// The chain.
    pub head: u16,
    /// Bytes of the chain the device wrote, from its start.
    pub written: u32,
    /// Kept until the driver can see the answer.
    pub kept: K,
}

/// There is no place to answer at: only a reset of the device helps the driver.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unanswerable {
    #[error("chain {head} has no room for an answer")]
    NoRoom { head: u16 },
    #[error("chain {head}: answer: {source}")]
    Memory { head: u16, source: AccessError },
}

/// Everything a queue needs to be served.
pub(crate) struct Setup {
    pub name: Arc<str>,
    pub queue: ActiveQueue,
    pub gate: Arc<Gate>,
    pub space: Arc<AddressSpace>,
    pub control: TransportControl,
    pub complaints: Arc<LogLimit>,
}

/// Serves the queue until a reset or a removal closes the gate, or the driver breaks the queue. To be told of a removal
/// the caller has to [listen](Removed::listen) before the activation returns.
pub(crate) async fn serve<S: Service>(local: Local, setup: Setup, service: S) {
    let Setup {
        name,
        queue,
        gate,
        space,
        control,
        complaints,
    } = setup;
    let ActiveQueue {
        index,
        queue,
        kick,
        interrupt,
        removed,
        ..
    } = queue;
    let inbox = Inbox::new(Rc::new(service), kick.signals(&local));
    // Its count is left alone from here on.
    drop(kick);
    let reader = space.memory().register();
    let turns = Turns {
        local: local.clone(),
        gate: Arc::clone(&gate),
        removed,
        space,
        reader,
        inbox,
    };
    let mut rings = Rings {
        queue,
        interrupt,
        kicks_on: true,
        chain: Chain::new(0),
    };
    let served = match turns.until_closed(&mut rings).await {
        Ok(()) => turns.answer_rest(&mut rings).await,
        fault => fault,
    };
    if let Err(fault) = served {
        turns.inbox.service.broken();
        if let Some(_lease) = gate.enter(Entry::Io) {
            if let Some(suppressed) = complaints.allow() {
                tracing::warn!(device = &*name, queue = index, suppressed, %fault, "the driver's queue is unusable");
            }
            control.needs_reset();
        }
    }
    // Nobody gives anything back any more, and a removal need not wait for this task.
    let Rings { interrupt, .. } = rings;
    let (jobs, answered) = turns.into_jobs();
    jobs.end(answered, &interrupt).await;
}

/// Why a queue is not served any further.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Request(#[from] Unanswerable),
}

/// What is to be done after a turn.
enum Turn {
    /// Look again as soon as the backend had its turn: chains were coming.
    Busy,
    /// Sleep: the driver kicks for the next chain.
    Idle,
}

struct Rings {
    queue: Queue,
    interrupt: QueueInterrupt,
    /// The driver was told to kick.
    kicks_on: bool,
    /// The chain that was popped last.
    chain: Chain,
}

/// What the turns of one queue work with.
struct Turns<S: Service> {
    local: Local,
    gate: Arc<Gate>,
    removed: Removed,
    space: Arc<AddressSpace>,
    reader: Reader,
    inbox: Inbox<S>,
}

impl<S: Service> Turns<S> {
    /// What is under way, and what is answered and not given back.
    fn into_jobs(self) -> (Underway<S>, Vec<Answered<S::Kept>>) {
        let Inbox { underway, done, .. } = self.inbox;
        (underway.into_inner(), done.into_inner())
    }

    /// Serves until the gate closes, or is about to.
    async fn until_closed(&self, rings: &mut Rings) -> Result<(), Fault> {
        let mut drained = pin!(self.gate.drained());
        while let Some(lease) = self.enter() {
            // None: the machine was reset and did not wait for this; the queue lies in the memory of the next guest.
            let Some(right) = rings.interrupt.answer() else {
                self.leave(lease);
                break;
            };
            let turn = self.turn(rings);
            drop(right);
            self.leave(lease);
            if let Turn::Busy = turn? {
                self.local.yield_now().await;
                continue;
            }
            let ended = poll_fn(|cx| {
                let removed = self.removed.poll(cx.waker()).is_ready();
                if removed || drained.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(true);
                }
                self.inbox.poll_news(cx.waker()).map(|()| false)
            });
            if ended.await {
                break;
            }
        }
        Ok(())
    }

    /// The right to touch the queue, unless the gate is closed.
    fn enter(&self) -> Option<Lease> {
        if self.gate.is_closed() {
            // What is kept for the jobs that are under way stays.
            return None;
        }
        let kept = self.inbox.underway.borrow_mut().lease.take();
        kept.or_else(|| self.gate.enter(Entry::Io))
    }

    /// Ends a turn: jobs that are under way or to be given back keep the lease.
    fn leave(&self, lease: Lease) {
        if self.inbox.jobs.get() > 0 || !self.inbox.done.borrow().is_empty() {
            self.inbox.underway.borrow_mut().lease = Some(lease);
        }
    }

    /// Answers what is in the queue, if its device is being removed.
    async fn answer_rest(&self, rings: &mut Rings) -> Result<(), Fault> {
        let interrupt = rings.interrupt.clone();
        let look = || {
            let chains = self.last_turn(rings)?;
            let jobs = self.inbox.jobs.get();
            Ok(Look { chains, jobs })
        };
        let news = |waker: &Waker| self.inbox.poll_news(waker);
        rest::answer_rest(&self.local, &self.removed, &interrupt, look, news).await
    }

    /// Refuses what is available and gives back what is answered; returns how many chains were refused.
    fn last_turn(&self, rings: &mut Rings) -> Result<usize, Fault> {
        let (refused, interrupt) = {
            let guard = self.space.read(&self.reader);
            self.inbox.kicked.set(false);
            let mut refused = 0;
            while refused < rest::CHAINS_MAX
                && let Some(chain) = rings.queue.pop(&guard)?
            {
                // The removal's lease covers it.
                let answered = self.inbox.service.refuse(&guard, chain)?;
                self.inbox.put(answered);
                refused += 1;
            }
            (refused, self.give_back(&guard, rings)?)
        };
        if interrupt {
            rings.interrupt.signal();
        }
        Ok(refused)
    }

    fn turn(&self, rings: &mut Rings) -> Result<Turn, Fault> {
        self.inbox.poll_jobs(None);
        let popped = {
            let guard = self.space.read(&self.reader);
            self.inbox.kicked.set(false);
            self.take_chains(&guard, rings)
        };
        // What a job begins with may take its time: not inside a read section. Also before a fault: those are begun.
        self.inbox.start_begun();
        let popped = popped?;
        let (turn, interrupt) = {
            let guard = self.space.read(&self.reader);
            let interrupt = self.give_back(&guard, rings)?;
            (Self::after(&guard, rings, popped)?, interrupt)
        };
        if interrupt {
            rings.interrupt.signal();
        }
        Ok(turn)
    }

    fn after(guard: &ReadGuard<'_>, rings: &mut Rings, popped: usize) -> Result<Turn, Fault> {
        if popped > 0 {
            return Ok(Turn::Busy);
        }
        if !rings.kicks_on {
            rings.kicks_on = true;
            if rings.queue.enable_kick(guard)? {
                // They came while kicks were off.
                return Ok(Turn::Busy);
            }
        }
        Ok(Turn::Idle)
    }

    /// Begins everything that is available; returns how much that was.
    fn take_chains(&self, guard: &ReadGuard<'_>, rings: &mut Rings) -> Result<usize, Fault> {
        let mut popped = 0;
        // The turn's lease covers them all, but who closes the gate waits: for no more than is necessary.
        while !self.gate.is_closed() && rings.queue.pop_into(guard, &mut rings.chain)? {
            if std::mem::take(&mut rings.kicks_on) {
                rings.queue.disable_kick(guard)?;
            }
            popped += 1;
            match self.inbox.service.begin(guard, &mut rings.chain)? {
                Begun::Answered(answered) => self.inbox.put(answered),
                Begun::Job(job) => self.inbox.begun.borrow_mut().push(job),
            }
        }
        Ok(popped)
    }

    /// Publishes all answers there are; whether the driver wants an interrupt for them.
    fn give_back(&self, guard: &ReadGuard<'_>, rings: &mut Rings) -> Result<bool, Fault> {
        let mut done = self.inbox.done.borrow_mut();
        if done.is_empty() {
            return Ok(false);
        }
        for answered in &mut *done {
            self.inbox.service.write_answer(answered);
        }
        for answered in &*done {
            rings
                .queue
                .add_used(guard, answered.head, answered.written)?;
        }
        rings.queue.publish_used(guard)?;
        // The driver may give back memory it has its answer for: pins go before it is told.
        for answered in done.drain(..) {
            self.inbox.service.let_go(answered.kept);
        }
        drop(done);
        Ok(rings.queue.needs_interrupt(guard)?)
    }
}

/// What there is for the queue's task to do.
struct Inbox<S: Service> {
    service: Rc<S>,
    kicked: Cell<bool>,
    /// `None`: it failed, and there are no more kicks.
    kicks: RefCell<Option<Signals>>,
    /// Begun in this turn, to be carried out.
    begun: RefCell<Vec<S::Job>>,
    /// Answered, and not yet given back.
    done: RefCell<Vec<Answered<S::Kept>>>,
    underway: RefCell<Underway<S>>,
    /// Jobs that are begun and not answered.
    jobs: Cell<usize>,
}

impl<S: Service> Inbox<S> {
    fn new(service: Rc<S>, kicks: Signals) -> Inbox<S> {
        Inbox {
            underway: RefCell::new(Underway::of(&service)),
            service,
            kicked: Cell::new(false),
            kicks: RefCell::new(Some(kicks)),
            begun: RefCell::default(),
            done: RefCell::default(),
            jobs: Cell::new(0),
        }
    }

    fn put(&self, answered: Answered<S::Kept>) {
        self.done.borrow_mut().push(answered);
    }

    /// Hands on what was begun.
    fn start_begun(&self) {
        let mut underway = self.underway.borrow_mut();
        let mut done = self.done.borrow_mut();
        underway
            .table
            .start(&mut self.begun.borrow_mut(), &mut done);
        self.jobs.set(underway.table.len());
    }

    /// Lets the jobs go on that can; `task` is woken when others can, if it is going to wait.
    fn poll_jobs(&self, task: Option<&Waker>) {
        if self.jobs.get() == 0 {
            return;
        }
        let mut underway = self.underway.borrow_mut();
        underway.table.poll_woken(task, &mut self.done.borrow_mut());
        self.jobs.set(underway.table.len());
    }

    fn poll_news(&self, waker: &Waker) -> Poll<()> {
        self.poll_kick(waker);
        self.poll_jobs(Some(waker));
        if self.kicked.get() || !self.done.borrow().is_empty() {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    fn poll_kick(&self, waker: &Waker) {
        let mut kicks = self.kicks.borrow_mut();
        let Some(signals) = &mut *kicks else { return };
        match signals.poll(&mut Context::from_waker(waker)) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => self.kicked.set(true),
            Poll::Ready(Err(error)) => {
                tracing::error!(%error, "waiting for kicks failed");
                *kicks = None;
            }
        }
    }
}

/// The jobs of a queue that are under way.
struct Underway<S: Service> {
    service: Rc<S>,
    table: Box<dyn Table<S>>,
    /// Between turns, as long as there are any or answers of theirs. Dropped after them.
    lease: Option<Lease>,
}

impl<S: Service> Underway<S> {
    fn of(service: &Rc<S>) -> Underway<S> {
        let carry_out = {
            let service = Rc::clone(service);
            move |job| Rc::clone(&service).carry_out(job)
        };
        Underway {
            service: Rc::clone(service),
            table: Box::new((carry_out, Jobs::new())),
            lease: None,
        }
    }

    /// Waits for all of them. Their answers, and those that are there, are written, but their chains not given back.
    async fn end(mut self, mut done: Vec<Answered<S::Kept>>, interrupt: &QueueInterrupt) {
        poll_fn(|cx| {
            self.table.poll_woken(Some(cx.waker()), &mut done);
            if !done.is_empty() {
                // None: the machine was reset meanwhile without waiting for them.
                if let Some(_right) = interrupt.answer() {
                    for answered in &mut done {
                        self.service.write_answer(answered);
                    }
                }
                done.clear();
            }
            if self.table.len() > 0 {
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }
}

/// [`Jobs`], whatever the type of their futures.
trait Table<S: Service> {
    /// Starts all that was `begun`; what was done at once is added to `done`.
    fn start(&mut self, begun: &mut Vec<S::Job>, done: &mut Vec<Answered<S::Kept>>);
    fn poll_woken(&mut self, task: Option<&Waker>, done: &mut Vec<Answered<S::Kept>>);
    fn len(&self) -> usize;
}

impl<S, M, F> Table<S> for (M, Jobs<F>)
where
    S: Service,
    M: Fn(S::Job) -> F,
    F: Future<Output = Answered<S::Kept>>,
{
    fn start(&mut self, begun: &mut Vec<S::Job>, done: &mut Vec<Answered<S::Kept>>) {
        let (carry_out, jobs) = self;
        for job in begun.drain(..) {
            done.extend(jobs.start(carry_out(job)));
        }
    }

    fn poll_woken(&mut self, task: Option<&Waker>, done: &mut Vec<Answered<S::Kept>>) {
        self.1.poll_woken(task, |answered| done.push(answered));
    }

    fn len(&self) -> usize {
        self.1.len()
    }
}
