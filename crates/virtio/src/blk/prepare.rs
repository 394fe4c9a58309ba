// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a chain to a job: finds header, data and status wherever the driver put them, checks, pins.

use std::ops::Range;

use ebbtide_memory::{Access, AccessError, Pin, PinList, ReadGuard};
use smallvec::SmallVec;

use super::request::{
    HEADER_BYTES, Header, ID_BYTES, Kind, SEGMENT_BYTES, SEGMENTS_MAX, Segments, Status, Terms,
};
use crate::service::Unanswerable;
use crate::virtq::{Buffers, Chain};

/// What to do for a request. Owns the right to the guest memory it needs.
pub(super) enum Work {
    /// The answer is known.
    Answer {
        status: Status,
        written: u32,
    },
    Read {
        offset: u64,
        data: PinList,
    },
    Write {
        offset: u64,
        data: PinList,
    },
    Flush,
    Discard(Segments),
    WriteZeroes(Segments),
}

/// A request that can be worked on.
pub(super) struct Job {
    pub head: u16,
    pub kind: Option<Kind>,
    /// Bytes of data the driver asks to be moved.
    pub data_bytes: u32,
    pub work: Work,
    pub answer: AnswerPlace,
}

/// Where the answer goes: behind the data the device writes.
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
        let last = writable
            .split_back(1)
            .ok_or(Unanswerable::NoRoom { head })?;
        let &[(gpa, _)] = &*last else {
            return Err(Unanswerable::NoRoom { head });
        };
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
    pub(super) fn host_range(&self) -> Option<Range<u64>> {
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

impl Job {
    /// Its pins, for [`Flights::begin`](crate::flights::Flights::begin).
    pub(super) fn pins(&self) -> impl Iterator<Item = (u8, Range<u64>)> {
        let data = match &self.work {
            Work::Read { data, .. } | Work::Write { data, .. } => Some(data),
            Work::Answer { .. } | Work::Flush | Work::Discard(_) | Work::WriteZeroes(_) => None,
        };
        let data = data.into_iter().flat_map(PinList::host_ranges);
        let status = self.answer.host_range().into_iter();
        status
            .map(|range| (0, range))
            .chain(data.map(|range| (1, range)))
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

/// A job, and whether it failed for the memory it names.
pub(super) struct Prepared {
    pub job: Job,
    pub bad_memory: bool,
}

/// What a request is prepared with.
pub(super) struct Preparation<'a, 'g> {
    pub terms: &'a Terms,
    pub id: &'a [u8; ID_BYTES],
    pub guard: &'a ReadGuard<'g>,
}

impl Preparation<'_, '_> {
    /// # Errors
    /// No status byte can be written.
    pub(super) fn prepare(&self, chain: Chain) -> Result<Prepared, Unanswerable> {
        let Chain {
            head,
            readable,
            mut writable,
        } = chain;
        let answer = AnswerPlace::take(self.guard, head, &mut writable)?;
        let room = answer.room;
        let mut kind = None;
        let (work, bad_memory) = match self.work(readable, &writable, &mut kind) {
            Ok(work) => (work, false),
            Err(Failure::Status(status)) => (Work::Answer { status, written: 0 }, false),
            Err(Failure::Memory) => {
                let status = Status::IoErr;
                (Work::Answer { status, written: 0 }, true)
            }
        };
        let data_bytes = match &work {
            Work::Read { .. } => room,
            Work::Write { data, .. } => u32::try_from(data.total_len()).unwrap_or(u32::MAX),
            Work::Answer { written, .. } => *written,
            _ => 0,
        };
        let job = Job {
            head,
            kind,
            data_bytes,
            work,
            answer,
        };
        Ok(Prepared { job, bad_memory })
    }

    fn work(
        &self,
        mut readable: Buffers,
        writable: &Buffers,
        kind: &mut Option<Kind>,
    ) -> Result<Work, Failure> {
        let header = readable.split_front(HEADER_BYTES).ok_or(Status::IoErr)?;
        let mut bytes = [0; HEADER_BYTES as usize];
        header.copy_to(self.guard, &mut bytes)?;
        let header = Header::parse(&bytes);
        *kind = header.kind;
        match header.kind.ok_or(Status::Unsupported)? {
            Kind::Read => {
                let offset = self
                    .terms
                    .transfer_offset(header.sector, writable.total_len())?;
                let data = self.pin(writable, Access::Write)?;
                Ok(Work::Read { offset, data })
            }
            Kind::Write => {
                self.terms.writable()?;
                let offset = self
                    .terms
                    .transfer_offset(header.sector, readable.total_len())?;
                let data = self.pin(&readable, Access::Read)?;
                Ok(Work::Write { offset, data })
            }
            Kind::Flush => Ok(Work::Flush),
            Kind::GetId => {
                let written = writable.copy_from(self.guard, self.id)?;
                let written = u32::try_from(written).unwrap_or(0);
                Ok(Work::Answer {
                    status: Status::Ok,
                    written,
                })
            }
            Kind::Discard => Ok(Work::Discard(self.segments(Kind::Discard, &readable)?)),
            Kind::WriteZeroes => Ok(Work::WriteZeroes(
                self.segments(Kind::WriteZeroes, &readable)?,
            )),
        }
    }

    fn pin(&self, buffers: &Buffers, access: Access) -> Result<PinList, AccessError> {
        let mut pins = PinList::new();
        self.guard.pin_list(buffers, access, &mut pins)?;
        Ok(pins)
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
