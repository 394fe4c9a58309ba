// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event queue (virtio 1.3, 5.6.6.3): units come and go, capacities change.
//!
//! Buffers stay in the ring until there is something to say. What happens while there are none waits for some; when too
//! much waits, the rest is lost and the driver is told that something was.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};

use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Local;
use ebbtide_memory::{AccessError, ReadGuard};

use super::request::Event;
use super::shared::Shared;
use crate::device::ActiveQueue;
use crate::service::Setup;
use crate::sync::{Mutex, lock};
use crate::virtq::QueueError;

/// How many events wait for buffers at most.
const PENDING_MAX: usize = 64;

/// What the driver has not been told yet. It outlives activations.
#[derive(Default)]
pub(super) struct Events(Mutex<State>);

#[derive(Default)]
struct State {
    /// The driver wants to hear of units.
    hotplug: bool,
    /// The driver wants to hear of capacities.
    change: bool,
    pending: VecDeque<Event>,
    missed: bool,
    waker: Option<Waker>,
}

impl Events {
    /// A driver begins: it looks at everything there is, so what was before is no news.
    pub(super) fn start(&self, hotplug: bool, change: bool) {
        *lock(&self.0) = State {
            hotplug,
            change,
            ..State::default()
        };
    }

    /// Tells the driver, if it wants to hear of such things.
    pub(super) fn push(&self, event: Event) {
        let mut state = lock(&self.0);
        let wanted = match event {
            Event::Added(_) | Event::Removed(_) => state.hotplug,
            Event::CapacityChanged(_) => state.change,
        };
        if !wanted {
            return;
        }
        if state.pending.len() < PENDING_MAX {
            state.pending.push_back(event);
        } else {
            state.missed = true;
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next one, and whether others were lost.
    fn take(&self) -> Option<(Event, bool)> {
        let mut state = lock(&self.0);
        let event = state.pending.pop_front()?;
        Some((event, std::mem::take(&mut state.missed)))
    }

    fn is_empty(&self) -> bool {
        lock(&self.0).pending.is_empty()
    }

    fn poll_news(&self, waker: &Waker) -> Poll<()> {
        let mut state = lock(&self.0);
        if !state.pending.is_empty() {
            return Poll::Ready(());
        }
        state.waker = Some(waker.clone());
        Poll::Pending
    }
}

/// Why the queue is not served any further.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("chain {head}: event: {source}")]
    Memory { head: u16, source: AccessError },
}

/// Serves the event queue until the gate closes or the driver breaks the queue.
pub(super) async fn serve(local: Local, setup: Setup, shared: Arc<Shared>) {
    let events = &shared.events;
    let Setup {
        name,
        mut queue,
        gate,
        space,
        control,
        complaints,
    } = setup;
    let reader = space.memory().register();
    while let Some(lease) = gate.enter(Entry::Io) {
        let delivered = deliver(&mut queue, &space.read(&reader), events);
        drop(lease);
        let left = match delivered {
            Ok(left) => left,
            Err(fault) => {
                shared.counters.broken();
                if let Some(_lease) = gate.enter(Entry::Io) {
                    if let Some(suppressed) = complaints.allow() {
                        tracing::warn!(device = &*name, queue = queue.index, suppressed, %fault, "the driver's queue is unusable");
                    }
                    control.needs_reset();
                }
                return;
            }
        };
        if !news(&local, &mut queue, &gate, events, left).await {
            return;
        }
    }
}

/// Writes what there is into the buffers there are. True: something is left for which there is none.
fn deliver(queue: &mut ActiveQueue, guard: &ReadGuard<'_>, events: &Events) -> Result<bool, Fault> {
    let mut left = false;
    while !events.is_empty() {
        let Some(chain) = queue.queue.pop(guard)? else {
            if queue.queue.enable_kick(guard)? {
                continue;
            }
            left = true;
            break;
        };
        let Some((event, missed)) = events.take() else {
            break;
        };
        let written = match chain.writable.copy_from(guard, &event.to_bytes(missed)) {
            Ok(written) => u32::try_from(written).unwrap_or(0),
            // The guest gave the memory of its buffer back: this event is lost to it.
            Err(AccessError::Unplugged { .. }) => 0,
            Err(source) => {
                let head = chain.head;
                return Err(Fault::Memory { head, source });
            }
        };
        queue.queue.push_used(guard, chain.head, written)?;
    }
    queue.notify(guard)?;
    Ok(left)
}

/// Waits for an event or, when one is `left`, for buffers; false at the end of the activation.
async fn news(
    local: &Local,
    queue: &mut ActiveQueue,
    gate: &Arc<Gate>,
    events: &Events,
    left: bool,
) -> bool {
    let mut drained = pin!(gate.drained());
    let mut kicked = pin!(queue.kick.wait(local));
    poll_fn(|cx| {
        if drained.as_mut().poll(cx).is_ready() {
            return Poll::Ready(false);
        }
        if !left && events.poll_news(cx.waker()).is_ready() {
            return Poll::Ready(true);
        }
        kicked.as_mut().poll(cx).map(|kicked| kicked.is_ok())
    })
    .await
}
