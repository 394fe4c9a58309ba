// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The queues that name pages: into the balloon, out of it, free (virtio 1.3, 5.5.6.1 and 5.5.6.7).
//!
//! A chain may name any number of pages. It is worked through in steps, between which others have their turn and a reset
//! ends it.

use std::rc::Rc;
use std::sync::Arc;

use ebbtide_gate::Gate;
use ebbtide_iothread::Local;
use ebbtide_memory::{AccessError, AddressSpace, Discard, Gpa, ReadGuard, Reader};

use super::PAGE_BYTES;
use super::metrics::add;
use super::pages::{Piece, piece, push};
use super::shared::Shared;
use crate::service::{Answered, Begun, Service, Setup, Unanswerable};
use crate::sync::lock;
use crate::virtq::{Buffers, Chain};

/// Pages of one step, which is how many a Linux driver names at once.
const STEP_PAGES: u32 = 256;
/// Bytes of one discard of reported pages.
const STEP_BYTES: u64 = 32 << 20;

/// What the pages named on a queue are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Inflate,
    Deflate,
    Report,
}

/// The chains of one queue.
pub(super) struct Pages {
    kind: Kind,
    shared: Arc<Shared>,
    local: Local,
    gate: Arc<Gate>,
    space: Arc<AddressSpace>,
    reader: Reader,
}

/// A chain to work through.
pub(super) struct Job {
    head: u16,
    buffers: Buffers,
}

impl Pages {
    pub(super) fn new(kind: Kind, shared: Arc<Shared>, local: Local, setup: &Setup) -> Pages {
        Pages {
            kind,
            shared,
            local,
            gate: Arc::clone(&setup.gate),
            space: Arc::clone(&setup.space),
            reader: setup.space.memory().register(),
        }
    }
}

impl Service for Pages {
    type Job = Job;
    type Kept = ();

    fn begin(
        &self,
        guard: &ReadGuard<'_>,
        chain: &mut Chain,
    ) -> Result<Begun<Job, ()>, Unanswerable> {
        let Chain {
            head,
            readable,
            writable,
        } = chain.take();
        let buffers = match self.kind {
            Kind::Inflate | Kind::Deflate => readable,
            Kind::Report => writable,
        };
        // A list that is not in RAM is a wrong chain; found out before any of it is done.
        if self.kind != Kind::Report {
            let last = buffers.last().copied();
            let first = buffers.first().copied();
            for (gpa, len) in [first, last].into_iter().flatten() {
                let end = Gpa(gpa.0 + u64::from(len) - 1);
                for gpa in [gpa, end] {
                    self.check(guard, head, gpa)?;
                }
            }
        }
        Ok(Begun::Job(Job { head, buffers }))
    }

    /// Nothing is done with the pages, which the driver has back when its device is gone.
    fn refuse(&self, _guard: &ReadGuard<'_>, chain: Chain) -> Result<Answered<()>, Unanswerable> {
        Ok(Answered {
            head: chain.head,
            written: 0,
            kept: (),
        })
    }

    async fn carry_out(self: Rc<Self>, job: Job) -> Answered<()> {
        let Job { head, mut buffers } = job;
        while !self.gate.is_closed() {
            let pieces = match self.kind {
                Kind::Report => self.reported(&mut buffers),
                Kind::Inflate | Kind::Deflate => self.named(&mut buffers),
            };
            let Some(pieces) = pieces else { break };
            for piece in pieces {
                self.discard(piece);
            }
            self.local.yield_now().await;
        }
        Answered {
            head,
            written: 0,
            kept: (),
        }
    }

    fn broken(&self) {
        add(&self.shared.counters.malformed, 1);
    }
}

impl Pages {
    fn check(&self, guard: &ReadGuard<'_>, head: u16, gpa: Gpa) -> Result<(), Unanswerable> {
        match guard.read_bytes(gpa, &mut [0]) {
            // The guest has just given the memory of its own list back.
            Ok(()) | Err(AccessError::Unplugged { .. }) => Ok(()),
            Err(source) => Err(Unanswerable::Memory { head, source }),
        }
    }

    /// Reads the next page numbers; what they allow to be given back. `None`: there are no more.
    fn named(&self, buffers: &mut Buffers) -> Option<Vec<Piece>> {
        let counters = &self.shared.counters;
        let count = (buffers.total_len() / 4).min(STEP_PAGES);
        let list = buffers.split_front(count * 4).filter(|_| count > 0)?;
        let mut bytes = vec![0; (count * 4) as usize];
        let guard = self.space.read(&self.reader);
        if list.copy_to(&guard, &mut bytes).is_err() {
            // Gone since it was looked at.
            add(&counters.not_ram, count.into());
            return None;
        }
        let (numbers, _) = bytes.as_chunks::<4>();
        let mut pages: Vec<_> = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
        // A driver names them from the highest down.
        pages.sort_unstable();
        let mut pieces = Vec::new();
        let mut tracker = lock(&self.shared.tracker);
        for page in pages {
            let gpa = Gpa(u64::from(page) * PAGE_BYTES);
            let Some(page) = piece(&guard, gpa, PAGE_BYTES).filter(is_page) else {
                add(&counters.not_ram, 1);
                continue;
            };
            if self.kind == Kind::Deflate {
                tracker.deflate(&page);
                add(&counters.deflated_pages, 1);
                continue;
            }
            add(&counters.inflated_pages, 1);
            if let Some(whole) = tracker.inflate(page) {
                push(&mut pieces, whole);
            }
        }
        Some(pieces)
    }

    /// The next part of reported memory. `None`: there is no more.
    fn reported(&self, buffers: &mut Buffers) -> Option<Vec<Piece>> {
        let counters = &self.shared.counters;
        let &(gpa, len) = buffers.first()?;
        let len = u64::from(len).min(STEP_BYTES);
        let guard = self.space.read(&self.reader);
        let found = piece(&guard, gpa, len);
        let done = found.as_ref().map_or(len, |p| p.range.end - p.range.start);
        buffers.split_front(u32::try_from(done).ok()?)?;
        let Some(found) = found else {
            add(&counters.not_ram, 1);
            return Some(Vec::new());
        };
        add(&counters.reported_bytes, done);
        // Whole pages of the host that lie inside.
        let page = found.block.page_size_bytes();
        let start = found.range.start.next_multiple_of(page);
        let end = found.range.end / page * page;
        let whole = (start < end).then_some(Piece {
            range: start..end,
            ..found
        });
        Some(whole.into_iter().collect())
    }

    fn discard(&self, piece: Piece) {
        let Piece { block, range } = piece;
        let counters = &self.shared.counters;
        let bytes = range.end - range.start;
        match block.discard_pages(range) {
            Ok(Discard::Done) => add(&counters.discarded_bytes, bytes),
            Ok(Discard::Disabled) => add(&counters.kept_bytes, bytes),
            Ok(Discard::NotThere) => add(&counters.not_ram, 1),
            Err(error) => {
                add(&counters.refused_bytes, bytes);
                if let Some(suppressed) = self.shared.refusals.allow() {
                    tracing::warn!(device = &*self.shared.id, suppressed, %error, "the host does not take pages back");
                }
            }
        }
    }
}

/// All of the page is RAM of one block, and it is one of its pages.
fn is_page(piece: &Piece) -> bool {
    piece.range.end - piece.range.start == PAGE_BYTES
        && piece.range.start.is_multiple_of(PAGE_BYTES)
}
