// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a disk has done, counted.

use std::sync::Arc;
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
    /// Queues the driver broke, by chains that are none or have no place for an answer: the device wanted a reset.
    pub malformed: u64,
    /// Requests that had not begun when the device was removed: answered with an error.
    pub refused: u64,
    /// Requests in work now.
    pub in_flight: u64,
}

/// One that a single thread counts: without a locked instruction. Any thread may look at it.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0
            .store(self.get().wrapping_add(count), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct KindCounters {
    requests: Counter,
    failures: Counter,
    bytes: Counter,
    latency_sum_ns: Counter,
    latency_max_ns: AtomicU64,
}

/// The counters of one queue, which is always served by the same iothread.
#[derive(Debug, Default)]
pub(super) struct Counters {
    kinds: [KindCounters; 6],
    pub unsupported: Counter,
    pub bad_memory: Counter,
    pub malformed: Counter,
    pub refused: Counter,
    begun: Counter,
    ended: Counter,
}

impl Counters {
    pub(super) fn begin(&self) {
        self.begun.add(1);
    }

    pub(super) fn end(&self) {
        self.ended.add(1);
    }

    /// `bytes` of data were moved, or `None`: it failed.
    pub(super) fn answered(&self, kind: Kind, bytes: Option<u64>, latency_ns: u64) {
        let Some(counters) = self.kinds.get(index(kind)) else {
            return;
        };
        counters.requests.add(1);
        match bytes {
            Some(bytes) => counters.bytes.add(bytes),
            None => counters.failures.add(1),
        };
        counters.latency_sum_ns.add(latency_ns);
        if latency_ns > counters.latency_max_ns.load(Ordering::Relaxed) {
            counters.latency_max_ns.store(latency_ns, Ordering::Relaxed);
        }
    }

    /// What the queues of a disk have counted.
    pub(super) fn snapshot(queues: &[Arc<Counters>]) -> BlkMetrics {
        let mut all = BlkMetrics::default();
        for queue in queues {
            queue.add_to(&mut all);
        }
        all
    }

    fn add_to(&self, all: &mut BlkMetrics) {
        let Counters {
            kinds: [read, write, flush, discard, write_zeroes, get_id],
            unsupported,
            bad_memory,
            malformed,
            refused,
            begun,
            ended,
        } = self;
        read.add_to(&mut all.read);
        write.add_to(&mut all.write);
        flush.add_to(&mut all.flush);
        discard.add_to(&mut all.discard);
        write_zeroes.add_to(&mut all.write_zeroes);
        get_id.add_to(&mut all.get_id);
        all.unsupported += unsupported.get();
        all.bad_memory += bad_memory.get();
        all.malformed += malformed.get();
        all.refused += refused.get();
        // In this order: what begins meanwhile counts, and nothing ends that has not begun.
        let ended = ended.get();
        all.in_flight += begun.get().saturating_sub(ended);
    }
}

impl KindCounters {
    fn add_to(&self, all: &mut KindMetrics) {
        let KindCounters {
            requests,
            failures,
            bytes,
            latency_sum_ns,
            latency_max_ns,
        } = self;
        all.requests += requests.get();
        all.failures += failures.get();
        all.bytes += bytes.get();
        all.latency_sum += Duration::from_nanos(latency_sum_ns.get());
        let longest = Duration::from_nanos(latency_max_ns.load(Ordering::Relaxed));
        all.latency_max = all.latency_max.max(longest);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_added_up() {
        let queues = [Arc::new(Counters::default()), Arc::default()];
        for (latency_ns, queue) in [7, 5].into_iter().zip(&queues) {
            for _ in 0..3 {
                queue.begin();
            }
            queue.end();
            queue.answered(Kind::Read, Some(512), latency_ns);
            queue.end();
            queue.answered(Kind::Write, None, latency_ns);
            queue.refused.add(1);
        }
        let all = Counters::snapshot(&queues);
        let read = KindMetrics {
            requests: 2,
            failures: 0,
            bytes: 1024,
            latency_sum: Duration::from_nanos(12),
            latency_max: Duration::from_nanos(7),
        };
        assert_eq!(all.read, read);
        assert_eq!((all.write.requests, all.write.failures), (2, 2));
        assert_eq!((all.in_flight, all.refused), (2, 2));
    }
}
