// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task of the control queue (virtio 1.3, 5.1.6.5): what the driver wants to receive.

use std::sync::Arc;

use ebbtide_gate::Entry;
use ebbtide_iothread::Local;
use ebbtide_memory::{AccessError, AddressSpace, ReadGuard, Reader};
use ebbtide_net::MacAddress;

use super::feature::{
    CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, GUEST_OFFLOADS,
};
use super::filter::{Switch, Table};
use super::header;
use super::metrics::count;
use super::shared::{Served, Shared, broken};
use crate::control::{Change, TransportControl};
use crate::device::ActiveQueue;
use crate::removal::rest::{Place, refuse_rest};
use crate::virtq::{Chain, QueueError};

/// `ack`: it is done.
const OK: u8 = 0;
/// `ack`: it is not.
const ERR: u8 = 1;
/// The longest command: room for two tables of some thousand addresses.
const COMMAND_BYTES_MAX: u32 = 64 << 10;

/// Why the queue is not served any further.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("chain {head} has no room for an answer")]
    NoAnswer { head: u16 },
    #[error("chain {head}: answer: {source}")]
    AnswerMemory { head: u16, source: AccessError },
}

/// A command that is not carried out.
#[derive(Debug, PartialEq, Eq)]
struct Refused;

/// Serves the queue until the gate closes or the driver breaks the queue. Commands that come while the device is removed
/// fail: a driver waits for each, and holds up everything that wants to change a network interface meanwhile.
pub(super) async fn serve(local: Local, served: Served) {
    let Served {
        shared,
        mut queue,
        features,
        gate,
        space,
        control,
    } = served;
    let commands = Commands {
        reader: space.memory().register(),
        space,
        shared,
        features,
        control,
    };
    // Before the first kick: what was made available before DRIVER_OK may come without one.
    let mut entered = gate.enter(Entry::Io);
    while let Some(lease) = entered {
        let answered = commands.answer_next(&mut queue);
        drop(lease);
        entered = match answered {
            Ok(true) => {
                // A driver that always has another command must not keep the thread's other tasks out.
                local.yield_now().await;
                gate.enter(Entry::Io)
            }
            Ok(false) => queue.kicked(&local, &gate).await,
            Err(fault) => {
                broken(
                    &commands.shared,
                    &gate,
                    &commands.control,
                    queue.index,
                    &fault,
                );
                return;
            }
        };
    }
    let place = Place {
        local: &local,
        space: &commands.space,
        reader: &commands.reader,
    };
    let fail = |guard: &ReadGuard<'_>, chain: &Chain| {
        count(&commands.shared.counters.failed_commands);
        u32::from(chain.writable.copy_from(guard, &[ERR]).is_ok())
    };
    // A driver that breaks the queue now is not told: its device is on its way out.
    let _ = refuse_rest(place, &mut queue, None, fail).await;
}

struct Commands {
    shared: Arc<Shared>,
    space: Arc<AddressSpace>,
    reader: Reader,
    features: u64,
    control: TransportControl,
}

/// A chain and what it says, if that can be read.
struct Received {
    chain: Chain,
    command: Option<Vec<u8>>,
}

impl Commands {
    /// False: there is no command, and a kick will announce the next.
    fn answer_next(&self, queue: &mut ActiveQueue) -> Result<bool, Fault> {
        let Some(Received { chain, command }) = self.receive(queue)? else {
            return Ok(false);
        };
        let done = command.is_some_and(|command| self.carry_out(&command).is_ok());
        let counters = &self.shared.counters;
        count(if done {
            &counters.commands
        } else {
            &counters.failed_commands
        });
        let guard = self.space.read(&self.reader);
        let ack = if done { OK } else { ERR };
        let written = match chain.writable.copy_from(&guard, &[ack]) {
            Ok(_) => 1,
            // The guest has just given this memory back: it cannot expect an answer there.
            Err(AccessError::Unplugged { .. }) => 0,
            Err(source) => {
                let head = chain.head;
                return Err(Fault::AnswerMemory { head, source });
            }
        };
        queue.queue.push_used(&guard, chain.head, written)?;
        queue.notify(&guard)?;
        Ok(true)
    }

    /// `None`: there is none, and a kick will announce the next.
    fn receive(&self, queue: &mut ActiveQueue) -> Result<Option<Received>, Fault> {
        let guard = self.space.read(&self.reader);
        loop {
            if let Some(chain) = queue.queue.pop(&guard)? {
                if chain.writable.total_len() == 0 {
                    return Err(Fault::NoAnswer { head: chain.head });
                }
                let command = read(&guard, &chain);
                return Ok(Some(Received { chain, command }));
            }
            if !queue.queue.enable_kick(&guard)? {
                return Ok(None);
            }
        }
    }

    fn carry_out(&self, command: &[u8]) -> Result<(), Refused> {
        let [class, command, data @ ..] = command else {
            return Err(Refused);
        };
        match (class, command) {
            (0, number) => self.switch(*number, data),
            (1, 0) => self.set_tables(data),
            (1, 1) => self.set_mac(data),
            (2, 0) => self.set_vlan(data, true),
            (2, 1) => self.set_vlan(data, false),
            (5, 0) => self.set_offloads(data),
            _ => Err(Refused),
        }
    }

    fn needs(&self, feature: u64) -> Result<(), Refused> {
        if self.features & feature != 0 {
            Ok(())
        } else {
            Err(Refused)
        }
    }

    /// VIRTIO_NET_CTRL_RX (5.1.6.5.1).
    fn switch(&self, number: u8, data: &[u8]) -> Result<(), Refused> {
        let (what, feature) = match number {
            0 => (Switch::Promiscuous, CTRL_RX),
            1 => (Switch::AllMulticast, CTRL_RX),
            2 => (Switch::AllUnicast, CTRL_RX_EXTRA),
            3 => (Switch::NoMulticast, CTRL_RX_EXTRA),
            4 => (Switch::NoUnicast, CTRL_RX_EXTRA),
            5 => (Switch::NoBroadcast, CTRL_RX_EXTRA),
            _ => return Err(Refused),
        };
        self.needs(feature)?;
        let &[on] = data else {
            return Err(Refused);
        };
        self.shared.filter().switch(what, on != 0);
        Ok(())
    }

    /// VIRTIO_NET_CTRL_MAC_TABLE_SET (5.1.6.5.2): the unicast addresses, then the multicast ones.
    fn set_tables(&self, data: &[u8]) -> Result<(), Refused> {
        self.needs(CTRL_RX)?;
        let (unicast, rest) = table(data).ok_or(Refused)?;
        let (multicast, rest) = table(rest).ok_or(Refused)?;
        if !rest.is_empty() {
            return Err(Refused);
        }
        self.shared.filter().set_tables(unicast, multicast);
        Ok(())
    }

    /// VIRTIO_NET_CTRL_MAC_ADDR_SET: the configuration shows it before the command is answered (5.1.6.5.2.1).
    fn set_mac(&self, data: &[u8]) -> Result<(), Refused> {
        self.needs(CTRL_MAC_ADDR)?;
        let mac = MacAddress(data.try_into().map_err(|_| Refused)?);
        if mac.is_group() {
            return Err(Refused);
        }
        self.control.update_config(|| {
            self.shared.filter().set_mac(mac);
            ((), Change::Silent)
        });
        Ok(())
    }

    /// VIRTIO_NET_CTRL_VLAN (5.1.6.5.3).
    fn set_vlan(&self, data: &[u8], taken: bool) -> Result<(), Refused> {
        self.needs(CTRL_VLAN)?;
        let vlan = u16::from_le_bytes(data.try_into().map_err(|_| Refused)?);
        if self.shared.filter().set_vlan(vlan, taken) {
            Ok(())
        } else {
            Err(Refused)
        }
    }

    /// VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET (5.1.6.5.6): some of those agreed upon.
    fn set_offloads(&self, data: &[u8]) -> Result<(), Refused> {
        self.needs(CTRL_GUEST_OFFLOADS)?;
        let wanted = u64::from_le_bytes(data.try_into().map_err(|_| Refused)?);
        if wanted & !(self.features & GUEST_OFFLOADS) != 0 {
            return Err(Refused);
        }
        self.shared
            .claim
            .set_offloads(header::offloads(wanted))
            .map_err(|_| Refused)
    }
}

fn read(guard: &ReadGuard<'_>, chain: &Chain) -> Option<Vec<u8>> {
    let len = chain.readable.total_len();
    if len > COMMAND_BYTES_MAX {
        return None;
    }
    let mut command = vec![0; usize::try_from(len).ok()?];
    chain.readable.copy_to(guard, &mut command).ok()?;
    Some(command)
}

/// A table at the start of `data`: a count and so many addresses.
fn table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (entries, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let (addresses, _) = entries.as_chunks::<6>();
    Some((Table::new(addresses), rest))
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn tables_that_are_cut_off() {
        let two = [&[2, 0, 0, 0][..], &[1; 12], &[7]].concat();
        assert!(table(&two).is_some_and(|(_, rest)| rest == [7]));
        for len in 0..16 {
            assert!(table(&two[..len]).is_none(), "{len}");
        }
        assert!(table(&[0, 0, 0, 0]).is_some_and(|(_, rest)| rest.is_empty()));
        assert!(table(&[0xff; 64]).is_none());
    }
}
