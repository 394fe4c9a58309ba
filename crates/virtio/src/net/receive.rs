// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task of the receive queue: packets of the backend into chains of the driver.
//!
//! ```text
//!   ┌──▶ turn: packet ──▶ filter ──▶ chains (a lease for each turn, none between them)
//!   │       ├── no packet: wait for one
//!   │       └── no room for it: it stays here, wait for a kick
//!   └───────┘
//! ```
//!
//! Chains that were taken and wait for packets are held as addresses, without lease or pins. While a packet waits for
//! chains no other is taken from the backend, so that the backend and not the guest's memory decides what is lost.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Local;
use ebbtide_memory::{AddressSpace, ReadGuard, Reader};
use ebbtide_net::{HEADER_BYTES, PACKET_BYTES_MAX};

use super::feature::MRG_RXBUF;
use super::header;
use super::metrics::{count, count_frame};
use super::shared::{Served, Shared, broken};
use crate::device::ActiveQueue;
use crate::select;
use crate::virtq::{Chain, QueueError};

/// Most packets of one turn: then other tasks of the thread get theirs.
const TURN_PACKETS: usize = 64;

/// What is to be done after a turn.
enum Turn {
    /// Look again as soon as others had their turn.
    Busy,
    /// Wait for a packet.
    NoPacket,
    /// Wait for the driver to make chains available.
    NoChain,
    /// The backend has lost its peer.
    Gone(io::Error),
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
    let mut receive = Receive {
        reader: space.memory().register(),
        space,
        shared,
        features,
        packet: vec![0; PACKET_BYTES_MAX].into(),
        waiting: None,
        held: VecDeque::new(),
    };
    let mut end = gate.drained();
    if !receive.set_offloads(&gate) {
        return;
    }
    loop {
        match receive.entered_turn(&gate, &mut queue) {
            None => break,
            Some(Ok(Turn::Busy)) => local.yield_now().await,
            Some(Ok(Turn::NoPacket)) => {
                let packet = local.readable(receive.shared.claim.fd());
                // An error of the wait is one of the executor, which is stopping.
                let Some(Ok(())) = select::first(packet, &mut end).await else {
                    break;
                };
            }
            Some(Ok(Turn::NoChain)) => match queue.kicked(&local, &gate).await {
                Some(_lease) => {}
                None => break,
            },
            Some(Ok(Turn::Gone(why))) => {
                receive.shared.peer_is_gone(&why);
                break;
            }
            Some(Err(fault)) => {
                broken(&receive.shared, &gate, &control, queue.index, &fault);
                break;
            }
        }
    }
}

struct Receive {
    shared: Arc<Shared>,
    space: Arc<AddressSpace>,
    reader: Reader,
    features: u64,
    packet: Box<[u8]>,
    /// Length of a packet that waits for chains.
    waiting: Option<usize>,
    /// Chains that wait for packets, in the order of the queue.
    held: VecDeque<Chain>,
}

impl Receive {
    /// False: the gate is closed, or the backend is gone.
    fn set_offloads(&self, gate: &Arc<Gate>) -> bool {
        let Some(_lease) = gate.enter(Entry::Io) else {
            return false;
        };
        let offloads = header::offloads(self.features);
        match self.shared.claim.set_offloads(offloads) {
            Ok(()) => true,
            Err(why) => {
                self.shared.peer_is_gone(&why);
                false
            }
        }
    }

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
        let mut packets = 0;
        let turn = loop {
            if packets == TURN_PACKETS {
                break Turn::Busy;
            }
            packets += 1;
            if self.waiting.is_none() {
                match self.shared.claim.receive(&mut self.packet) {
                    Ok(len) => self.waiting = self.admit(len),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        break Turn::NoPacket;
                    }
                    Err(error) => break Turn::Gone(error),
                }
            }
            if let Some(len) = self.waiting {
                if !self.deliver(queue, len)? {
                    break Turn::NoChain;
                }
                self.waiting = None;
            }
        };
        let guard = self.space.read(&self.reader);
        queue.queue.publish_used(&guard)?;
        queue.notify(&guard)?;
        if !matches!(turn, Turn::NoChain) {
            queue.queue.disable_kick(&guard)?;
        }
        Ok(turn)
    }

    /// The packet's length if the driver is to have it.
    fn admit(&mut self, len: usize) -> Option<usize> {
        let counters = &self.shared.counters;
        let packet = self.packet.get_mut(..len)?;
        if !self.shared.link_is_up() {
            count(&counters.link_down);
            return None;
        }
        let frame = packet.get(HEADER_BYTES..).unwrap_or_default();
        if !self.shared.filter().takes(frame) {
            count(&counters.filtered);
            return None;
        }
        if !header::admits_received(self.features, packet) {
            count(&counters.unfit);
            return None;
        }
        Some(len)
    }

    /// Gives the driver the packet, or drops it for good. False: there are too few chains for now, and a kick will
    /// announce more.
    fn deliver(&mut self, queue: &mut ActiveQueue, len: usize) -> Result<bool, QueueError> {
        let guard = self.space.read(&self.reader);
        let merge = self.features & MRG_RXBUF != 0;
        let mut chains = 0;
        let mut room = 0_usize;
        while room < len {
            if chains == 1 && !merge {
                count(&self.shared.counters.unfit);
                return Ok(true);
            }
            if chains == self.held.len() && !hold_next(&mut self.held, queue, &guard, &self.shared)?
            {
                // With all the chains there can be, there will never be room enough.
                let all = chains >= usize::from(queue.queue.config().size);
                if all {
                    count(&self.shared.counters.unfit);
                }
                return Ok(all);
            }
            let chain = self.held.get(chains);
            room = room.saturating_add(chain.map_or(0, capacity));
            chains += 1;
        }
        drop(guard);
        self.write(queue, len, chains)?;
        Ok(true)
    }

    /// Writes the packet to the first `chains` held, which have room for it.
    fn write(
        &mut self,
        queue: &mut ActiveQueue,
        len: usize,
        chains: usize,
    ) -> Result<(), QueueError> {
        let guard = self.space.read(&self.reader);
        header::write_num_buffers(&mut self.packet, u16::try_from(chains).unwrap_or(u16::MAX));
        let mut rest = self.packet.get(..len).unwrap_or_default();
        let mut good = true;
        for chain in self.held.iter().take(chains) {
            let (here, behind) = rest.split_at(capacity(chain).min(rest.len()));
            good &= chain.writable.copy_from(&guard, here).is_ok();
            rest = behind;
        }
        let counters = &self.shared.counters;
        if good {
            count_frame(&counters.received, &counters.received_bytes, len);
        } else {
            count(&counters.bad_memory);
        }
        let mut rest = if good { len } else { 0 };
        for chain in self.held.drain(..chains) {
            let here = capacity(&chain).min(rest);
            rest -= here;
            let written = u32::try_from(here).unwrap_or(u32::MAX);
            queue.queue.add_used(&guard, chain.head, written)?;
        }
        Ok(())
    }
}

/// Takes one more chain that has room for a header; others go back at once (5.1.6.3.1). False: there is none, and a kick
/// will announce the next.
fn hold_next(
    held: &mut VecDeque<Chain>,
    queue: &mut ActiveQueue,
    guard: &ReadGuard<'_>,
    shared: &Shared,
) -> Result<bool, QueueError> {
    loop {
        match queue.queue.pop(guard)? {
            Some(chain) if capacity(&chain) >= HEADER_BYTES => {
                held.push_back(chain);
                return Ok(true);
            }
            Some(chain) => {
                count(&shared.counters.malformed);
                queue.queue.add_used(guard, chain.head, 0)?;
            }
            None if queue.queue.enable_kick(guard)? => {}
            None => return Ok(false),
        }
    }
}

fn capacity(chain: &Chain) -> usize {
    usize::try_from(chain.writable.total_len()).unwrap_or(usize::MAX)
}
