// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a disk makes of its requests, and carrying one out on the backend.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ebbtide_block::{LocalDisk, Op};
use ebbtide_gate::Gate;
use ebbtide_iothread::Local;
use ebbtide_memory::{PinList, ReadGuard};

use super::metrics::Counters;
use super::prepare::{AnswerPlace, Job, Preparation, Work};
use super::request::{ID_BYTES, Kind, Segments, Status, Terms};
use crate::flights::Flights;
use crate::service::{Answered, Begun, Service, Unanswerable};
use crate::virtq::Chain;

/// The requests of one queue.
pub(super) struct Requests {
    pub local: Local,
    pub disk: LocalDisk,
    pub terms: Terms,
    pub id: [u8; ID_BYTES],
    pub counters: Arc<Counters>,
    pub flights: Arc<Flights>,
    /// Which queue it is.
    pub queue: u16,
    /// The activation's: once it is closed nobody waits for data.
    pub gate: Arc<Gate>,
    /// How the driver set the cache, if it can.
    pub writeback: Arc<AtomicBool>,
    /// The driver can flush: without that, every write is flushed for it (5.2.6.2).
    pub flushes: bool,
    /// Zeroed ranges may give space back.
    pub may_unmap: bool,
}

/// The right to the guest's memory, given up when the chain is given back.
type Memory = (AnswerPlace, PinList);

/// A request that the backend is done with.
pub(super) struct Carried {
    head: u16,
    kind: Option<Kind>,
    status: Status,
    /// Bytes asked to be moved.
    data_bytes: u32,
    /// As many of them are in the driver's memory.
    data_written: u32,
    began: Instant,
    memory: Memory,
}

impl Service for Requests {
    type Job = (Job, Instant);
    type Carried = Carried;
    type Kept = Memory;

    fn begin(
        &self,
        guard: &ReadGuard<'_>,
        chain: Chain,
    ) -> Result<Begun<(Job, Instant), Memory>, Unanswerable> {
        let preparation = Preparation {
            terms: &self.terms,
            id: &self.id,
            guard,
        };
        let prepared = preparation
            .prepare(chain)
            .inspect_err(|_| self.counters.count(&self.counters.malformed))?;
        if prepared.bad_memory {
            self.counters.count(&self.counters.bad_memory);
        }
        self.counters.begin();
        let (job, began) = (prepared.job, self.local.turn_time());
        let Work::Answer { status, written } = job.work else {
            self.flights.begin(self.queue, job.head, began, job.pins());
            return Ok(Begun::Job((job, began)));
        };
        let moved = (status == Status::Ok).then_some(u64::from(written));
        self.count(job.kind, moved, began);
        Ok(Begun::Answered(Answered {
            head: job.head,
            written: job.answer.give(status, written),
            kept: (job.answer, PinList::new()),
        }))
    }

    fn refuse(
        &self,
        guard: &ReadGuard<'_>,
        chain: Chain,
    ) -> Result<Answered<Memory>, Unanswerable> {
        let head = chain.head;
        let answer = AnswerPlace::of(guard, chain)
            .inspect_err(|_| self.counters.count(&self.counters.malformed))?;
        self.counters.count(&self.counters.refused);
        Ok(Answered {
            head,
            written: answer.give(Status::IoErr, 0),
            kept: (answer, PinList::new()),
        })
    }

    async fn carry_out(self: Rc<Self>, (job, began): (Job, Instant)) -> Carried {
        let Job {
            head,
            kind,
            data_bytes,
            work,
            answer,
        } = job;
        let reads = matches!(work, Work::Read { .. });
        // Boxed, to keep the future of a read small: it is moved, and reads are most of what there is.
        let (result, data) = match work {
            Work::Read { offset, data } => self.disk.submit(Op::Read { offset }, data).await,
            Work::Write { offset, data } => {
                let (written, data) = self.disk.submit(Op::Write { offset }, data).await;
                if written.is_ok() && !self.is_written_back() {
                    (Box::pin(self.flush()).await, data)
                } else {
                    (written, data)
                }
            }
            other => (Box::pin(self.perform(other)).await, PinList::new()),
        };
        let status = match &result {
            Ok(()) => Status::Ok,
            Err(error) => status_of(error),
        };
        let data_written = if reads && result.is_ok() {
            data_bytes
        } else {
            0
        };
        Carried {
            head,
            kind,
            status,
            data_bytes,
            data_written,
            began,
            memory: (answer, data),
        }
    }

    fn answer(&self, carried: &Carried) -> u32 {
        let (answer, _) = &carried.memory;
        answer.give(carried.status, carried.data_written)
    }

    fn end(&self, carried: Carried) -> (u16, Memory) {
        self.flights.end(self.queue, carried.head);
        let moved = (carried.status == Status::Ok).then_some(u64::from(carried.data_bytes));
        self.count(carried.kind, moved, carried.began);
        (carried.head, carried.memory)
    }
}

impl Requests {
    /// An answer is written; `moved` bytes of data, or `None`: it failed.
    fn count(&self, kind: Option<Kind>, moved: Option<u64>, began: Instant) {
        self.counters.end();
        match kind {
            Some(kind) => {
                let latency = self.local.turn_time().saturating_duration_since(began);
                self.counters.answered(kind, moved, latency);
            }
            None => self.counters.count(&self.counters.unsupported),
        }
    }

    async fn perform(&self, work: Work) -> io::Result<()> {
        match work {
            Work::Flush => self.flush().await,
            Work::Discard(segments) => self.ranges(segments, false).await,
            Work::WriteZeroes(segments) => self.ranges(segments, true).await,
            Work::Read { .. } | Work::Write { .. } | Work::Answer { .. } => Ok(()),
        }
    }

    async fn ranges(&self, segments: Segments, zero: bool) -> io::Result<()> {
        for segment in segments {
            // All of them may take minutes on a host that zeroes by writing; a reset waits for one at most.
            if self.gate.is_closed() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let (offset, len) = (segment.offset, segment.len);
            let op = if zero {
                let may_unmap = segment.unmap && self.may_unmap;
                Op::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                }
            } else {
                Op::Discard { offset, len }
            };
            self.disk.submit(op, PinList::new()).await.0?;
        }
        if zero && !self.is_written_back() {
            return self.flush().await;
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        self.disk.submit(Op::Flush, PinList::new()).await.0
    }

    /// Whether the driver takes care that what was written becomes durable. Otherwise it is so at once.
    fn is_written_back(&self) -> bool {
        self.flushes && self.writeback.load(Ordering::Relaxed)
    }
}

fn status_of(error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::Unsupported => Status::Unsupported,
        _ => Status::IoErr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of_future<A, B, F>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn the_future_of_a_request_is_small() {
        // It is moved once for each request.
        let bytes = bytes_of_future(Requests::carry_out);
        assert!(bytes <= 1024, "{bytes} bytes; job {}", size_of::<Job>());
    }
}
