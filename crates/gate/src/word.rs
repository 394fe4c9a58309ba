// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one word a gate consists of: `closed:1 | waiting:1 | mmio:30 | io:32`.
//!
//! Everything that decides something about the gate is a read-modify-write of this word, so all decisions have
//! one order.

use std::fmt;

/// Set by `close`, never cleared.
pub(crate) const CLOSED: u64 = 1 << 63;
/// Set by the first drainer that has to wait, never cleared: without it the last one out takes no lock.
pub(crate) const WAITING: u64 = 1 << 62;

const IO_BITS: u32 = 32;
const IO_MASK: u64 = (1 << IO_BITS) - 1;
const MMIO_MASK: u64 = !(CLOSED | WAITING | IO_MASK);

/// What somebody enters a gate for. The two are counted apart because they drain differently: register accesses
/// end in CPU time, I/O when its backend answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// A register access by a vCPU thread: never waits while it is inside.
    Mmio,
    /// A request in flight, a timer, a task of an iothread: may be inside for as long as the I/O takes.
    Io,
}

impl Entry {
    /// What one lease of this kind adds to the word.
    pub(crate) const fn unit(self) -> u64 {
        match self {
            Entry::Mmio => 1 << IO_BITS,
            Entry::Io => 1,
        }
    }

    const fn mask(self) -> u64 {
        match self {
            Entry::Mmio => MMIO_MASK,
            Entry::Io => IO_MASK,
        }
    }
}

/// The word after one more `kind` has entered; `None` when the gate is closed or that count is full.
pub(crate) const fn entered(word: u64, kind: Entry) -> Option<u64> {
    if word & CLOSED != 0 || word & kind.mask() == kind.mask() {
        return None;
    }
    Some(word + kind.unit())
}

/// Closed, and nobody inside.
pub(crate) const fn is_drained(word: u64) -> bool {
    word & CLOSED != 0 && word & (MMIO_MASK | IO_MASK) == 0
}

/// How many leases of each kind a gate has given out and not got back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Register accesses under way.
    pub mmio: u32,
    /// Requests, timers and tasks under way.
    pub io: u32,
}

impl Held {
    pub(crate) const fn of(word: u64) -> Held {
        Held {
            mmio: ((word & MMIO_MASK) >> IO_BITS) as u32,
            io: (word & IO_MASK) as u32,
        }
    }

    /// True when nobody is inside.
    pub const fn is_empty(self) -> bool {
        self.mmio == 0 && self.io == 0
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} mmio, {} io", self.mmio, self.io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_overlap_and_fill_the_word() {
        assert_eq!(CLOSED | WAITING | MMIO_MASK | IO_MASK, u64::MAX);
        assert_eq!(CLOSED ^ WAITING ^ MMIO_MASK ^ IO_MASK, u64::MAX);
        assert_eq!(MMIO_MASK & Entry::Mmio.unit(), Entry::Mmio.unit());
    }

    #[test]
    fn a_full_count_refuses_only_its_own_kind() {
        assert_eq!(entered(IO_MASK, Entry::Io), None);
        assert_eq!(
            entered(IO_MASK, Entry::Mmio),
            Some(IO_MASK + Entry::Mmio.unit())
        );
        assert_eq!(entered(MMIO_MASK, Entry::Mmio), None);
        assert_eq!(entered(MMIO_MASK, Entry::Io), Some(MMIO_MASK + 1));
        assert_eq!(
            Held::of(MMIO_MASK | 7),
            Held {
                mmio: (1 << 30) - 1,
                io: 7
            }
        );
    }

    #[test]
    fn closed_admits_nobody_and_waiting_is_no_lease() {
        assert_eq!(entered(CLOSED, Entry::Io), None);
        assert_eq!(entered(CLOSED | 5, Entry::Mmio), None);
        assert!(is_drained(CLOSED | WAITING));
        assert!(!is_drained(WAITING));
        assert!(!is_drained(CLOSED | 1));
        assert!(!is_drained(CLOSED | Entry::Mmio.unit()));
    }
}
