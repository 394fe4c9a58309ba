// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unplug tickets: the way of a RAM block out.
//!
//! ```text
//!   Live ──publish──► Unpublished ──grace──► Draining ──no pin, no hold──► Drained ──destroy──► Gone
//! ```

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Error;
use crate::ram::{ListShared, RamBlock};
use crate::reader::hub::Hub;
use crate::reader::wake::Level;
use crate::sync::{Mutex, lock};

/// How far an unplug is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The change that unplugs is not published yet, or was taken back.
    Live,
    /// No new section finds the memory; sections that did may still run.
    Unpublished,
    /// Only pins and holds are left.
    Draining,
    /// Nobody is left.
    Drained,
    /// The memory is given back.
    Gone,
}

impl Phase {
    fn from_level(level: u8) -> Phase {
        match level {
            0 => Phase::Live,
            1 => Phase::Unpublished,
            2 => Phase::Draining,
            3 => Phase::Drained,
            _ => Phase::Gone,
        }
    }
}

/// Who keeps memory that is to be unplugged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The thread that took the pins, or the external mapper.
    pub what: String,
    /// How many pins or holds.
    pub count: u64,
    /// They are at least this old: a hold knows its age, a pin is older than the unpublishing.
    pub age: Duration,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}, for {} ms or more)",
            self.what,
            self.count,
            self.age.as_millis()
        )
    }
}

/// The holds of external mappers on one RAM block.
pub(crate) struct Holds {
    hub: &'static Hub,
    list: Mutex<HoldList>,
}

#[derive(Default)]
struct HoldList {
    last_id: u64,
    holds: Vec<Hold>,
}

struct Hold {
    id: u64,
    what: String,
    since: Instant,
}

impl Holds {
    pub(crate) fn new(hub: &'static Hub) -> Arc<Holds> {
        Arc::new(Holds {
            hub,
            list: Mutex::new(HoldList::default()),
        })
    }

    pub(crate) fn add(&self, what: &str) -> u64 {
        let mut list = lock(&self.list);
        list.last_id += 1;
        let id = list.last_id;
        list.holds.push(Hold {
            id,
            what: what.to_owned(),
            since: Instant::now(),
        });
        id
    }

    pub(crate) fn remove(&self, id: u64) {
        let mut list = lock(&self.list);
        list.holds.retain(|hold| hold.id != id);
        let last = list.holds.is_empty();
        drop(list);
        if last {
            self.hub.wake().signal();
        }
    }

    fn is_empty(&self) -> bool {
        lock(&self.list).holds.is_empty()
    }

    fn list(&self) -> Vec<Holder> {
        let holder = |hold: &Hold| Holder {
            what: hold.what.clone(),
            count: 1,
            age: hold.since.elapsed(),
        };
        lock(&self.list).holds.iter().map(holder).collect()
    }
}

/// The worker's part of an unplug.
pub(crate) struct Drain {
    slot: u32,
    holds: Arc<Holds>,
    level: Arc<Level>,
    unpublished: Mutex<Option<Instant>>,
}

impl Drain {
    pub(crate) fn new(slot: u32, holds: Arc<Holds>) -> Arc<Drain> {
        Arc::new(Drain {
            slot,
            holds,
            level: Level::new(0),
            unpublished: Mutex::new(None),
        })
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    #[cfg(loom)]
    pub(crate) fn level(&self) -> Arc<Level> {
        Arc::clone(&self.level)
    }

    /// The view without the block is published.
    pub(crate) fn unpublish(&self) {
        *lock(&self.unpublished) = Some(Instant::now());
        self.level.raise(Phase::Unpublished as u8);
    }

    pub(crate) fn begin(&self) {
        self.level.raise(Phase::Draining as u8);
    }

    pub(crate) fn has_holds(&self) -> bool {
        !self.holds.is_empty()
    }

    pub(crate) fn finish(&self) {
        self.level.raise(Phase::Drained as u8);
    }

    fn age(&self) -> Duration {
        lock(&self.unpublished).map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// The unplug of one RAM block: shows how far it is and who is in the way, and gives the memory
/// back when asked to. Time never frees anything.
///
/// A ticket dropped before [`Ticket::destroy`] leaves the memory allocated until the
/// [`crate::Memory`] goes.
pub struct Ticket {
    drain: Arc<Drain>,
    block: Arc<RamBlock>,
    list: Arc<ListShared>,
}

impl Ticket {
    pub(crate) fn new(block: &Arc<RamBlock>, list: &Arc<ListShared>) -> Ticket {
        let drain = Drain::new(block.slot(), Arc::clone(block.holds()));
        Ticket {
            drain,
            block: Arc::clone(block),
            list: Arc::clone(list),
        }
    }

    pub(crate) fn drain(&self) -> &Arc<Drain> {
        &self.drain
    }

    /// The block on its way out.
    pub fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        Phase::from_level(self.drain.level.get())
    }

    /// Ready when nobody uses the memory any more.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        self.drain.level.reached(Phase::Drained as u8)
    }

    /// Ready when the phase is `phase` or a later one.
    pub fn reached(&self, phase: Phase) -> impl Future<Output = ()> + Send + 'static {
        self.drain.level.reached(phase as u8)
    }

    /// Who is left; empty when drained.
    pub fn holders(&self) -> Vec<Holder> {
        if self.phase() >= Phase::Drained {
            return Vec::new();
        }
        let age = self.age();
        let pins = self.block.pin_holders().into_iter();
        let mut holders: Vec<Holder> = pins
            .map(|(thread, count)| Holder {
                what: format!("pins of {thread}"),
                count,
                age,
            })
            .collect();
        holders.extend(self.drain.holds.list());
        holders
    }

    /// Time since the memory was unpublished.
    pub fn age(&self) -> Duration {
        self.drain.age()
    }

    /// Gives the memory back to the host and forgets the block. May block for as long as the
    /// host takes to free the pages.
    ///
    /// # Errors
    /// `NotDrained` before [`Phase::Drained`], naming who is left; `Host` when the host refuses.
    /// The ticket comes back with the error and can be tried again.
    pub fn destroy(self) -> Result<(), (Ticket, Error)> {
        if self.phase() != Phase::Drained {
            let holders: Vec<String> = self.holders().iter().map(ToString::to_string).collect();
            let what = format!("RAM block {}", self.block.name());
            return Err((
                self,
                Error::NotDrained {
                    what,
                    holders: holders.join(", "),
                },
            ));
        }
        match self.list.destroy(&self.block) {
            Ok(()) => {
                self.drain.level.raise(Phase::Gone as u8);
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let phase = self.phase();
        if phase != Phase::Gone && phase != Phase::Live {
            tracing::warn!(
                block = self.block.name(),
                ?phase,
                "unplugged RAM is kept: its ticket was dropped"
            );
        }
    }
}
