// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a memory device has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::request::{Answer, RequestKind};

/// The counters of one kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestMetrics {
    /// Answered with ACK.
    pub ack: u64,
    /// Answered with NACK.
    pub nack: u64,
    /// Answered with BUSY.
    pub busy: u64,
    /// Answered with ERROR.
    pub error: u64,
    /// Not answered, for the device was reset meanwhile.
    pub dropped: u64,
    /// Memory changed by those answered with ACK.
    pub bytes: u64,
    /// Time from taking to answering, all together.
    pub latency_sum: Duration,
    /// The longest of those times.
    pub latency_max: Duration,
}

/// The counters of a memory device, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemMetrics {
    /// Plug requests.
    pub plug: RequestMetrics,
    /// Unplug requests.
    pub unplug: RequestMetrics,
    /// Unplug-all requests.
    pub unplug_all: RequestMetrics,
    /// State requests.
    pub state: RequestMetrics,
    /// Chains that are no request: the device wanted a reset.
    pub malformed: u64,
    /// Times the host refused to provide or take memory, retries included.
    pub host_failures: u64,
    /// Unplugs that had to wait for transfers in their range.
    pub fence_waits: u64,
    /// Interrupts sent to a driver that had gone idle behind its target.
    pub kicks: u64,
    /// Times a resize was called partial or stalled.
    pub stalls: u64,
}

#[derive(Debug, Default)]
struct RequestCounters {
    ack: AtomicU64,
    nack: AtomicU64,
    busy: AtomicU64,
    error: AtomicU64,
    dropped: AtomicU64,
    bytes: AtomicU64,
    latency_sum_ns: AtomicU64,
    latency_max_ns: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    plug: RequestCounters,
    unplug: RequestCounters,
    unplug_all: RequestCounters,
    state: RequestCounters,
    pub malformed: AtomicU64,
    pub host_failures: AtomicU64,
    pub fence_waits: AtomicU64,
    pub kicks: AtomicU64,
    pub stalls: AtomicU64,
}

impl Counters {
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self, kind: RequestKind) {
        Self::count(&self.of(kind).dropped);
    }

    pub(super) fn answered(
        &self,
        kind: RequestKind,
        answer: Answer,
        bytes: u64,
        latency: Duration,
    ) {
        let counters = self.of(kind);
        Self::count(match answer {
            Answer::Ack | Answer::State(_) => &counters.ack,
            Answer::Nack => &counters.nack,
            Answer::Busy => &counters.busy,
            Answer::Error => &counters.error,
        });
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        let latency_ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        counters
            .latency_sum_ns
            .fetch_add(latency_ns, Ordering::Relaxed);
        counters
            .latency_max_ns
            .fetch_max(latency_ns, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> MemMetrics {
        let Counters {
            plug,
            unplug,
            unplug_all,
            state,
            malformed,
            host_failures,
            fence_waits,
            kicks,
            stalls,
        } = self;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MemMetrics {
            plug: plug.snapshot(),
            unplug: unplug.snapshot(),
            unplug_all: unplug_all.snapshot(),
            state: state.snapshot(),
            malformed: load(malformed),
            host_failures: load(host_failures),
            fence_waits: load(fence_waits),
            kicks: load(kicks),
            stalls: load(stalls),
        }
    }

    fn of(&self, kind: RequestKind) -> &RequestCounters {
        match kind {
            RequestKind::Plug => &self.plug,
            RequestKind::Unplug => &self.unplug,
            RequestKind::UnplugAll => &self.unplug_all,
            RequestKind::State => &self.state,
        }
    }
}

impl RequestCounters {
    fn snapshot(&self) -> RequestMetrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RequestMetrics {
            ack: load(&self.ack),
            nack: load(&self.nack),
            busy: load(&self.busy),
            error: load(&self.error),
            dropped: load(&self.dropped),
            bytes: load(&self.bytes),
            latency_sum: Duration::from_nanos(load(&self.latency_sum_ns)),
            latency_max: Duration::from_nanos(load(&self.latency_max_ns)),
        }
    }
}
