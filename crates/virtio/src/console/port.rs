// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task of one port: bytes from its transmit queue to the wire, and from the wire to its receive queue.
//!
//! ```text
//!   ┌──▶ turn (under a lease): send what the wire takes, receive what it has and the driver has room for
//!   └── wait for a kick, the wire, or another port (no lease)
//! ```
//!
//! A chain the wire took only a part of is held with the rest of its addresses, and goes on when there is room.
//! When the device is removed under its driver, that chain and those behind it are given back as they are.

use std::future::{Future, pending};
use std::sync::Arc;

use ebbtide_devices::chardev::Wire;
use ebbtide_gate::{Drained, Entry, Gate};
use ebbtide_iothread::{Event, Local, race};
use ebbtide_memory::{AddressSpace, ReadGuard, Reader};

use super::ports::{Counters, Ports, Slot};
use crate::control::TransportControl;
use crate::device::ActiveQueue;
use crate::removal::rest::{Place, refuse_rest};
use crate::select;
use crate::virtq::{Chain, QueueError};

/// Bytes moved at once.
const PIECE_BYTES: usize = 4096;
/// Most pieces of one turn, each way: then other tasks of the thread get theirs.
const TURN_PIECES: usize = 16;

/// What every task of an activation gets.
#[derive(Clone)]
pub(super) struct Served {
    pub ports: Arc<Ports>,
    pub epoch: u64,
    pub gate: Arc<Gate>,
    pub space: Arc<AddressSpace>,
    pub control: TransportControl,
}

/// The queues of a port, or those for control, as far as the driver enabled them.
pub(super) struct Queues {
    pub receive: Option<ActiveQueue>,
    pub transmit: Option<ActiveQueue>,
}

impl Queues {
    /// A removal is to wait until what the driver has sent is answered: Linux waits for a console's output and for its own
    /// messages with a spin lock held. Nobody waits for a buffer to be received into.
    pub(super) fn listen(&self) {
        if let Some(queue) = &self.transmit {
            queue.removed.listen();
        }
    }

    /// Waits for a kick of either, or for `other`. False: the gate has `drained`, or the device is removed.
    pub(super) async fn news<T>(
        &mut self,
        local: &Local,
        other: impl Future<Output = T>,
        drained: &mut Drained,
    ) -> bool {
        let receive = self.receive.as_mut().map(|it| (&mut it.kick, it.index));
        let (transmit, removed) = match &mut self.transmit {
            Some(it) => (Some((&mut it.kick, it.index)), Some(&it.removed)),
            None => (None, None),
        };
        let kicked = race(kicked(receive, local), kicked(transmit, local));
        let end = async {
            match removed {
                Some(removed) => removed.ended(drained).await,
                None => drained.await,
            }
        };
        select::first(race(other, kicked), end).await.is_some()
    }

    /// Gives back what the driver has sent, if the device is being removed; `held` is a chain taken before.
    pub(super) async fn answer_rest(&mut self, place: Place<'_>, held: Option<Chain>) {
        if let Some(queue) = &mut self.transmit {
            // A driver that breaks the queue now is not told: its device is on its way out.
            let _ = refuse_rest(place, queue, held, |_, _| 0).await;
        }
    }
}

async fn kicked(queue: Option<(&mut Event, u16)>, local: &Local) {
    match queue {
        Some((kick, queue)) => {
            if let Err(error) = kick.wait(local).await {
                tracing::error!(queue, %error, "waiting for a kick failed");
                pending::<()>().await;
            }
        }
        None => pending().await,
    }
}

impl Served {
    /// The driver broke a queue: it is told, unless its activation is over.
    pub(super) fn broken(&self, queues: &str, fault: &dyn std::fmt::Display) {
        let Some(_lease) = self.gate.enter(Entry::Io) else {
            return;
        };
        if let Some(suppressed) = self.ports.complaints.allow() {
            tracing::warn!(device = self.ports.name(), queues, suppressed, %fault, "the driver's queue is unusable");
        }
        self.control.needs_reset();
    }
}

/// What is to be done after a turn.
pub(super) enum Turn {
    /// Look again as soon as others had their turn.
    Busy,
    /// Wait for news.
    Idle,
}

/// Serves port `number` until the gate closes or the driver breaks a queue. Without `multiport` a driver neither opens
/// nor closes ports.
pub(super) async fn serve(
    local: Local,
    served: Served,
    mut queues: Queues,
    number: u32,
    multiport: bool,
) {
    let mut end = served.gate.drained();
    let Some(slot) = served.ports.slot(number) else {
        return;
    };
    let mut pump = Pump {
        space: &served.space,
        reader: served.space.memory().register(),
        counters: &served.ports.counters,
        slot,
        multiport,
        sending: None,
        held: None,
    };
    let mut broken = false;
    let mut seen = 0;
    let mut watched = Watched::default();
    loop {
        let turn = match served.gate.enter(Entry::Io) {
            Some(_lease) => pump.turn(&mut queues),
            None => break,
        };
        match turn {
            Ok(Turn::Busy) => local.yield_now().await,
            Ok(Turn::Idle) => {
                watched.follow(slot.wire());
                slot.update_host_open(&served.ports.outbox);
                let news = race(slot.changed.changed(&mut seen), watched.changed());
                if !queues.news(&local, news, &mut end).await {
                    break;
                }
            }
            Err(fault) => {
                served.broken(&format!("of port {number}"), &fault);
                broken = true;
                break;
            }
        }
    }
    if !broken {
        let Pump {
            reader, sending, ..
        } = pump;
        let place = Place {
            local: &local,
            space: &served.space,
            reader: &reader,
        };
        queues.answer_rest(place, sending).await;
    }
    // A removal waits for it.
    drop(queues);
    // A driver that broke a queue is there until it resets the device.
    end.await;
    served.ports.driver_gone(served.epoch);
}

/// The wire whose changes are waited for.
#[derive(Default)]
struct Watched {
    wire: Option<Arc<Wire>>,
    seen: u64,
}

impl Watched {
    /// Another wire has changes that were not seen.
    fn follow(&mut self, wire: Option<Arc<Wire>>) {
        let same = match (&self.wire, &wire) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if !same {
            *self = Watched { wire, seen: 0 };
        }
    }

    async fn changed(&mut self) {
        match &self.wire {
            Some(wire) => wire.changes().changed(&mut self.seen).await,
            None => pending().await,
        }
    }
}

/// Moves bytes.
struct Pump<'a> {
    space: &'a Arc<AddressSpace>,
    reader: Reader,
    counters: &'a Counters,
    slot: &'a Slot,
    multiport: bool,
    /// A chain to send of which the wire took only a part; the rest of it.
    sending: Option<Chain>,
    /// A chain that waits for bytes from the wire.
    held: Option<Chain>,
}

/// What became of a piece of a chain.
enum Sent {
    /// It was the last, and the wire took it.
    All,
    /// The wire took it, and there is more.
    Piece,
    /// The wire is full.
    Full,
}

impl Pump<'_> {
    fn turn(&mut self, queues: &mut Queues) -> Result<Turn, QueueError> {
        let mut busy = false;
        if let Some(queue) = &mut queues.transmit {
            busy |= self.send(queue)?;
        }
        if let Some(queue) = &mut queues.receive {
            busy |= self.receive(queue)?;
        }
        Ok(if busy { Turn::Busy } else { Turn::Idle })
    }

    /// Whether there is more to send that the wire may take.
    fn send(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        let guard = self.space.read(&self.reader);
        let mut more = true;
        for _ in 0..TURN_PIECES {
            let Some(mut chain) = next(&mut self.sending, queue, &guard)? else {
                more = false;
                break;
            };
            match self.send_piece(&guard, &mut chain) {
                Sent::All => queue.queue.add_used(&guard, chain.head, 0)?,
                Sent::Piece => self.sending = Some(chain),
                Sent::Full => {
                    self.sending = Some(chain);
                    more = false;
                    break;
                }
            }
        }
        queue.queue.publish_used(&guard)?;
        queue.notify(&guard)?;
        Ok(more)
    }

    /// Sends the first bytes of a chain and takes them off it.
    fn send_piece(&self, guard: &ReadGuard<'_>, chain: &mut Chain) -> Sent {
        let mut piece = [0; PIECE_BYTES];
        let Ok(count) = chain.readable.copy_to(guard, &mut piece) else {
            Counters::add(&self.counters.bad_memory, 1);
            return Sent::All;
        };
        let taken = self.slot.offer(piece.get(..count).unwrap_or_default());
        Counters::add(&self.counters.sent_bytes, taken);
        // As many were there.
        let _ = chain
            .readable
            .split_front(u32::try_from(taken).unwrap_or(0));
        if chain.readable.total_len() == 0 {
            Sent::All
        } else if taken < count {
            Sent::Full
        } else {
            Sent::Piece
        }
    }

    /// Whether there is more to receive that the driver may have room for.
    fn receive(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        let guard = self.space.read(&self.reader);
        let mut piece = [0; PIECE_BYTES];
        let mut more = true;
        for _ in 0..TURN_PIECES {
            let Some(chain) = next(&mut self.held, queue, &guard)? else {
                more = false;
                break;
            };
            let room = usize::try_from(chain.writable.total_len()).unwrap_or(usize::MAX);
            let piece = piece.get_mut(..room.min(PIECE_BYTES)).unwrap_or_default();
            let count = self.slot.get(piece, self.multiport);
            if count == 0 && room > 0 {
                self.held = Some(chain);
                more = false;
                break;
            }
            let bytes = piece.get(..count).unwrap_or_default();
            let written = chain.writable.copy_from(&guard, bytes).unwrap_or_else(|_| {
                Counters::add(&self.counters.bad_memory, 1);
                0
            });
            Counters::add(&self.counters.received_bytes, written);
            let written = u32::try_from(written).unwrap_or(0);
            queue.queue.add_used(&guard, chain.head, written)?;
        }
        queue.queue.publish_used(&guard)?;
        queue.notify(&guard)?;
        Ok(more)
    }
}

/// The chain that is held, or else the next of the queue; `None`: a kick will announce it.
fn next(
    held: &mut Option<Chain>,
    queue: &mut ActiveQueue,
    guard: &ReadGuard<'_>,
) -> Result<Option<Chain>, QueueError> {
    if let Some(chain) = held.take() {
        return Ok(Some(chain));
    }
    loop {
        if let Some(chain) = queue.queue.pop(guard)? {
            return Ok(Some(chain));
        }
        if !queue.queue.enable_kick(guard)? {
            return Ok(None);
        }
    }
}
