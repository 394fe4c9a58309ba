// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task of the transmit queue: a chain is a header and a frame, copied out and handed to the backend.
//!
//! ```text
//!   ┌──▶ turn: flush, then chains one by one while the backend keeps nothing
//!   │       │            (a lease for each turn, none between them)
//!   └── wait for a kick, or for room in the backend
//! ```
//!
//! When the device is removed under its driver, frames that are not sent are dropped and given back.
//!
//! A frame is answered when the backend has taken it: sent, or kept, one at most. Frames behind it stay in the queue.

use std::io;
use std::sync::Arc;

use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Local;
use ebbtide_memory::{AddressSpace, ReadGuard, Reader};
use ebbtide_net::{HEADER_BYTES, PACKET_BYTES_MAX, is_of_peer};

use super::header;
use super::metrics::{count, count_frame};
use super::shared::{Served, Shared, broken};
use crate::device::ActiveQueue;
use crate::removal::rest::{Place, refuse_rest};
use crate::select;
use crate::virtq::{Chain, QueueError};

/// Most frames of one turn: then other tasks of the thread get theirs.
const TURN_FRAMES: usize = 64;
/// The shortest frame: an Ethernet header.
const FRAME_BYTES_MIN: usize = 14;

/// What is to be done after a turn.
enum Turn {
    /// Look again as soon as others had their turn.
    Busy,
    /// Sleep: the driver kicks for the next chain.
    Idle,
    /// Wait for room in the backend.
    Full,
}

/// Serves the queue until the gate closes or the driver breaks the queue.
pub(super) async fn serve(local: Local, served: Served) {
    let Served {
        shared,
        mut queue,
        features,
        gate,
        space,
        control,
    } = served;
    let mut transmit = Transmit {
        reader: space.memory().register(),
        space,
        shared,
        features,
        packet: Vec::new(),
    };
    let mut end = gate.drained();
    loop {
        match transmit.entered_turn(&gate, &mut queue) {
            None => break,
            Some(Ok(Turn::Busy)) => local.yield_now().await,
            Some(Ok(Turn::Idle)) => match queue.kicked(&local, &gate).await {
                Some(_lease) => {}
                None => break,
            },
            Some(Ok(Turn::Full)) => {
                let room = local.writable(transmit.shared.claim.fd());
                let end = queue.removed.ended(&mut end);
                // An error of the wait is one of the executor, which is stopping.
                let Some(Ok(())) = select::first(room, end).await else {
                    break;
                };
            }
            Some(Err(fault)) => {
                broken(&transmit.shared, &gate, &control, queue.index, &fault);
                return;
            }
        }
    }
    let place = Place {
        local: &local,
        space: &transmit.space,
        reader: &transmit.reader,
    };
    let counters = &transmit.shared.counters;
    let drop_frame = |_: &ReadGuard<'_>, _: &Chain| {
        count(&counters.link_down);
        0
    };
    // A driver that breaks the queue now is not told: its device is on its way out.
    let _ = refuse_rest(place, &mut queue, None, drop_frame).await;
}

struct Transmit {
    shared: Arc<Shared>,
    space: Arc<AddressSpace>,
    reader: Reader,
    features: u64,
    /// The packet in work; kept for its memory.
    packet: Vec<u8>,
}

impl Transmit {
    /// `None`: the gate is closed.
    fn entered_turn(
        &mut self,
        gate: &Arc<Gate>,
        queue: &mut ActiveQueue,
    ) -> Option<Result<Turn, QueueError>> {
        let _lease = gate.enter(Entry::Io)?;
        Some(self.turn(queue))
    }

    fn turn(&mut self, queue: &mut ActiveQueue) -> Result<Turn, QueueError> {
        let mut frames = 0;
        let turn = loop {
            if !self.has_room() {
                break Turn::Full;
            }
            if frames == TURN_FRAMES {
                break Turn::Busy;
            }
            let Some(head) = self.next(queue)? else {
                break Turn::Idle;
            };
            frames += 1;
            self.send();
            queue
                .queue
                .add_used(&self.space.read(&self.reader), head, 0)?;
        };
        let guard = self.space.read(&self.reader);
        if frames > 0 {
            queue.queue.publish_used(&guard)?;
            queue.notify(&guard)?;
        }
        match turn {
            Turn::Idle if queue.queue.enable_kick(&guard)? => Ok(Turn::Busy),
            Turn::Idle => Ok(Turn::Idle),
            other => {
                queue.queue.disable_kick(&guard)?;
                Ok(other)
            }
        }
    }

    /// Whether the backend keeps nothing, or nothing any more.
    fn has_room(&self) -> bool {
        match self.shared.claim.flush() {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                self.refused(&error);
                true
            }
        }
    }

    /// Takes the next chain and copies its packet, or nothing if it has none; the chain's head.
    fn next(&mut self, queue: &mut ActiveQueue) -> Result<Option<u16>, QueueError> {
        let guard = self.space.read(&self.reader);
        let Some(Chain { head, readable, .. }) = queue.queue.pop(&guard)? else {
            return Ok(None);
        };
        self.packet.clear();
        let len = usize::try_from(readable.total_len()).unwrap_or(usize::MAX);
        if !(HEADER_BYTES + FRAME_BYTES_MIN..=PACKET_BYTES_MAX).contains(&len) {
            count(&self.shared.counters.malformed);
            return Ok(Some(head));
        }
        self.packet.resize(len, 0);
        if readable.copy_to(&guard, &mut self.packet).is_err() {
            count(&self.shared.counters.bad_memory);
            self.packet.clear();
        }
        Ok(Some(head))
    }

    /// Sends the packet in work, if there is one.
    fn send(&mut self) {
        let counters = &self.shared.counters;
        if self.packet.is_empty() {
            return;
        }
        if !self.shared.link_is_up() {
            count(&counters.link_down);
            return;
        }
        if !header::admit_sent(self.features, &mut self.packet) {
            count(&counters.malformed);
            return;
        }
        match self.shared.claim.send(&self.packet) {
            Ok(()) => count_frame(&counters.sent, &counters.sent_bytes, self.packet.len()),
            Err(error) => self.refused(&error),
        }
    }

    /// The receive queue may wait for chains and not notice that the peer is gone.
    fn refused(&self, error: &io::Error) {
        count(&self.shared.counters.refused);
        if is_of_peer(error) {
            self.shared.peer_is_gone(error);
        }
    }
}
