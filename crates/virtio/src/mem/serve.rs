// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task that serves the device's queue from DRIVER_OK to the next reset, one request at a time.
//!
//! The task holds a lease of the activation's gate from a kick (or DRIVER_OK) until the queue is empty. A driver that
//! resets the device while its request is worked on gets no answer; the request is given up as soon as that leaves the
//! blocks as they were or as they were to be.

use std::sync::Arc;

use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Local;
use ebbtide_memory::{AccessError, AddressSpace, ReadGuard, Reader};

use super::blocks::Outcome;
use super::metrics::Counters;
use super::request::{Answer, REQUEST_BYTES, RESPONSE_BYTES, Request};
use super::resize::Setback;
use super::shared::{Judged, Shared};
use super::verdict::Verdict;
use crate::control::TransportControl;
use crate::device::ActiveQueue;
use crate::virtq::{Buffers, Chain, QueueError};

/// Everything the queue needs to be served.
pub(super) struct Setup {
    pub device: Arc<Shared>,
    pub activation: u64,
    pub queue: ActiveQueue,
    pub gate: Arc<Gate>,
    pub space: Arc<AddressSpace>,
    pub control: TransportControl,
}

/// Why the queue is not served any further.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("chain {head} is no request: {readable} bytes to read, {writable} to write")]
    Framing {
        head: u16,
        readable: u32,
        writable: u32,
    },
    #[error("chain {head} has a request of an unknown type")]
    UnknownType { head: u16 },
    #[error("chain {head}: {source}")]
    Memory { head: u16, source: AccessError },
}

/// Serves the queue until the gate closes or the driver breaks the rules.
pub(super) async fn serve(local: Local, setup: Setup) {
    let Setup {
        device,
        activation,
        mut queue,
        gate,
        space,
        control,
    } = setup;
    let reader = space.memory().register();
    let service = Service {
        local: local.clone(),
        device: Arc::clone(&device),
        gate: Arc::clone(&gate),
        space,
        reader,
    };
    // Before the first kick: what was made available before DRIVER_OK may come without one.
    let mut entered = gate.enter(Entry::Io);
    while let Some(lease) = entered {
        match service.drain(&mut queue).await {
            Ok(()) => {}
            Err(fault) => {
                if matches!(fault, Fault::Framing { .. } | Fault::UnknownType { .. }) {
                    Counters::count(&device.counters.malformed);
                }
                if let Some(suppressed) = device.complaints.allow() {
                    tracing::warn!(device = &*device.id, suppressed, %fault, "the driver's queue is unusable");
                }
                device.driver_broke(activation, local.now());
                control.needs_reset();
                break;
            }
        }
        drop(lease);
        entered = queue.kicked(&local, &gate).await;
    }
    // A broken driver is there until it resets the device.
    gate.drained().await;
    device.driver_gone(activation, local.now());
}

struct Service {
    local: Local,
    device: Arc<Shared>,
    gate: Arc<Gate>,
    space: Arc<AddressSpace>,
    reader: Reader,
}

/// A request and the place of its answer.
struct Received {
    head: u16,
    request: Request,
    response: Buffers,
}

impl Service {
    /// Answers requests until there are no more.
    async fn drain(&self, queue: &mut ActiveQueue) -> Result<(), Fault> {
        while !self.gate.is_closed() {
            let Some(received) = self.receive(queue)? else {
                break;
            };
            let judged = self.device.begin(received.request, self.local.now());
            let Some((answer, setback)) = self.carry_out(&judged).await else {
                self.device.abandon(&judged, self.local.now());
                break;
            };
            // None: the machine was reset and did not wait for this; the queue lies in the memory of the next guest.
            let Some(right) = queue.interrupt.answer() else {
                self.device.abandon(&judged, self.local.now());
                break;
            };
            self.device
                .finish(&judged, answer, setback, self.local.now());
            self.answer(queue, &received, answer)?;
            drop(right);
            // A driver that always has another request must not keep the thread's other tasks out.
            self.local.yield_now().await;
        }
        Ok(())
    }

    /// The next request; `None` when there is none and a kick will announce the next.
    fn receive(&self, queue: &mut ActiveQueue) -> Result<Option<Received>, Fault> {
        let guard = self.space.read(&self.reader);
        loop {
            if let Some(chain) = queue.queue.pop(&guard)? {
                return self.parse(&guard, chain).map(Some);
            }
            if !queue.queue.enable_kick(&guard)? {
                return Ok(None);
            }
        }
    }

    fn parse(&self, guard: &ReadGuard<'_>, chain: Chain) -> Result<Received, Fault> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let framing = Fault::Framing {
            head,
            readable: readable.total_len(),
            writable: writable.total_len(),
        };
        let memory = |source| Fault::Memory { head, source };
        let (Some(request), Some(response)) = (
            readable.split_front(REQUEST_BYTES),
            writable.split_front(RESPONSE_BYTES),
        ) else {
            return Err(framing);
        };
        let mut bytes = [0; REQUEST_BYTES as usize];
        request.copy_to(guard, &mut bytes).map_err(memory)?;
        let request = Request::parse(&bytes).ok_or(Fault::UnknownType { head })?;
        // Nothing is carried out whose result cannot be told.
        response
            .copy_from(guard, &Answer::Busy.to_bytes())
            .map_err(memory)?;
        Ok(Received {
            head,
            request,
            response,
        })
    }

    /// `None`: the driver has gone, there is nobody to answer.
    async fn carry_out(&self, judged: &Judged) -> Option<(Answer, Option<Setback>)> {
        let blocks = &self.device.blocks;
        let outcome = match &judged.verdict {
            Verdict::Answer(answer) => return Some((*answer, None)),
            Verdict::Plug(range) => {
                let obsolete = || self.device.exceeds(range);
                blocks.plug(&self.local, &self.gate, range, obsolete).await
            }
            Verdict::Unplug(range) => {
                blocks
                    .unplug(&self.local, &self.gate, vec![range.clone()])
                    .await
            }
            Verdict::UnplugAll => {
                let all = super::blocks::plugged_runs(&blocks.block());
                blocks.unplug(&self.local, &self.gate, all).await
            }
        };
        match outcome {
            Outcome::Done => Some((Answer::Ack, None)),
            Outcome::Obsolete => Some((Answer::Nack, None)),
            Outcome::Busy(setback) => Some((Answer::Busy, Some(setback))),
            Outcome::Abandoned => None,
        }
    }

    fn answer(
        &self,
        queue: &mut ActiveQueue,
        received: &Received,
        answer: Answer,
    ) -> Result<(), Fault> {
        let Received { head, response, .. } = received;
        let guard = self.space.read(&self.reader);
        let written = match response.copy_from(&guard, &answer.to_bytes()) {
            Ok(_) => RESPONSE_BYTES,
            // The driver unplugged the memory it wanted the answer in.
            Err(AccessError::Unplugged { .. }) => 0,
            Err(source) => {
                return Err(Fault::Memory {
                    head: *head,
                    source,
                });
            }
        };
        queue.queue.push_used(&guard, *head, written)?;
        queue.notify(&guard)?;
        Ok(())
    }
}
