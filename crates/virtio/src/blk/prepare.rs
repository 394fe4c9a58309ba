// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a chain to a job: finds header, data and status wherever the driver put them, checks, pins.

use std::cell::RefCell;
use std::ops::Range;

use ebbtide_memory::{Access, AccessError, Pin, PinList, ReadGuard};
use smallvec::SmallVec;

use super::request::{
    Header, ID_BYTES, Kind, SEGMENT_BYTES, SEGMENTS_MAX, Segments, Status, Terms,
};
use crate::service::Unanswerable;
use crate::virtq::{Buffers, Chain};

/// What to do for a request.
#[derive(Default)]
pub(super) enum Work {
    /// Nothing: the answer is known.
    #[default]
    Done,
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    Discard(Segments),
    WriteZeroes(Segments),
}

/// A request from its first look until it is given back. What is large of it stays where it is all that time.
#[derive(Default)]
pub(super) struct Job {
    pub request: Box<Request>,
    /// The right to the memory of its data.
    pub data: Box<PinList>,
}

impl Job {
    /// Its pins, for [`Flights::begin`](crate::flights::Flights::begin).
    pub(super) fn pins(&self) -> impl Iterator<Item = (u8, Range<u64>)> {
        let status = self.request.answer.host_range().into_iter();
        let data = self.data.host_ranges();
        status
            .map(|range| (0, range))
            .chain(data.map(|range| (1, range)))
    }
}

#[derive(Default)]
pub(super) struct Request {
    pub head: u16,
    pub kind: Option<Kind>,
    /// Bytes of data the driver asks to be moved.
    pub data_bytes: u32,
    pub work: Work,
    /// When it was taken, in nanoseconds of the [flights](crate::flights::Flights).
    pub began_ns: u64,
    /// Its answer, once it is done.
    pub status: Status,
    /// Bytes of data that were written for it.
    pub written: u32,
    pub answer: AnswerPlace,
}

/// Jobs that are over, to be used again: a request then allocates nothing, and nothing of it is moved about.
#[derive(Default)]
pub(super) struct Spare(RefCell<Vec<Job>>);

impl Spare {
    /// As many as a busy queue mostly has under way.
    const MAX: usize = 128;
    /// Lists of more pieces of memory are not kept: a guest decides how long they are.
    const PIECES_MAX: usize = 32;

    pub(super) fn take(&self) -> Job {
        self.0.borrow_mut().pop().unwrap_or_default()
    }

    /// Lets go of the memory of a job.
    pub(super) fn put(&self, mut job: Job) {
        let long = job.data.iovecs().len() > Spare::PIECES_MAX;
        job.request.answer = AnswerPlace::default();
        job.data.clear();
        let mut spare = self.0.borrow_mut();
        if !long && spare.len() < Spare::MAX {
            spare.push(job);
        }
    }
}

/// Where the answer goes: behind the data the device writes.
#[derive(Default)]
pub(super) struct AnswerPlace {
    /// `None`: the memory is gone.
    status: Option<Pin>,
    /// Bytes of the chain in front of the status.
    room: u32,
}

impl AnswerPlace {
    /// That of a chain of which nothing else is wanted.
    ///
    /// # Errors
    /// No status byte can be written.
    pub(super) fn of(guard: &ReadGuard<'_>, chain: Chain) -> Result<AnswerPlace, Unanswerable> {
        let Chain {
            head, mut writable, ..
        } = chain;
        AnswerPlace::take(guard, head, &mut writable)
    }

    /// The status is the last writable byte, whichever buffer that is in (2.7.4.1, 5.2.6).
    fn take(
        guard: &ReadGuard<'_>,
        head: u16,
        writable: &mut Buffers,
    ) -> Result<AnswerPlace, Unanswerable> {
        let gpa = writable.pop_byte().ok_or(Unanswerable::NoRoom { head })?;
        let status = match guard.pin(gpa, 1, Access::Write) {
            Ok(pin) => Some(pin),
            // The guest has just given this memory back. It cannot expect an answer there; other requests go on.
            Err(AccessError::Unplugged { .. }) => None,
            Err(source) => return Err(Unanswerable::Memory { head, source }),
        };
        Ok(AnswerPlace {
            status,
            room: writable.total_len(),
        })
    }

    /// The host address of the status.
    fn host_range(&self) -> Option<Range<u64>> {
        self.status.as_ref().map(Pin::host_range)
    }

    /// Writes the status; returns how many bytes of the chain are written from its start, without a gap, when `data` of
    /// them were.
    pub(super) fn give(&self, status: Status, data: u32) -> u32 {
        let written = self
            .status
            .as_ref()
            .is_some_and(|pin| pin.write_at(0, &[status as u8]).is_ok());
        if written && data == self.room {
            data.saturating_add(1)
        } else {
            data
        }
    }
}

/// What makes a request fail before it is begun.
enum Failure {
    Status(Status),
    /// Some of its buffers are not in RAM, or not any more.
    Memory,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure::Status(status)
    }
}

impl From<AccessError> for Failure {
    fn from(_: AccessError) -> Failure {
        Failure::Memory
    }
}

/// What a request is prepared with.
pub(super) struct Preparation<'a, 'g> {
    pub terms: &'a Terms,
    pub id: &'a [u8; ID_BYTES],
    pub guard: &'a ReadGuard<'g>,
}

impl Preparation<'_, '_> {
    /// Makes `job` what `chain` asks for; false: it failed for the memory it names.
    ///
    /// # Errors
    /// No status byte can be written.
    pub(super) fn prepare(&self, chain: &mut Chain, job: &mut Job) -> Result<bool, Unanswerable> {
        let Job { request, data } = job;
        request.head = chain.head;
        request.kind = None;
        request.status = Status::Ok;
        request.written = 0;
        request.answer = AnswerPlace::take(self.guard, chain.head, &mut chain.writable)?;
        let (work, good_memory) = match self.work(chain, request, data) {
            Ok(work) => (work, true),
            Err(Failure::Status(status)) => {
                request.status = status;
                (Work::Done, true)
            }
            Err(Failure::Memory) => {
                request.status = Status::IoErr;
                // What was pinned of it has gone; a list that the guest made long is not kept for the next request.
                **data = PinList::new();
                (Work::Done, false)
            }
        };
        request.data_bytes = match &work {
            Work::Read { .. } => request.answer.room,
            Work::Write { .. } => u32::try_from(data.total_len()).unwrap_or(u32::MAX),
            Work::Done => request.written,
            _ => 0,
        };
        request.work = work;
        Ok(good_memory)
    }

    fn work(
        &self,
        chain: &mut Chain,
        request: &mut Request,
        data: &mut PinList,
    ) -> Result<Work, Failure> {
        let Chain {
            readable, writable, ..
        } = chain;
        let header = readable.read_front(self.guard)?.ok_or(Status::IoErr)?;
        let header = Header::parse(&header);
        request.kind = header.kind;
        match header.kind.ok_or(Status::Unsupported)? {
            Kind::Read => {
                let offset = self
                    .terms
                    .transfer_offset(header.sector, writable.total_len())?;
                self.guard.pin_list(writable, Access::Write, data)?;
                Ok(Work::Read { offset })
            }
            Kind::Write => {
                self.terms.writable()?;
                let offset = self
                    .terms
                    .transfer_offset(header.sector, readable.total_len())?;
                self.guard.pin_list(readable, Access::Read, data)?;
                Ok(Work::Write { offset })
            }
            Kind::Flush => Ok(Work::Flush),
            Kind::GetId => {
                let written = writable.copy_from(self.guard, self.id)?;
                request.written = u32::try_from(written).unwrap_or(0);
                Ok(Work::Done)
            }
            Kind::Discard => Ok(Work::Discard(self.segments(Kind::Discard, readable)?)),
            Kind::WriteZeroes => Ok(Work::WriteZeroes(
                self.segments(Kind::WriteZeroes, readable)?,
            )),
        }
    }

    fn segments(&self, kind: Kind, readable: &Buffers) -> Result<Segments, Failure> {
        const BYTES_MAX: usize = (SEGMENTS_MAX * SEGMENT_BYTES) as usize;
        let count = self.terms.segment_count(kind, readable.total_len())?;
        let len = (count * SEGMENT_BYTES) as usize;
        let mut bytes: SmallVec<[u8; BYTES_MAX]> = SmallVec::from_elem(0, len);
        readable.copy_to(self.guard, &mut bytes)?;
        Ok(self.terms.segments(kind, &bytes)?)
    }
}
