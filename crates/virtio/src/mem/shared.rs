// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of a memory device that its threads share, and the rules by which it changes.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_iothread::Sender;

use super::blocks::Blocks;
use super::metrics::Counters;
use super::request::{Answer, Request, RequestKind};
use super::resize::{Action, Answered, Progress, Reason, Resize, Setback};
use super::size::{Region, Sizes};
use super::verdict::{self, Verdict};
use crate::control::{Change, TransportControl};

/// What a memory device tells who owns it. Nothing waits for it to be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemEvent {
    /// Memory was plugged or unplugged.
    SizeChanged {
        /// The device.
        id: Arc<str>,
        /// What is plugged now, in bytes.
        plugged_bytes: u64,
    },
    /// What is plugged is what was requested. Told once for each request.
    TargetReached {
        /// The device.
        id: Arc<str>,
        /// What is plugged, in bytes.
        plugged_bytes: u64,
    },
    /// A request has not come to its end and, as things are, will not.
    Stalled {
        /// The device.
        id: Arc<str>,
        /// What was requested, in bytes.
        requested_bytes: u64,
        /// How far it got, in bytes.
        plugged_bytes: u64,
        /// Whether it got any nearer.
        partial: bool,
        /// Why not further.
        reason: Reason,
    },
}

pub(super) struct Shared {
    pub id: Arc<str>,
    pub region: Region,
    pub blocks: Blocks,
    pub counters: Arc<Counters>,
    pub complaints: LogLimit,
    state: Mutex<State>,
    /// Set once, when the transport takes the device.
    control: OnceLock<TransportControl>,
    events: Sender<MemEvent>,
    news: Sender<()>,
}

/// Taken inside the transport's configuration lock where both are needed, never around it.
struct State {
    sizes: Sizes,
    resize: Resize,
    /// Which activation the driver state belongs to.
    activation: u64,
}

/// What the driver asked for, judged.
pub(super) struct Judged {
    pub request: Request,
    pub verdict: Verdict,
    pub began: Instant,
}

impl Shared {
    pub(super) fn new(
        id: Arc<str>,
        region: Region,
        blocks: Blocks,
        resize: Resize,
        requested: u64,
        events: Sender<MemEvent>,
        news: Sender<()>,
    ) -> Shared {
        let counters = Arc::clone(&blocks.counters);
        let state = State {
            sizes: region.fresh(requested),
            resize,
            activation: 0,
        };
        Shared {
            id,
            region,
            blocks,
            counters,
            complaints: LogLimit::default(),
            state: Mutex::new(state),
            control: OnceLock::new(),
            events,
            news,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn attach(&self, control: TransportControl) {
        if self.control.set(control).is_err() {
            tracing::error!(
                device = &*self.id,
                "a memory device was given to two transports"
            );
        }
    }

    pub(super) fn sizes(&self) -> Sizes {
        self.lock().sizes
    }

    /// Reads from the resize.
    pub(super) fn resize<T>(&self, read: impl FnOnce(&Resize) -> T) -> T {
        read(&self.lock().resize)
    }

    /// Changes what the driver reads and lets it notice, in one step.
    fn update_config<T>(&self, change: impl FnOnce(&mut State) -> (T, Change)) -> T {
        match self.control.get() {
            Some(control) => control.update_config(|| change(&mut self.lock())),
            None => change(&mut self.lock()).0,
        }
    }

    /// The same for a change the driver is to be told of.
    fn change_config<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        self.update_config(|state| (change(state), Change::Announced))
    }

    /// The operator wants `requested` bytes: the driver is told, also when that is what he wanted before.
    pub(super) fn request(&self, requested: u64, now: Instant) {
        self.change_config(|state| {
            state.sizes.request(&self.region, requested);
            state.resize.target_set(now, requested);
        });
        self.news();
    }

    /// The operator wants the driver told again.
    pub(super) fn retry(&self, now: Instant) {
        self.change_config(|state| state.resize.retried(now));
        self.news();
    }

    pub(super) fn guest_stopped(&self, now: Instant) {
        self.lock().resize.guest_stopped(now);
        self.news();
    }

    pub(super) fn guest_runs(&self, now: Instant) {
        self.lock().resize.guest_runs(now);
        self.news();
    }

    /// A driver has started the device; returns what [`driver_gone`](Self::driver_gone) and
    /// [`driver_broke`](Self::driver_broke) name it by.
    pub(super) fn driver_ready(&self, now: Instant) -> u64 {
        let mut state = self.lock();
        state.activation += 1;
        state.resize.driver_ready(now);
        let activation = state.activation;
        drop(state);
        self.news();
        activation
    }

    /// The activation has ended. Of no effect when the next one has begun already.
    pub(super) fn driver_gone(&self, activation: u64, now: Instant) {
        self.driver_changed(activation, |resize| resize.driver_gone(now));
    }

    /// The driver did something the device cannot go on after.
    pub(super) fn driver_broke(&self, activation: u64, now: Instant) {
        self.driver_changed(activation, |resize| resize.driver_broken(now));
    }

    fn driver_changed(&self, activation: u64, change: impl FnOnce(&mut Resize)) {
        let mut state = self.lock();
        if state.activation == activation {
            change(&mut state.resize);
        }
        drop(state);
        self.news();
    }

    /// Takes a request on and says what to do about it.
    pub(super) fn begin(&self, request: Request, now: Instant) -> Judged {
        let mut state = self.lock();
        state.resize.request_begun(now);
        let verdict = verdict::judge(request, &self.region, &state.sizes, |range| {
            self.blocks.block().plugged(range)
        });
        drop(state);
        self.news();
        Judged {
            request,
            verdict,
            began: now,
        }
    }

    /// Whether plugging `range` has become too much since it was judged.
    pub(super) fn exceeds(&self, range: &std::ops::Range<u64>) -> bool {
        verdict::exceeds(range, &self.lock().sizes)
    }

    /// Notes what came of a request. The sizes are right before the driver sees the answer.
    pub(super) fn finish(
        &self,
        judged: &Judged,
        answer: Answer,
        setback: Option<Setback>,
        now: Instant,
    ) {
        let kind = judged.request.kind();
        let range = match &judged.verdict {
            Verdict::Plug(range) | Verdict::Unplug(range) => Some(range.clone()),
            Verdict::UnplugAll | Verdict::Answer(_) => None,
        };
        let emptied = kind == RequestKind::UnplugAll && answer == Answer::Ack;
        let (before, after) = self.update_config(|state| {
            let before = state.sizes.plugged;
            // The usable size may shrink with this, which the driver is to be told (5.15.6.4).
            let shrunk = emptied && state.sizes.emptied(&self.region);
            state.sizes.plugged = self.blocks.block().plugged_bytes();
            let plugged = state.sizes.plugged;
            let answered = Answered {
                kind,
                range,
                answer,
                setback,
                plugged,
            };
            state.resize.request_answered(now, &answered);
            ((before, plugged), noticed(before, plugged, shrunk))
        });
        let bytes = if answer == Answer::Ack {
            before.abs_diff(after)
        } else {
            0
        };
        self.counters.answered(
            kind,
            answer,
            bytes,
            now.saturating_duration_since(judged.began),
        );
        self.size_changed(before, after);
        self.news();
    }

    /// The driver has gone before its request was answered.
    pub(super) fn abandon(&self, judged: &Judged, now: Instant) {
        self.counters.dropped(judged.request.kind());
        let (before, after) = self.update_config(|state| {
            let before = state.sizes.plugged;
            let plugged = self.blocks.block().plugged_bytes();
            state.sizes.plugged = plugged;
            state.resize.request_dropped(now, plugged);
            ((before, plugged), noticed(before, plugged, false))
        });
        self.size_changed(before, after);
        self.news();
    }

    /// A system reset has unplugged what could be unplugged.
    pub(super) fn emptied(&self, now: Instant) {
        let (before, after) = self.change_config(|state| {
            let before = state.sizes.plugged;
            let plugged = self.blocks.block().plugged_bytes();
            if plugged == 0 {
                state.sizes.emptied(&self.region);
            }
            state.sizes.plugged = plugged;
            state.resize.emptied(now, plugged);
            (before, plugged)
        });
        self.size_changed(before, after);
        self.news();
    }

    fn size_changed(&self, before: u64, after: u64) {
        if before != after {
            let event = MemEvent::SizeChanged {
                id: Arc::clone(&self.id),
                plugged_bytes: after,
            };
            self.events.send(event);
        }
    }

    fn news(&self) {
        self.news.send(());
    }

    /// Does what the resize wants done now; returns when to come again.
    pub(super) fn act(&self) -> Option<Instant> {
        loop {
            let mut state = self.lock();
            let Some(action) = state.resize.poll(Instant::now()) else {
                return state.resize.wake_at();
            };
            let sizes = state.sizes;
            drop(state);
            match action {
                Action::Kick => {
                    Counters::count(&self.counters.kicks);
                    if let Some(control) = self.control.get() {
                        control.config_changed();
                    }
                }
                Action::Report(progress) => self.report(progress, sizes),
            }
        }
    }

    fn report(&self, progress: Progress, sizes: Sizes) {
        let id = Arc::clone(&self.id);
        let event = match progress {
            Progress::Working => return,
            Progress::Reached => MemEvent::TargetReached {
                id,
                plugged_bytes: sizes.plugged,
            },
            Progress::Partial(reason) | Progress::Stalled(reason) => {
                Counters::count(&self.counters.stalls);
                tracing::debug!(
                    device = &*id,
                    requested = sizes.requested,
                    plugged = sizes.plugged,
                    "the requested size is not reached: {reason}"
                );
                MemEvent::Stalled {
                    id,
                    requested_bytes: sizes.requested,
                    plugged_bytes: sizes.plugged,
                    partial: matches!(progress, Progress::Partial(_)),
                    reason,
                }
            }
        };
        self.events.send(event);
    }
}

/// What a driver is to notice of its own request: no interrupt for the plugged size, which only the
/// generation tells a driver that is just reading it.
fn noticed(plugged_before: u64, plugged: u64, usable_shrunk: bool) -> Change {
    if usable_shrunk {
        Change::Announced
    } else if plugged_before != plugged {
        Change::Silent
    } else {
        Change::None
    }
}
