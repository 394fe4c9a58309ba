// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the host still uses for the last guest when the next one comes: a disk is being read into it, or written from
//! it, and nobody can take that back.
//!
//! The next guest gets other memory in its place, and never sees what comes late. Where there can be no other, because it
//! is a file's or the host has none, the reset waits. Why so: docs/decisions/reset.md.

use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ebbtide_iothread::{Blocking, Local};
use ebbtide_memory::{Memory, Phase, RamBlock, Ticket};
use ebbtide_qmp::sizes::human;
use ebbtide_qmp::types::run_state::ShutdownCause;
use ebbtide_virtio::PinnedList;

use super::progress::UnderWay;
use crate::guest_ram::GuestRam;
use crate::hotplug::dimm::DimmSite;
use crate::machine::{Machine, MemorySlot};

/// What was given up lets go of its memory in this time, if it does so at all; new memory for it would be for nothing.
const SETTLE: Duration = Duration::from_millis(100);
/// How often it is looked meanwhile whether memory is still in use.
const LOOK: Duration = Duration::from_millis(5);
/// The same for a reset that waits: what takes so long may take a little longer.
const LATE_LOOK: Duration = Duration::from_millis(50);
/// Memory that could not be freed is tried again after this.
const FREE_AGAIN: Duration = Duration::from_secs(1);
/// How often it is told at most that a reset waits.
const NAME_AT_LEAST: Duration = Duration::from_secs(1);

/// RAM that the guest sees somewhere, whatever block is behind it.
trait Place {
    /// The block; `None`: it is not the guest's any more.
    fn block(&self) -> Option<Arc<RamBlock>>;

    /// Shows `new` there; the ticket of the block that was.
    ///
    /// # Errors
    /// All is as before.
    fn replace(&self, new: &Arc<RamBlock>) -> Result<Ticket, String>;
}

impl Place for GuestRam {
    fn block(&self) -> Option<Arc<RamBlock>> {
        Some(GuestRam::block(self))
    }

    fn replace(&self, new: &Arc<RamBlock>) -> Result<Ticket, String> {
        GuestRam::replace(self, new).map_err(|e| e.to_string())
    }
}

impl Place for MemorySlot {
    fn block(&self) -> Option<Arc<RamBlock>> {
        Place::block(&self.ram)
    }

    fn replace(&self, new: &Arc<RamBlock>) -> Result<Ticket, String> {
        let ticket = Place::replace(&self.ram, new)?;
        self.device.renew(new);
        Ok(ticket)
    }
}

impl Place for DimmSite {
    fn block(&self) -> Option<Arc<RamBlock>> {
        DimmSite::block(self)
    }

    fn replace(&self, new: &Arc<RamBlock>) -> Result<Ticket, String> {
        self.renew(new)
    }
}

impl Machine {
    /// Sees to it that no memory of the next guest is in use for the last one. Some: the VM is to end, and it is not so.
    pub(super) async fn part_memory(&self, reset: &UnderWay<'_>) -> Option<ShutdownCause> {
        let parting = Parting {
            memory: &self.memory,
            blocking: &self.blocking,
            local: &self.local,
            patience: self.config.drain_timeout.max(NAME_AT_LEAST),
            pinned: &|| self.devices.pinned(),
            ending: &|| self.requests.ending(),
            waits_for: &|memory| reset.waits_for(memory),
        };
        let dimms = self.devices.dimm_sites();
        let boot: &dyn Place = &self.ram;
        let slots = self.slots.iter().map(|slot| slot as &dyn Place);
        let dimms = dimms.iter().map(|dimm| &**dimm as &dyn Place);
        let places: Vec<_> = std::iter::once(boot).chain(slots).chain(dimms).collect();
        parting.part(&places).await
    }
}

/// What it takes to part the memory of two guests.
struct Parting<'m> {
    memory: &'m Arc<Memory>,
    blocking: &'m Arc<Blocking>,
    local: &'m Local,
    /// How often it is told what takes long.
    patience: Duration,
    /// What requests in flight have pinned.
    pinned: &'m dyn Fn() -> Vec<PinnedList>,
    /// Who wants the VM to end.
    ending: &'m dyn Fn() -> Option<ShutdownCause>,
    /// Told the names of memory that is waited for.
    waits_for: &'m dyn Fn(Vec<String>),
}

impl Parting<'_> {
    /// Sees to it that no memory of `places`, or any other that a guest may see, is in use; nothing begins to use it. Some:
    /// the VM is to end, and it is not so.
    async fn part(&self, places: &[&dyn Place]) -> Option<ShutdownCause> {
        // Who was looking something up when the gates closed has pinned it by now.
        self.memory.grace().await;
        self.settled().await;
        for place in places {
            let Some(old) = place.block().filter(|block| block.pins() > 0) else {
                continue;
            };
            if let Err(reason) = self.renew(*place, &old).await {
                tracing::error!(
                    "memory {} is still in use for the last guest, and there is no other for the next one: {reason}",
                    old.name()
                );
            }
        }
        self.all_let_go().await
    }

    /// The blocks in use that a guest may see.
    fn in_use(&self) -> Vec<Arc<RamBlock>> {
        let mut blocks = self.memory.ram().blocks();
        blocks.retain(|block| block.is_live() && block.pins() > 0);
        blocks
    }

    async fn settled(&self) {
        let until = self.local.now() + SETTLE;
        while self.local.now() < until && !self.in_use().is_empty() {
            self.local.sleep(LOOK).await;
        }
    }

    /// Waits until nothing that the next guest may see is in use, however long that takes. It can be ended: by who ends
    /// the VM, or gives the device up.
    async fn all_let_go(&self) -> Option<ShutdownCause> {
        let (begun, mut next) = (self.local.now(), self.local.now());
        loop {
            let names: Vec<_> = self
                .in_use()
                .iter()
                .map(|it| it.name().to_owned())
                .collect();
            if names.is_empty() {
                return None;
            }
            (self.waits_for)(names.clone());
            if let Some(cause) = (self.ending)() {
                return Some(cause);
            }
            let now = self.local.now();
            if now >= next {
                let waited = now.saturating_duration_since(begun).as_secs();
                tracing::warn!(
                    "the reset waits for requests of the last guest in memory {}, for {waited} s now; x-ebbtide-query-removals says whose",
                    names.join(", ")
                );
                next = now + self.patience;
            }
            self.local.sleep(LATE_LOOK).await;
        }
    }

    /// Gives the next guest new memory at `place`.
    async fn renew(&self, place: &dyn Place, old: &Arc<RamBlock>) -> Result<(), String> {
        let (memory, block) = (Arc::clone(self.memory), Arc::clone(old));
        let made = self.run(old, move || memory.ram().renew(&block)).await;
        let new = made.ok_or("the VM ends")?.map_err(|e| e.to_string())?;
        let ticket = match place.replace(&new) {
            Ok(ticket) => ticket,
            Err(reason) => {
                match self.memory.update(|t| t.retire(&new)) {
                    Ok(ticket) => self.give_back(ticket),
                    Err(error) => tracing::error!("{error}"),
                }
                return Err(reason);
            }
        };
        ticket.reached(Phase::Draining).await;
        let known = self.known_pins(old).await;
        let job = move || {
            let kept = known.map(|ranges| ticket.free_but(&ranges));
            (ticket, kept, new.prefault())
        };
        let Some((ticket, kept, filled)) = self.run(old, job).await else {
            // The old memory goes with the process.
            return Ok(());
        };
        self.give_back(ticket);
        // What is not known to be free is kept.
        let kept = kept.unwrap_or_else(|| Ok(old.size_bytes()));
        let kept = kept.unwrap_or_else(|error| {
            tracing::error!("{error}");
            old.size_bytes()
        });
        let name = old.name();
        tracing::warn!(
            "memory {name} is still in use for the last guest: the next one gets new memory there; {} of the old are kept until the requests end",
            human(kept)
        );
        if let Err(error) = filled {
            tracing::error!("memory {name} is allocated as it is touched: {error}");
        }
        Ok(())
    }

    /// Runs what may block, for memory `old`; `None` when the VM is to end before it has.
    async fn run<T: Send + 'static>(
        &self,
        old: &RamBlock,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let mut done = pin!(self.blocking.run(job));
        let mut next = self.local.now() + self.patience;
        loop {
            if let Ok(done) = self.local.timeout(LATE_LOOK, done.as_mut()).await {
                return Some(done);
            }
            if (self.ending)().is_some() {
                return None;
            }
            let now = self.local.now();
            if now >= next {
                tracing::warn!("the reset waits for new memory for {}", old.name());
                next = now + self.patience;
            }
        }
    }

    /// [`known_pins`], asked again for a moment: a request that ends may not have let go yet.
    async fn known_pins(&self, old: &RamBlock) -> Option<Vec<Range<u64>>> {
        let until = self.local.now() + SETTLE;
        loop {
            let known = known_pins(old, self.pinned);
            if known.is_some() || self.local.now() >= until {
                return known;
            }
            self.local.sleep(LOOK).await;
        }
    }

    /// Frees memory when nobody uses it any more.
    fn give_back(&self, ticket: Ticket) {
        let blocking = Arc::downgrade(self.blocking);
        let local = self.local.clone();
        self.local
            .spawn(free_when_drained(ticket, local, blocking))
            .detach();
    }
}

async fn free_when_drained(mut ticket: Ticket, local: Local, blocking: Weak<Blocking>) {
    let name = ticket.block().name().to_owned();
    loop {
        ticket.drained().await;
        // With the machine its memory goes anyway.
        let Some(blocking) = blocking.upgrade() else {
            return;
        };
        match blocking.run(move || ticket.destroy()).await {
            Ok(()) => {
                tracing::info!("memory {name}: what was kept for the last guest is free");
                return;
            }
            // Part of it is being given to the guest or taken from it, which nobody gave up.
            Err((kept, error)) => {
                tracing::debug!("{error}");
                ticket = kept;
            }
        }
        drop(blocking);
        local.sleep(FREE_AGAIN).await;
    }
}

/// Host addresses of all that is pinned of `block`, of which nothing new can be pinned; `None` when somebody has pinned
/// some of it who is not among `pinned`.
fn known_pins(block: &RamBlock, pinned: impl Fn() -> Vec<PinnedList>) -> Option<Vec<Range<u64>>> {
    /// Requests may end meanwhile; seldom twice.
    const TRIES: usize = 3;
    let start = block.host().as_ptr() as u64;
    let all = start..start.saturating_add(block.size_bytes());
    let inside = || -> Vec<PinnedList> {
        let mut lists = pinned();
        for list in &mut lists {
            list.retain(|range| range.start < all.end && all.start < range.end);
        }
        lists.retain(|list| !list.is_empty());
        lists
    };
    (0..TRIES).find_map(|_| {
        let (before, pins, after) = (inside(), block.pins(), inside());
        // The same before and after: all of them were held while the pins were counted, and a list has one pin.
        let complete = before == after && pins == before.len() as u64;
        complete.then(|| before.concat())
    })
}

#[cfg(test)]
mod tests;
