// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that are given up while operations are under way.
//!
//! ```text
//!   in use ──abandon──► given up, operations under way ──the last one answers──► answered
//!                       (for ever, if the backend is dead)
//! ```
//!
//! An operation that the kernel or a dead backend has cannot be taken back: it may still write to the memory it was
//! given. Giving a disk up therefore ends nothing that is under way. It makes sure that nothing new begins, be it the next
//! call of the kernel for an operation that takes several, and leaves an [`Abandoned`] to whoever keeps what cannot be
//! freed: the requests go on owning their pins and leases.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::op::OpKind;

/// Operations of one disk that have begun and have not ended, by kind. One whose future was dropped is not counted any
/// more; what it gave to the kernel is the ring's to keep until the kernel has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InFlight {
    /// Reads.
    pub reads: u32,
    /// Writes.
    pub writes: u32,
    /// Flushes.
    pub flushes: u32,
    /// Discards.
    pub discards: u32,
    /// Write-zeroes operations.
    pub write_zeroes: u32,
}

impl InFlight {
    /// All kinds together.
    pub fn total(&self) -> u32 {
        let InFlight {
            reads,
            writes,
            flushes,
            discards,
            write_zeroes,
        } = *self;
        [reads, writes, flushes, discards, write_zeroes]
            .into_iter()
            .fold(0, u32::saturating_add)
    }
}

impl fmt::Display for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InFlight {
            reads,
            writes,
            flushes,
            discards,
            write_zeroes,
        } = *self;
        let kinds = [
            (reads, "reads"),
            (writes, "writes"),
            (flushes, "flushes"),
            (discards, "discards"),
            (write_zeroes, "write-zeroes"),
        ];
        let mut some = kinds.iter().filter(|(count, _)| *count > 0);
        let Some((count, kind)) = some.next() else {
            return f.write_str("nothing");
        };
        write!(f, "{count} {kind}")?;
        some.try_for_each(|(count, kind)| write!(f, ", {count} {kind}"))
    }
}

/// The life of a backend, shared by all that use it.
#[derive(Debug, Default)]
pub(crate) struct Life {
    size_bytes: AtomicU64,
    abandoned: AtomicBool,
    reads: AtomicU32,
    writes: AtomicU32,
    flushes: AtomicU32,
    discards: AtomicU32,
    write_zeroes: AtomicU32,
}

impl Life {
    /// Of a disk of `size_bytes`.
    pub(crate) fn new(size_bytes: u64) -> Arc<Life> {
        Arc::new(Life {
            size_bytes: AtomicU64::new(size_bytes),
            ..Life::default()
        })
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// The disk has `size_bytes` at least.
    pub(crate) fn grown(&self, size_bytes: u64) {
        self.size_bytes.fetch_max(size_bytes, Ordering::AcqRel);
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// # Errors
    /// `NotConnected`: it was given up, nothing more is to be begun.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.is_abandoned() {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "the disk was given up",
            ));
        }
        Ok(())
    }

    /// An operation begins.
    pub(crate) fn begin(&self, kind: OpKind) {
        // Before the caller looks whether the disk was given up: who gave it up counts either all that got past that,
        // or more.
        self.counter(kind).fetch_add(1, Ordering::SeqCst);
    }

    /// It has ended, or its future was dropped.
    pub(crate) fn end(&self, kind: OpKind) {
        self.counter(kind).fetch_sub(1, Ordering::SeqCst);
    }

    fn counter(&self, kind: OpKind) -> &AtomicU32 {
        match kind {
            OpKind::Read => &self.reads,
            OpKind::Write => &self.writes,
            OpKind::Flush => &self.flushes,
            OpKind::Discard => &self.discards,
            OpKind::WriteZeroes => &self.write_zeroes,
        }
    }

    pub(crate) fn in_flight(&self) -> InFlight {
        InFlight {
            reads: self.reads.load(Ordering::SeqCst),
            writes: self.writes.load(Ordering::SeqCst),
            flushes: self.flushes.load(Ordering::SeqCst),
            discards: self.discards.load(Ordering::SeqCst),
            write_zeroes: self.write_zeroes.load(Ordering::SeqCst),
        }
    }
}

/// A disk that was given up, for whoever keeps what its operations still own. It frees nothing, and there is no way to
/// make it: what does not answer stays.
#[derive(Debug, Clone)]
#[must_use = "says what must be kept"]
pub struct Abandoned {
    life: Arc<Life>,
}

impl Abandoned {
    pub(crate) fn of(life: &Arc<Life>) -> Abandoned {
        life.abandoned.store(true, Ordering::SeqCst);
        Abandoned {
            life: Arc::clone(life),
        }
    }

    /// What has not answered.
    pub fn in_flight(&self) -> InFlight {
        self.life.in_flight()
    }

    /// Whether all has answered after all. Then it stays so, and what the requests owned goes as it always does.
    pub fn is_answered(&self) -> bool {
        self.in_flight().total() == 0
    }
}
