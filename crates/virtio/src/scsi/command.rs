// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a chain of a request queue to an answer or a job: finds header, CDB, data and response, the unit, what it says.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use ebbtide_block::LocalDisk;
use ebbtide_gate::{Entry, Gate, Handle, Lease};
use ebbtide_iothread::Local;
use ebbtide_memory::{Access, AccessError, PinList, ReadGuard};
use ebbtide_scsi::{Effect, Extents, Sense, Work, begin_absent};
use smallvec::SmallVec;

use super::answer::AnswerPlace;
use super::config::Sizes;
use super::perform::perform;
use super::request::{
    Address, COMMAND_HEADER_BYTES, CommandHeader, RESPONSE_HEADER_BYTES, Response, response_bytes,
};
use super::shared::Shared;
use super::targets::{Unit, luns_of};
use super::tasks::{Fate, Task};
use crate::service::{Answered, Begun, Service, Unanswerable};
use crate::virtq::{Buffers, Chain};

/// The commands of one queue.
pub(super) struct Commands {
    pub shared: Arc<Shared>,
    pub local: Local,
    /// The activation's: once it is closed nobody waits for data.
    pub gate: Arc<Gate>,
    /// Which of the device's queues it is.
    pub index: u16,
    /// Its list of tasks.
    pub queue: usize,
}

/// What is to be done on the disk.
pub(super) enum Action {
    Read {
        offset: u64,
        data: PinList,
        /// Flush first: what is read has to be on the medium.
        fua: bool,
    },
    Write {
        offset: u64,
        data: PinList,
        /// Flush afterwards, whatever the cache.
        through: bool,
    },
    Verify {
        offset: u64,
        len: u64,
        /// What it has to hold.
        expected: Option<PinList>,
    },
    WriteSame {
        offset: u64,
        len: u64,
        /// `None`: zeroes.
        block: Option<Vec<u8>>,
        may_unmap: bool,
        through: bool,
    },
    Unmap(Extents),
    Flush,
}

/// A unit in use. It goes when this and all others like it are dropped.
pub(super) struct Hold {
    pub disk: LocalDisk,
    unit: Handle<Unit>,
    /// Dropped after the disk.
    _lease: Lease,
}

/// A command that the disk works on.
pub(super) struct Job {
    head: u16,
    answer: AnswerPlace,
    sizes: Sizes,
    /// Bytes of data the driver has or has room for.
    room: u32,
    /// As many of them move when all goes well.
    bytes: u32,
    action: Action,
    hold: Hold,
    task: Task,
}

impl Hold {
    /// Whether what is written has to be on the medium when its command ends. Who does not know sees to it.
    fn is_through(&self) -> bool {
        let unit = self.unit.enter(Entry::Io);
        unit.is_none_or(|unit| !unit.logical.writeback())
    }
}

impl Job {
    /// Its pins, for [`Flights::begin`](crate::flights::Flights::begin).
    fn pins(&self) -> impl Iterator<Item = (u8, Range<u64>)> {
        let data = match &self.action {
            Action::Read { data, .. } | Action::Write { data, .. } => Some(data),
            Action::Verify { expected, .. } => expected.as_ref(),
            Action::WriteSame { .. } | Action::Unmap(_) | Action::Flush => None,
        };
        let data = data.into_iter().flat_map(PinList::host_ranges);
        let answer = self.answer.host_ranges().map(|range| (0, range));
        answer.chain(data.map(|range| (1, range)))
    }
}

/// What an answered command keeps: memory, then the unit, then its place among the tasks.
pub(super) struct Kept {
    answer: AnswerPlace,
    /// What is to be written there, and what it says of the data: how much there is room for.
    unwritten: Option<(Outcome, u32, Sizes)>,
    _data: Option<PinList>,
    _hold: Option<Hold>,
    _task: Option<Task>,
}

impl Kept {
    fn answer(answer: AnswerPlace) -> Kept {
        Kept {
            answer,
            unwritten: None,
            _data: None,
            _hold: None,
            _task: None,
        }
    }
}

/// The result of a command.
#[derive(Clone, Copy)]
struct Outcome {
    response: Response,
    sense: Option<Sense>,
    /// Bytes of data moved.
    moved: u32,
    /// As many of them into the driver's memory.
    written: u32,
}

impl Outcome {
    fn response(response: Response) -> Outcome {
        Outcome {
            response,
            sense: None,
            moved: 0,
            written: 0,
        }
    }

    fn check(sense: Sense) -> Outcome {
        Outcome {
            sense: Some(sense),
            ..Outcome::response(Response::Ok)
        }
    }

    fn good(moved: u32, written: u32) -> Outcome {
        Outcome {
            moved,
            written,
            ..Outcome::response(Response::Ok)
        }
    }
}

impl From<Sense> for Outcome {
    fn from(sense: Sense) -> Outcome {
        Outcome::check(sense)
    }
}

impl From<AccessError> for Outcome {
    fn from(_: AccessError) -> Outcome {
        Outcome::check(Sense::DATA_PHASE)
    }
}

/// A command's chain, taken apart.
struct Opened {
    head: u16,
    answer: AnswerPlace,
    sizes: Sizes,
    /// `None`: the chain is too short for one.
    header: Option<Buffers>,
    readable: Buffers,
    writable: Buffers,
    /// Bytes of data there is room for.
    room: u32,
}

/// What the unit makes of a command: `Err` is its result.
type Judged = Result<(Action, u32, Hold, Address), Outcome>;

impl Service for Commands {
    type Job = Job;
    type Kept = Kept;

    fn begin(
        &self,
        guard: &ReadGuard<'_>,
        chain: &mut Chain,
    ) -> Result<Begun<Job, Kept>, Unanswerable> {
        let Opened {
            head,
            answer,
            sizes,
            header,
            readable,
            writable,
            room,
        } = self.open(guard, chain.take())?;
        let counters = &self.shared.counters;
        let mut tag = 0;
        let judged = match header {
            None => Err(Outcome::response(Response::Failure)),
            Some(header) => self.judge(guard, &header, readable, &writable, &mut tag),
        };
        match judged {
            Ok((action, bytes, hold, address)) => {
                counters.begin();
                let task = self.shared.tasks.begin(self.queue, address, tag);
                let job = Job {
                    head,
                    answer,
                    sizes,
                    room,
                    bytes,
                    action,
                    hold,
                    task,
                };
                let flights = &self.shared.flights;
                flights.begin(self.index, head, flights.ns(Instant::now()), job.pins());
                Ok(Begun::Job(job))
            }
            Err(outcome) => {
                let written = self.answer(&answer, outcome, room, sizes);
                Ok(Begun::Answered(Answered {
                    head,
                    written,
                    kept: Kept::answer(answer),
                }))
            }
        }
    }

    /// The device goes with all its units: what else could be said is tried again by the driver.
    fn refuse(&self, guard: &ReadGuard<'_>, chain: Chain) -> Result<Answered<Kept>, Unanswerable> {
        let Opened {
            head,
            answer,
            sizes,
            room,
            ..
        } = self.open(guard, chain)?;
        let outcome = Outcome::response(Response::BadTarget);
        Ok(Answered {
            head,
            written: self.answer(&answer, outcome, room, sizes),
            kept: Kept::answer(answer),
        })
    }

    async fn carry_out(self: Rc<Self>, job: Job) -> Answered<Kept> {
        let Job {
            head,
            answer,
            sizes,
            room,
            bytes,
            action,
            hold,
            task,
        } = job;
        // Nobody waits for the answer any more, or it is decided: begin nothing more.
        let go_on = || !self.gate.is_closed() && task.fate() == Fate::Running;
        let reads = matches!(action, Action::Read { .. });
        // Also when the cache was switched off meanwhile.
        let is_through = || hold.is_through();
        let (result, data) = perform(&hold.disk, action, &go_on, &is_through).await;
        let outcome = match (task.fate(), result) {
            (Fate::Aborted, _) => Outcome::response(Response::Aborted),
            (Fate::Reset, _) => Outcome::response(Response::Reset),
            (Fate::Running, Err(sense)) => Outcome::check(sense),
            (Fate::Running, Ok(())) => Outcome::good(bytes, if reads { bytes } else { 0 }),
        };
        self.shared.flights.end(self.index, head);
        self.shared.counters.end();
        Answered {
            head,
            written: 0,
            kept: Kept {
                answer,
                unwritten: Some((outcome, room, sizes)),
                _data: data,
                _hold: Some(hold),
                _task: Some(task),
            },
        }
    }

    fn write_answer(&self, answered: &mut Answered<Kept>) {
        let Kept {
            answer, unwritten, ..
        } = &mut answered.kept;
        if let Some((outcome, room, sizes)) = unwritten.take() {
            answered.written = self.answer(answer, outcome, room, sizes);
        }
    }

    fn broken(&self) {
        self.shared.counters.broken();
    }
}

impl Commands {
    fn answer(&self, place: &AnswerPlace, outcome: Outcome, room: u32, sizes: Sizes) -> u32 {
        let Outcome {
            response,
            sense,
            moved,
            written,
        } = outcome;
        let counters = &self.shared.counters;
        counters.answered(response, sense.is_some(), moved);
        let residual = room.saturating_sub(moved);
        place.give(
            &response_bytes(response, sense, residual, sizes.sense),
            written,
        )
    }

    /// Takes a command's chain apart.
    fn open(&self, guard: &ReadGuard<'_>, chain: Chain) -> Result<Opened, Unanswerable> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let sizes = self.shared.config.sizes();
        let place = RESPONSE_HEADER_BYTES + sizes.sense;
        let answer = AnswerPlace::take(guard, head, &mut writable, place)?;
        // What is in front of the data is none.
        let header = readable.split_front(COMMAND_HEADER_BYTES + sizes.cdb);
        let room = readable.total_len().max(writable.total_len());
        Ok(Opened {
            head,
            answer,
            sizes,
            header,
            readable,
            writable,
            room,
        })
    }

    fn judge(
        &self,
        guard: &ReadGuard<'_>,
        header: &Buffers,
        readable: Buffers,
        writable: &Buffers,
        tag: &mut u64,
    ) -> Judged {
        let mut bytes: SmallVec<[u8; 64]> = SmallVec::from_elem(0, header.total_len() as usize);
        header.copy_to(guard, &mut bytes)?;
        let failure = Outcome::response(Response::Failure);
        let (command, cdb) = CommandHeader::parse(&bytes).ok_or(failure)?;
        *tag = command.tag;
        // Data in both directions were not negotiated.
        if readable.total_len() > 0 && writable.total_len() > 0 {
            return Err(failure);
        }
        let bad_target = Outcome::response(Response::BadTarget);
        let address = command.address.ok_or(bad_target)?;
        let units = self.shared.targets.read();
        let luns = || luns_of(&units, address.target);
        let data = Data {
            guard,
            readable,
            writable,
        };
        let Some(owned) = units.get(&address) else {
            // A target is there as long as one of its units is.
            let luns = luns();
            if luns.is_empty() {
                return Err(bad_target);
            }
            let work = begin_absent(cdb, &luns)?;
            return Err(data.reply(work)?);
        };
        let lease = owned.gate().enter(Entry::Io).ok_or(bad_target)?;
        let unit = owned.get();
        let work = unit.logical.begin(cdb, &unit.geometry(), luns)?;
        let bytes = work.data_in_bytes().max(work.data_out_bytes());
        let action = data.action(unit, work)?;
        // Not more than there is room for: that was checked.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let hold = Hold {
            disk: unit.disk.attach(&self.local),
            unit: owned.handle(),
            _lease: lease,
        };
        Ok((action, bytes, hold, address))
    }
}

/// The data of a command.
struct Data<'a, 'g> {
    guard: &'a ReadGuard<'g>,
    readable: Buffers,
    writable: &'a Buffers,
}

impl Data<'_, '_> {
    fn check_room(&self, work: &Work) -> Result<(), Outcome> {
        if work.data_in_bytes() > self.writable.total_len().into()
            || work.data_out_bytes() > self.readable.total_len().into()
        {
            return Err(Outcome::response(Response::Overrun));
        }
        Ok(())
    }

    /// The result of work that is done as soon as its data are copied.
    fn reply(&self, work: Work) -> Result<Outcome, Outcome> {
        self.check_room(&work)?;
        let Work::Reply { data, .. } = work else {
            return Ok(Outcome::good(0, 0));
        };
        let written = self.writable.copy_from(self.guard, &data)?;
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        Ok(Outcome::good(written, written))
    }

    /// What the disk has to do; `Err` is the result if it has not.
    fn action(mut self, unit: &Unit, work: Work) -> Result<Action, Outcome> {
        self.check_room(&work)?;
        let through = !unit.logical.writeback();
        match work {
            Work::Done | Work::Reply { .. } => Err(self.reply(work)?),
            Work::Flush => Ok(Action::Flush),
            Work::Read { extent, .. }
            | Work::Write { extent, .. }
            | Work::Verify { extent, .. }
                if extent.len == 0 =>
            {
                Err(Outcome::good(0, 0))
            }
            Work::Read { extent, fua } => {
                let mut writable = self.writable.clone();
                let data = self.pin(&mut writable, extent.len, Access::Write)?;
                let offset = extent.offset;
                Ok(Action::Read { offset, data, fua })
            }
            Work::Write { extent, fua } => Ok(Action::Write {
                offset: extent.offset,
                data: self.pin_readable(extent.len)?,
                through: fua || through,
            }),
            Work::Verify { extent, compare } => Ok(Action::Verify {
                offset: extent.offset,
                len: extent.len,
                expected: match compare {
                    true => Some(self.pin_readable(extent.len)?),
                    false => None,
                },
            }),
            Work::WriteSame {
                extent,
                block_bytes,
                unmap,
            } => {
                let block = block_bytes.map(|bytes| self.copy(bytes)).transpose()?;
                Ok(Action::WriteSame {
                    offset: extent.offset,
                    len: extent.len,
                    block: block.filter(|block| block.iter().any(|byte| *byte != 0)),
                    may_unmap: unmap,
                    through,
                })
            }
            Work::Parameters { length, list } => {
                let bytes = self.copy(length)?;
                match unit.logical.parameters(list, &bytes, &unit.geometry())? {
                    Effect::None => Err(Outcome::good(length, 0)),
                    Effect::Flush => Ok(Action::Flush),
                    Effect::Unmap(extents) => Ok(Action::Unmap(extents)),
                }
            }
        }
    }

    fn copy(&self, bytes: u32) -> Result<Vec<u8>, AccessError> {
        let mut copy = vec![0; bytes as usize];
        self.readable.copy_to(self.guard, &mut copy)?;
        Ok(copy)
    }

    fn pin_readable(&mut self, len: u64) -> Result<PinList, Outcome> {
        let mut readable = std::mem::take(&mut self.readable);
        self.pin(&mut readable, len, Access::Read)
    }

    /// The first `len` bytes; what is behind them is not touched.
    fn pin(&self, buffers: &mut Buffers, len: u64, access: Access) -> Result<PinList, Outcome> {
        let overrun = Outcome::response(Response::Overrun);
        let len = u32::try_from(len).map_err(|_| overrun)?;
        let part = buffers.split_front(len).ok_or(overrun)?;
        let mut pins = PinList::new();
        self.guard.pin_list(&part, access, &mut pins)?;
        Ok(pins)
    }
}
