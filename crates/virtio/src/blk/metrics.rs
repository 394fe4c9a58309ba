// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a disk has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::request::Kind;

/// The counters of one kind of request, since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KindMetrics {
    /// Requests answered.
    pub requests: u64,
    /// Of those, how many with an error.
    pub failures: u64,
    /// Bytes of data of those that succeeded.
    pub bytes: u64,
    /// Time from taking to answering, all requests together; as exact as the turns of the iothread are short.
    pub latency_sum: Duration,
    /// The longest of those times.
    pub latency_max: Duration,
}

/// The counters of a disk, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlkMetrics {
    /// Reads.
    pub read: KindMetrics,
    /// Writes.
    pub write: KindMetrics,
    /// Flushes.
    pub flush: KindMetrics,
    /// Discards.
    pub discard: KindMetrics,
    /// Write-zeroes requests.
    pub write_zeroes: KindMetrics,
    /// Requests for the serial number.
    pub get_id: KindMetrics,
    /// Requests of unknown types.
    pub unsupported: u64,
    /// Requests whose data did not lie in RAM; counted as failures, too.
    pub bad_memory: u64,
    /// Chains no answer could be found for: the device wanted a reset.
    pub malformed: u64,
    /// Requests that had not begun when the device was removed: answered with an error.
    pub refused: u64,
    /// Requests in work now.
    pub in_flight: u64,
}

#[derive(Debug, Default)]
struct KindCounters {
    requests: AtomicU64,
    failures: AtomicU64,
    bytes: AtomicU64,
    latency_sum_ns: AtomicU64,
    latency_max_ns: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    kinds: [KindCounters; 6],
    pub unsupported: AtomicU64,
    pub bad_memory: AtomicU64,
    pub malformed: AtomicU64,
    pub refused: AtomicU64,
    in_flight: AtomicU64,
}

impl Counters {
    pub(super) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// `bytes` of data were moved, or `None`: it failed.
    pub(super) fn answered(&self, kind: Kind, bytes: Option<u64>, latency: Duration) {
        let Some(counters) = self.kinds.get(index(kind)) else {
            return;
        };
        counters.requests.fetch_add(1, Ordering::Relaxed);
        match bytes {
            Some(bytes) => counters.bytes.fetch_add(bytes, Ordering::Relaxed),
            None => counters.failures.fetch_add(1, Ordering::Relaxed),
        };
        let latency_ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        counters
            .latency_sum_ns
            .fetch_add(latency_ns, Ordering::Relaxed);
        // Seldom so: the exchange is spared.
        if latency_ns > counters.latency_max_ns.load(Ordering::Relaxed) {
            counters
                .latency_max_ns
                .fetch_max(latency_ns, Ordering::Relaxed);
        }
    }

    pub(super) fn count(&self, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> BlkMetrics {
        let kind = |kind| {
            self.kinds
                .get(index(kind))
                .map(KindCounters::snapshot)
                .unwrap_or_default()
        };
        BlkMetrics {
            read: kind(Kind::Read),
            write: kind(Kind::Write),
            flush: kind(Kind::Flush),
            discard: kind(Kind::Discard),
            write_zeroes: kind(Kind::WriteZeroes),
            get_id: kind(Kind::GetId),
            unsupported: self.unsupported.load(Ordering::Relaxed),
            bad_memory: self.bad_memory.load(Ordering::Relaxed),
            malformed: self.malformed.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
        }
    }
}

impl KindCounters {
    fn snapshot(&self) -> KindMetrics {
        KindMetrics {
            requests: self.requests.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            latency_sum: Duration::from_nanos(self.latency_sum_ns.load(Ordering::Relaxed)),
            latency_max: Duration::from_nanos(self.latency_max_ns.load(Ordering::Relaxed)),
        }
    }
}

fn index(kind: Kind) -> usize {
    match kind {
        Kind::Read => 0,
        Kind::Write => 1,
        Kind::Flush => 2,
        Kind::Discard => 3,
        Kind::WriteZeroes => 4,
        Kind::GetId => 5,
    }
}
