// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gate itself: enter, leave, close.

use std::fmt;
use std::sync::Arc;

use ebbtide_models::seeded;

use crate::drain::{Drained, Stalled, Waiters};
use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::word::{self, CLOSED, Entry, Held, WAITING};

/// A door that is shut once. See the [crate documentation](crate).
pub struct Gate {
    name: Box<str>,
    word: AtomicU64,
    waiters: Mutex<Waiters>,
}

impl Gate {
    /// An open gate. `name` is what reports call the thing behind it, for example `vda`.
    pub fn new(name: impl Into<String>) -> Arc<Gate> {
        Arc::new(Gate {
            name: name.into().into_boxed_str(),
            word: AtomicU64::new(0),
            waiters: Mutex::new(Waiters::default()),
        })
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A lease on what is behind the gate, or `None` once it is closed (for good).
    ///
    /// `None` also when 2³⁰-1 register accesses or 2³²-1 requests are already inside. Never waits.
    pub fn enter(self: &Arc<Self>, kind: Entry) -> Option<Lease> {
        self.admit(kind).then(|| Lease {
            gate: Arc::clone(self),
            kind,
        })
    }

    /// Shuts the gate; true for the one call that did it. Never waits, never re-opens.
    ///
    /// Wakes the drainers when nobody is inside.
    pub fn close(&self) -> bool {
        // AcqRel: what the closer wrote before is seen by who finds the gate closed, and the other way round.
        let before = self.word.fetch_or(CLOSED, Ordering::AcqRel);
        if before & CLOSED != 0 {
            return false;
        }
        self.wake_if_drained(before | CLOSED);
        true
    }

    /// True once [`close`](Self::close) was called.
    pub fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// True once the gate is closed and nobody is inside; then it stays so, and everything done under a lease
    /// happened before this call returned.
    pub fn is_drained(&self) -> bool {
        word::is_drained(self.word.load(Ordering::Acquire))
    }

    /// Who is inside now. On an open gate the answer is out of date as soon as it is given.
    pub fn held(&self) -> Held {
        Held::of(self.word.load(Ordering::Acquire))
    }

    /// Resolves once the gate is closed and nobody is inside. Any number of tasks may wait; the future may be
    /// dropped at any time. It does not close the gate.
    pub fn drained(self: &Arc<Self>) -> Drained {
        Drained::new(Arc::clone(self))
    }

    /// As [`drained`](Self::drained), blocking this thread until `deadline` at most.
    ///
    /// # Errors
    /// [`Stalled`] with what is still inside. A report only: nothing is freed, waiting again is fine.
    pub fn drain_blocking(self: &Arc<Self>, deadline: std::time::Instant) -> Result<(), Stalled> {
        crate::drain::block(self, deadline)
    }

    pub(crate) fn waiters(&self) -> &Mutex<Waiters> {
        &self.waiters
    }

    /// Announces a drainer; true when there is nothing left to wait for.
    ///
    /// The caller holds the lock of [`waiters`](Self::waiters) until its waker is in there: whoever empties the
    /// gate after this sees WAITING and takes that lock, whoever did before is seen here.
    pub(crate) fn announce_waiter(&self) -> bool {
        if seeded!("drain_wake_lost") {
            let seen = self.word.load(Ordering::Acquire);
            self.word.fetch_or(WAITING, Ordering::AcqRel);
            return word::is_drained(seen);
        }
        word::is_drained(self.word.fetch_or(WAITING, Ordering::AcqRel))
    }

    /// Counts one in, unless closed or full. Pairs with [`leave`](Self::leave).
    pub(crate) fn admit(&self, kind: Entry) -> bool {
        if seeded!("enter_check_then_add") {
            let open = word::entered(self.word.load(Ordering::Acquire), kind).is_some();
            if open {
                self.word.fetch_add(kind.unit(), Ordering::Acquire);
            }
            return open;
        }
        // One compare-and-swap decides: adding first and taking back when closed would let a drained gate
        // count somebody again, if only for a moment.
        let mut seen = self.word.load(Ordering::Relaxed);
        while let Some(next) = word::entered(seen, kind) {
            // Acquire: what is done inside stays after the entry.
            match self
                .word
                .compare_exchange_weak(seen, next, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Counts one out.
    pub(crate) fn leave(&self, kind: Entry) {
        // Release: what was done inside happens before the drain that this may complete.
        let order = if seeded!("leave_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        let before = self.word.fetch_sub(kind.unit(), order);
        debug_assert!(
            !Held::of(before).is_empty(),
            "gate `{}` left more often than entered",
            self.name
        );
        self.wake_if_drained(before.wrapping_sub(kind.unit()));
    }

    fn wake_if_drained(&self, word: u64) {
        if word::is_drained(word) && word & WAITING != 0 {
            crate::drain::wake_all(&self.waiters);
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("name", &self.name)
            .field("closed", &self.is_closed())
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}

/// The right to use what is behind a [`Gate`], until dropped.
///
/// The last lease dropped on a closed gate wakes those who wait for the drain. A lease that is forgotten
/// (`mem::forget`) keeps the gate from ever draining; it frees nothing early.
#[derive(Debug)]
#[must_use = "a lease that is dropped at once protects nothing"]
pub struct Lease {
    gate: Arc<Gate>,
    kind: Entry,
}

impl Lease {
    /// The gate it is a lease of.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// What it was entered for.
    pub fn kind(&self) -> Entry {
        self.kind
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.gate.leave(self.kind);
    }
}
