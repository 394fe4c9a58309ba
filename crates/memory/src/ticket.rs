// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unplug tickets: the way of a RAM block out.
//!
//! ```text
//!   Live ──publish──► Unpublished ──grace──► Draining ──no pin, no hold──► Drained ──destroy──► Gone
//! ```

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::{self, Arc};
use std::time::{Duration, Instant};

use ebbtide_models::seeded;

use crate::Error;
use crate::ram::{ListShared, RamBlock};
use crate::reader::hub::Hub;
use crate::reader::wake::Level;
use crate::sync::{Mutex, lock};

/// What an alarm is set to that is to ring after more than the clock can count.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

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

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Live => "live",
            Phase::Unpublished => "unpublished",
            Phase::Draining => "draining",
            Phase::Drained => "drained",
            Phase::Gone => "gone",
        })
    }
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
    /// The thread that took the pins or has a read section open, or the external mapper.
    pub what: String,
    /// How many pins, holds or sections.
    pub count: u64,
    /// They are at least this old: a hold knows its age, the rest is older than the unpublishing.
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

/// Where an unplug stands, for who is told of one that takes long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnplugReport {
    /// The RAM block.
    pub block: String,
    /// How far it is.
    pub phase: Phase,
    /// Time since the memory was unpublished.
    pub age: Duration,
    /// Who is left.
    pub holders: Vec<Holder>,
}

impl fmt::Display for UnplugReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (block, phase, age) = (&self.block, self.phase, self.age.as_millis());
        write!(f, "RAM block {block} is {phase} after {age} ms")?;
        for (at, holder) in self.holders.iter().enumerate() {
            write!(f, "{} {holder}", if at == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

/// The phases of one unplug as they come. It outlives the ticket.
///
/// None is left out: a phase that was passed meanwhile is told, too.
#[derive(Clone)]
pub struct Phases {
    level: Arc<Level>,
    told: u8,
}

impl Phases {
    /// How far the unplug is.
    pub fn current(&self) -> Phase {
        Phase::from_level(self.level.get())
    }

    /// The next phase, ready once it is reached; `None` after [`Phase::Gone`]. Never ready for a
    /// change that was taken back. A call that was dropped before it was ready has told nothing.
    pub async fn next(&mut self) -> Option<Phase> {
        if self.told >= Phase::Gone as u8 {
            return None;
        }
        let next = self.told + 1;
        self.level.reached(next).await;
        self.told = next;
        Some(Phase::from_level(next))
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
        if last && !seeded!("no_hold_wake") {
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
    /// When to tell whom that it takes long. No part of the protocol, and none of its models.
    alarms: sync::Mutex<Vec<Alarm>>,
}

struct Alarm {
    at: Instant,
    rung: Arc<Level>,
}

impl Drain {
    pub(crate) fn new(slot: u32, holds: Arc<Holds>) -> Arc<Drain> {
        Arc::new(Drain {
            slot,
            holds,
            level: Level::new(0),
            unpublished: Mutex::new(None),
            alarms: sync::Mutex::default(),
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
        !seeded!("hold_ignored") && !self.holds.is_empty()
    }

    pub(crate) fn finish(&self) {
        self.level.raise(Phase::Drained as u8);
        let alarms = std::mem::take(&mut *self.alarms());
        alarms.iter().for_each(|alarm| alarm.rung.raise(1));
    }

    /// Rings the alarms whose time has come; when the next one's will have.
    pub(crate) fn ring(&self) -> Option<Instant> {
        let mut alarms = self.alarms();
        if alarms.is_empty() {
            return None;
        }
        let now = Instant::now();
        let due: Vec<Alarm> = alarms.extract_if(.., |alarm| alarm.at <= now).collect();
        let next = alarms.iter().map(|alarm| alarm.at).min();
        drop(alarms);
        due.iter().for_each(|alarm| alarm.rung.raise(1));
        next
    }

    /// What rings `limit` after the unpublishing, or after now while that is to come, and at the
    /// latest when the block has drained.
    fn set_alarm(&self, limit: Duration) -> Arc<Level> {
        let rung = Level::new(0);
        let from = lock(&self.unpublished).unwrap_or_else(Instant::now);
        let mut alarms = self.alarms();
        if self.level.get() >= Phase::Drained as u8 {
            rung.raise(1);
        } else {
            let at = from.checked_add(limit).unwrap_or(from + NEVER);
            let rung = Arc::clone(&rung);
            alarms.push(Alarm { at, rung });
        }
        drop(alarms);
        self.holds.hub.wake().signal();
        rung
    }

    fn alarms(&self) -> sync::MutexGuard<'_, Vec<Alarm>> {
        let alarms = self.alarms.lock();
        alarms.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn phase(&self) -> Phase {
        Phase::from_level(self.level.get())
    }

    fn age(&self) -> Duration {
        lock(&self.unpublished).map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn holders(&self, block: &RamBlock) -> Vec<Holder> {
        let phase = self.phase();
        if phase >= Phase::Drained {
            return Vec::new();
        }
        let age = self.age();
        let pins = block.pin_holders().into_iter();
        let mut holders: Vec<Holder> = pins
            .map(|(thread, count)| Holder {
                what: format!("pins of {thread}"),
                count,
                age,
            })
            .collect();
        if phase == Phase::Unpublished {
            let hub = self.holds.hub;
            let late = hub.late_readers(hub.grace_number()).into_iter();
            holders.extend(late.map(|thread| Holder {
                what: format!("a read section of {thread}"),
                count: 1,
                age,
            }));
        }
        holders.extend(self.holds.list());
        holders
    }

    fn report(&self, block: &RamBlock) -> UnplugReport {
        UnplugReport {
            block: block.name().to_owned(),
            phase: self.phase(),
            age: self.age(),
            holders: self.holders(block),
        }
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
        self.drain.phase()
    }

    /// Ready when nobody uses the memory any more.
    ///
    /// Like [`Ticket::reached`] it is woken by whoever lets the last pin go, on that thread: a waker
    /// of one's own should not block.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        self.drain.level.reached(Phase::Drained as u8)
    }

    /// Ready when the phase is `phase` or a later one.
    pub fn reached(&self, phase: Phase) -> impl Future<Output = ()> + Send + 'static {
        self.drain.level.reached(phase as u8)
    }

    /// Waits on this thread until the phase is `phase` or a later one, for `limit` at most. Returns
    /// whether it is. For threads that may block; time frees nothing here either.
    pub fn wait(&self, phase: Phase, limit: Duration) -> bool {
        self.drain.level.wait_for(phase as u8, limit)
    }

    /// The phases from here on: the first to be told is [`Phase::Unpublished`].
    pub fn phases(&self) -> Phases {
        Phases {
            level: Arc::clone(&self.drain.level),
            told: Phase::Live as u8,
        }
    }

    /// Who is left; empty when drained.
    pub fn holders(&self) -> Vec<Holder> {
        self.drain.holders(&self.block)
    }

    /// Where it stands.
    pub fn report(&self) -> UnplugReport {
        self.drain.report(&self.block)
    }

    /// Tells of an unplug that takes long: ready `limit` after the unpublishing with who is in the
    /// way then, or with `None` as soon as the block has drained. It only tells; call it again to
    /// be told again.
    pub fn overdue(
        &self,
        limit: Duration,
    ) -> impl Future<Output = Option<UnplugReport>> + Send + 'static {
        let rung = self.drain.set_alarm(limit);
        let (drain, block) = (Arc::clone(&self.drain), Arc::clone(&self.block));
        async move {
            rung.reached(1).await;
            let report = drain.report(&block);
            (report.phase < Phase::Drained).then_some(report)
        }
    }

    /// Time since the memory was unpublished.
    pub fn age(&self) -> Duration {
        self.drain.age()
    }

    /// Gives back what nobody uses of memory that waits for who does: all pages but those of `pinned`, which are host
    /// addresses. Returns how many bytes it has kept. May block as [`Ticket::destroy`] may.
    ///
    /// The core counts pins and does not know what they are on: it is the caller who has to name all of it. A page that
    /// is missing from `pinned` is lost to whoever reads it, as a device that carries out a guest's write; what is written
    /// to it goes nowhere. The addresses stay valid in any case. Nobody can name what an external mapper uses: as long as
    /// there is a hold on the block all of it is kept, and so it is while somebody disables discards that are not told, and of
    /// a file that is shared, which has its contents for others.
    ///
    /// # Errors
    /// `NotDrained` while sections that have found the memory may run; `Host` when the host refuses.
    pub fn free_but(&self, pinned: &[Range<u64>]) -> Result<u64, Error> {
        if self.phase() < Phase::Draining {
            let what = format!("RAM block {}", self.block.name());
            let holders = "read sections".to_owned();
            return Err(Error::NotDrained { what, holders });
        }
        if self.drain.has_holds() && !seeded!("frees_what_is_held") {
            return Ok(self.block.size_bytes());
        }
        let host = self.block.host().as_ptr() as u64;
        let inside =
            |range: &Range<u64>| range.start.saturating_sub(host)..range.end.saturating_sub(host);
        let kept: Vec<_> = pinned.iter().map(inside).collect();
        self.block.free_but(&kept)
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
