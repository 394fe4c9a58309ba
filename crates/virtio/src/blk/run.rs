// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a disk makes of its requests, and carrying one out on the backend.

use std::cell::Cell;
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
use super::prepare::{AnswerPlace, Job, Preparation, Request, Spare, Work};
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
    pub spare: Spare,
    /// The last time of a turn that was asked for, and what it is in the flights' nanoseconds.
    pub turn: Cell<Option<(Instant, u64)>>,
}

impl Service for Requests {
    type Job = Job;
    type Kept = Job;

    fn begin(
        &self,
        guard: &ReadGuard<'_>,
        chain: &mut Chain,
    ) -> Result<Begun<Job, Job>, Unanswerable> {
        let mut job = self.spare.take();
        let preparation = Preparation {
            terms: &self.terms,
            id: &self.id,
            guard,
        };
        let good_memory = preparation.prepare(chain, &mut job)?;
        if !good_memory {
            self.counters.bad_memory.add(1);
        }
        self.counters.begin();
        let request = &mut *job.request;
        request.began_ns = self.turn_ns();
        if !matches!(request.work, Work::Done) {
            let (head, began_ns) = (request.head, request.began_ns);
            self.flights.begin(self.queue, head, began_ns, job.pins());
            return Ok(Begun::Job(job));
        }
        self.count(request);
        Ok(Begun::Answered(Answered {
            head: request.head,
            written: 0,
            kept: job,
        }))
    }

    fn refuse(&self, guard: &ReadGuard<'_>, chain: Chain) -> Result<Answered<Job>, Unanswerable> {
        let head = chain.head;
        let mut job = self.spare.take();
        job.request.answer = AnswerPlace::of(guard, chain)?;
        job.request.status = Status::IoErr;
        job.request.written = 0;
        self.counters.refused.add(1);
        Ok(Answered {
            head,
            written: 0,
            kept: job,
        })
    }

    async fn carry_out(self: Rc<Self>, job: Job) -> Answered<Job> {
        let Job { mut request, data } = job;
        // Boxed, to keep the future of a read small: it is moved, and reads are most of what there is.
        let (result, data) = match request.work {
            Work::Read { offset } => self.disk.submit(Op::Read { offset }, data).await,
            Work::Write { offset } => {
                let (written, data) = self.disk.submit(Op::Write { offset }, data).await;
                if written.is_ok() && !self.is_written_back() {
                    (Box::pin(self.flush()).await, data)
                } else {
                    (written, data)
                }
            }
            ref mut other => {
                let work = std::mem::take(other);
                (Box::pin(self.perform(work)).await, data)
            }
        };
        match &result {
            Ok(()) if request.kind == Some(Kind::Read) => request.written = request.data_bytes,
            Ok(()) => {}
            Err(error) => request.status = status_of(error),
        }
        self.flights.end(self.queue, request.head);
        self.count(&request);
        Answered {
            head: request.head,
            written: 0,
            kept: Job { request, data },
        }
    }

    fn write_answer(&self, answered: &mut Answered<Job>) {
        let request = &answered.kept.request;
        answered.written = request.answer.give(request.status, request.written);
    }

    fn let_go(&self, kept: Job) {
        self.spare.put(kept);
    }

    fn broken(&self) {
        self.counters.malformed.add(1);
    }
}

impl Requests {
    /// The answer of a request is known.
    fn count(&self, request: &Request) {
        self.counters.end();
        match request.kind {
            Some(kind) => {
                let moved = (request.status == Status::Ok).then_some(request.data_bytes.into());
                let latency_ns = self.turn_ns().saturating_sub(request.began_ns);
                self.counters.answered(kind, moved, latency_ns);
            }
            None => self.counters.unsupported.add(1),
        }
    }

    /// The time of this turn.
    fn turn_ns(&self) -> u64 {
        let now = self.local.turn_time();
        match self.turn.get() {
            Some((at, ns)) if at == now => ns,
            _ => {
                let ns = self.flights.ns(now);
                self.turn.set(Some((now, ns)));
                ns
            }
        }
    }

    async fn perform(&self, work: Work) -> io::Result<()> {
        match work {
            Work::Flush => self.flush().await,
            Work::Discard(segments) => self.ranges(segments, false).await,
            Work::WriteZeroes(segments) => self.ranges(segments, true).await,
            Work::Read { .. } | Work::Write { .. } | Work::Done => Ok(()),
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
        assert!(bytes <= 256, "{bytes} bytes");
    }
}
