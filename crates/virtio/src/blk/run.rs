// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carrying out one job on the backend.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ebbtide_block::{LocalDisk, Op};
use ebbtide_gate::Gate;
use ebbtide_memory::PinList;

use super::metrics::Counters;
use super::prepare::{AnswerPlace, Job, Work};
use super::request::{Kind, Segments, Status};

/// Carries jobs out.
#[derive(Clone)]
pub(super) struct Runner {
    disk: Rc<LocalDisk>,
    /// The activation's: once it is closed nobody waits for an answer.
    gate: Arc<Gate>,
    /// How the driver set the cache, if it can.
    writeback: Arc<AtomicBool>,
    /// The driver can flush: without that, every write is flushed for it (5.2.6.2).
    flushes: bool,
    /// Zeroed ranges may give space back.
    may_unmap: bool,
}

/// A job whose status byte is written.
pub(super) struct Answered {
    pub head: u16,
    /// Bytes of the chain the device wrote.
    pub written: u32,
    kind: Option<Kind>,
    /// Bytes of data moved; `None`: it failed.
    moved: Option<u64>,
    /// The right to the guest's memory, given up when the chain is given back.
    _memory: (AnswerPlace, PinList),
}

impl Answered {
    /// The answer to a request that needs no backend.
    pub(super) fn at_once(
        head: u16,
        kind: Option<Kind>,
        answer: AnswerPlace,
        status: Status,
        written: u32,
    ) -> Answered {
        let moved = (status == Status::Ok).then_some(u64::from(written));
        let written = answer.give(status, written);
        Answered {
            head,
            written,
            kind,
            moved,
            _memory: (answer, PinList::new()),
        }
    }

    pub(super) fn count(&self, counters: &Counters, latency: Duration) {
        match self.kind {
            Some(kind) => counters.answered(kind, self.moved, latency),
            None => counters.count(&counters.unsupported),
        }
    }
}

impl Runner {
    pub(super) fn new(
        disk: LocalDisk,
        gate: Arc<Gate>,
        writeback: Arc<AtomicBool>,
        flushes: bool,
        may_unmap: bool,
    ) -> Runner {
        Runner {
            disk: Rc::new(disk),
            gate,
            writeback,
            flushes,
            may_unmap,
        }
    }

    /// Carries a job out and answers it.
    pub(super) async fn run(self, job: Job) -> Answered {
        let Job {
            head,
            kind,
            data_bytes,
            work,
            answer,
        } = job;
        let reads = matches!(work, Work::Read { .. });
        let (result, data) = self.perform(work).await;
        let status = match &result {
            Ok(()) => Status::Ok,
            Err(error) => status_of(error),
        };
        let data_written = if reads && result.is_ok() {
            data_bytes
        } else {
            0
        };
        let written = answer.give(status, data_written);
        let moved = result.is_ok().then_some(u64::from(data_bytes));
        Answered {
            head,
            written,
            kind,
            moved,
            _memory: (answer, data),
        }
    }

    async fn perform(&self, work: Work) -> (io::Result<()>, PinList) {
        match work {
            Work::Read { offset, data } => self.disk.submit(Op::Read { offset }, data).await,
            Work::Write { offset, data } => {
                let (written, data) = self.disk.submit(Op::Write { offset }, data).await;
                (self.through(written).await, data)
            }
            // Boxed, to keep the future of every read and write small.
            Work::Flush => Box::pin(self.disk.submit(Op::Flush, PinList::new())).await,
            Work::Discard(segments) => {
                (Box::pin(self.ranges(segments, false)).await, PinList::new())
            }
            Work::WriteZeroes(segments) => {
                (Box::pin(self.ranges(segments, true)).await, PinList::new())
            }
            Work::Answer { .. } => (Ok(()), PinList::new()),
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
        if zero {
            self.through(Ok(())).await
        } else {
            Ok(())
        }
    }

    /// What was written is durable at once unless the driver takes care of that itself.
    async fn through(&self, written: io::Result<()>) -> io::Result<()> {
        written?;
        if self.flushes && self.writeback.load(Ordering::Relaxed) {
            return Ok(());
        }
        Box::pin(self.disk.submit(Op::Flush, PinList::new()))
            .await
            .0
    }
}

fn status_of(error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::Unsupported => Status::Unsupported,
        _ => Status::IoErr,
    }
}
