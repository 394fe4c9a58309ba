// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task of the control queues (virtio 1.3, 5.3.6.2).

use std::sync::Arc;

use ebbtide_gate::Entry;
use ebbtide_iothread::Local;
use ebbtide_memory::{AddressSpace, Reader};

use super::port::{Queues, Served, Turn};
use super::ports::{Counters, Message, Ports};
use crate::device::ActiveQueue;
use crate::removal::rest::Place;
use crate::virtq::{Chain, QueueError};

/// Most messages of one turn, each way: then other tasks of the thread get theirs.
const TURN_MESSAGES: usize = 64;

/// Serves the queues until the gate closes or the driver breaks one.
pub(super) async fn serve(local: Local, served: Served, mut queues: Queues) {
    let mut end = served.gate.drained();
    let mut talk = Talk {
        space: Arc::clone(&served.space),
        reader: served.space.memory().register(),
        ports: Arc::clone(&served.ports),
        held: None,
    };
    let mut broken = false;
    let mut seen = 0;
    loop {
        let turn = match served.gate.enter(Entry::Io) {
            Some(_lease) => talk.turn(&mut queues),
            None => break,
        };
        match turn {
            Ok(Turn::Busy) => local.yield_now().await,
            Ok(Turn::Idle) => {
                let owed = served.ports.outbox.changed(&mut seen);
                if !queues.news(&local, owed, &mut end).await {
                    break;
                }
            }
            Err(fault) => {
                served.broken("for control", &fault);
                broken = true;
                break;
            }
        }
    }
    if !broken {
        let place = Place {
            local: &local,
            space: &talk.space,
            reader: &talk.reader,
        };
        queues.answer_rest(place, None).await;
    }
    // A removal waits for it.
    drop(queues);
    // A driver that broke a queue is there until it resets the device.
    end.await;
    served.ports.driver_gone(served.epoch);
}

struct Talk {
    space: Arc<AddressSpace>,
    reader: Reader,
    ports: Arc<Ports>,
    /// A chain that waits for a message to the driver.
    held: Option<Chain>,
}

impl Talk {
    fn turn(&mut self, queues: &mut Queues) -> Result<Turn, QueueError> {
        let mut busy = false;
        if let Some(queue) = &mut queues.transmit {
            busy |= self.listen(queue)?;
        }
        if let Some(queue) = &mut queues.receive {
            busy |= self.speak(queue)?;
        }
        Ok(if busy { Turn::Busy } else { Turn::Idle })
    }

    /// Hears what the driver says. Whether there may be more.
    fn listen(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        let guard = self.space.read(&self.reader);
        let counters = &self.ports.counters;
        let mut messages = 0;
        while let Some(chain) = queue.queue.pop(&guard)? {
            let mut bytes = [0; Message::BYTES];
            match chain.readable.copy_to(&guard, &mut bytes) {
                Ok(Message::BYTES) if self.ports.hear(Message::parse(&bytes)) => {}
                Ok(_) => Counters::add(&counters.malformed, 1),
                Err(_) => Counters::add(&counters.bad_memory, 1),
            }
            queue.queue.add_used(&guard, chain.head, 0)?;
            messages += 1;
            if messages == TURN_MESSAGES {
                break;
            }
        }
        queue.queue.publish_used(&guard)?;
        queue.notify(&guard)?;
        Ok(messages == TURN_MESSAGES || queue.queue.enable_kick(&guard)?)
    }

    /// Says what the driver is to hear, as far as it has room. Whether there may be more.
    fn speak(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        let guard = self.space.read(&self.reader);
        let counters = &self.ports.counters;
        let mut messages = 0;
        while messages < TURN_MESSAGES && self.ports.owes() {
            let popped = match self.held.take() {
                Some(chain) => Some(chain),
                None => queue.queue.pop(&guard)?,
            };
            let Some(chain) = popped else {
                if queue.queue.enable_kick(&guard)? {
                    continue;
                }
                break;
            };
            messages += 1;
            if chain.writable.total_len() < Message::BYTES as u32 {
                Counters::add(&counters.malformed, 1);
                queue.queue.add_used(&guard, chain.head, 0)?;
                continue;
            }
            // A port may have gone since something was owed.
            let Some(message) = self.ports.next_message() else {
                self.held = Some(chain);
                break;
            };
            // What has no room, the end of a name, is cut off.
            let written = chain.writable.copy_from(&guard, &message);
            let written = written.unwrap_or_else(|_| {
                Counters::add(&counters.bad_memory, 1);
                0
            });
            let written = u32::try_from(written).unwrap_or(0);
            queue.queue.add_used(&guard, chain.head, written)?;
        }
        queue.queue.publish_used(&guard)?;
        queue.notify(&guard)?;
        Ok(messages == TURN_MESSAGES)
    }
}
