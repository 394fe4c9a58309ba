// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The statistics queue (virtio 1.3, 5.5.6.3).
//!
//! ```text
//!   driver: buffer with statistics ──► read, kept ── interval or wish ──► given back ──► driver fills it again
//! ```

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Local;
use ebbtide_memory::{AccessError, ReadGuard};

use super::metrics::add;
use super::shared::Shared;
use crate::device::ActiveQueue;
use crate::service::Setup;
use crate::sync::{Mutex, lock};
use crate::virtq::{Chain, QueueError};

/// Bytes of one statistic: a tag of two, a value of eight.
const STAT_BYTES: usize = 10;
/// Statistics read of one buffer; there are fewer kinds.
const STATS_MAX: usize = 64;

/// Kinds of statistics (5.5.6.4), by tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Stat {
    SwapIn,
    SwapOut,
    MajorFaults,
    MinorFaults,
    FreeMemory,
    TotalMemory,
    AvailableMemory,
    DiskCaches,
    HugetlbAllocations,
    HugetlbFailures,
    OomKills,
    AllocStalls,
    AsyncScans,
    DirectScans,
    AsyncReclaims,
    DirectReclaims,
}

const TAGS: [(Stat, &str); 16] = [
    (Stat::SwapIn, "stat-swap-in"),
    (Stat::SwapOut, "stat-swap-out"),
    (Stat::MajorFaults, "stat-major-faults"),
    (Stat::MinorFaults, "stat-minor-faults"),
    (Stat::FreeMemory, "stat-free-memory"),
    (Stat::TotalMemory, "stat-total-memory"),
    (Stat::AvailableMemory, "stat-available-memory"),
    (Stat::DiskCaches, "stat-disk-caches"),
    (Stat::HugetlbAllocations, "stat-htlb-pgalloc"),
    (Stat::HugetlbFailures, "stat-htlb-pgfail"),
    (Stat::OomKills, "stat-oom-kills"),
    (Stat::AllocStalls, "stat-alloc-stalls"),
    (Stat::AsyncScans, "stat-async-scans"),
    (Stat::DirectScans, "stat-direct-scans"),
    (Stat::AsyncReclaims, "stat-async-reclaims"),
    (Stat::DirectReclaims, "stat-direct-reclaims"),
];

impl Stat {
    /// All of them, by tag.
    pub fn all() -> impl Iterator<Item = Stat> {
        TAGS.into_iter().map(|(stat, _)| stat)
    }

    /// Its name in `guest-stats`.
    pub fn name(self) -> &'static str {
        TAGS.get(self as usize).map_or("", |(_, name)| name)
    }
}

/// What a guest told of itself. Memory is in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// When; `None`: not yet.
    pub updated: Option<SystemTime>,
    values: [Option<u64>; TAGS.len()],
}

impl BalloonStats {
    /// `None`: the guest does not tell.
    pub fn get(&self, stat: Stat) -> Option<u64> {
        self.values.get(stat as usize).copied().flatten()
    }

    fn parse(bytes: &[u8]) -> BalloonStats {
        let mut stats = BalloonStats {
            updated: Some(SystemTime::now()),
            ..BalloonStats::default()
        };
        let (records, _) = bytes.as_chunks::<STAT_BYTES>();
        for [t0, t1, value @ ..] in records {
            let tag = usize::from(u16::from_le_bytes([*t0, *t1]));
            if let Some(slot) = stats.values.get_mut(tag) {
                *slot = Some(u64::from_le_bytes(*value));
            }
        }
        stats
    }
}

/// What was told and what is wanted.
pub(super) struct Stats(Mutex<State>);

struct State {
    last: BalloonStats,
    interval: Duration,
    wanted: bool,
    waker: Option<Waker>,
}

impl Stats {
    pub(super) fn new(interval: Duration) -> Stats {
        Stats(Mutex::new(State {
            last: BalloonStats::default(),
            interval,
            wanted: false,
            waker: None,
        }))
    }

    pub(super) fn last(&self) -> BalloonStats {
        lock(&self.0).last.clone()
    }

    pub(super) fn forget(&self) {
        lock(&self.0).last = BalloonStats::default();
    }

    pub(super) fn set_interval(&self, interval: Duration) {
        self.change(|state| state.interval = interval);
    }

    pub(super) fn refresh(&self) {
        self.change(|state| state.wanted = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.0);
        change(&mut state);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Why the queue is not served any further.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("chain {head}: statistics: {source}")]
    Memory { head: u16, source: AccessError },
}

/// The buffer that is kept, and since when.
struct Kept {
    head: u16,
    since: Instant,
}

/// Serves the statistics queue until the gate closes or the driver breaks the queue.
pub(super) async fn serve(local: Local, setup: Setup, shared: Arc<Shared>) {
    let Setup {
        name,
        mut queue,
        gate,
        space,
        control,
        complaints,
    } = setup;
    let reader = space.memory().register();
    let mut kept = None;
    while let Some(lease) = gate.enter(Entry::Io) {
        let turned = turn(
            &mut queue,
            &space.read(&reader),
            &shared,
            &mut kept,
            local.now(),
        );
        drop(lease);
        if let Err(fault) = turned {
            if let Some(_lease) = gate.enter(Entry::Io) {
                if let Some(suppressed) = complaints.allow() {
                    tracing::warn!(device = &*name, queue = queue.index, suppressed, %fault, "the driver's queue is unusable");
                }
                control.needs_reset();
            }
            return;
        }
        if !news(&local, &mut queue, &gate, &shared.stats, kept.as_ref()).await {
            return;
        }
    }
}

/// Reads what came, and gives the buffer back when statistics are wanted.
fn turn(
    queue: &mut ActiveQueue,
    guard: &ReadGuard<'_>,
    shared: &Shared,
    kept: &mut Option<Kept>,
    now: Instant,
) -> Result<(), Fault> {
    loop {
        while let Some(chain) = queue.queue.pop(guard)? {
            let (head, since) = (chain.head, now);
            read(guard, &chain, shared)?;
            // A driver has one buffer. Of several the last one is kept.
            if let Some(before) = kept.replace(Kept { head, since }) {
                queue.queue.push_used(guard, before.head, 0)?;
            }
        }
        if !queue.queue.enable_kick(guard)? {
            break;
        }
    }
    if let Some(buffer) = kept.take_if(|kept| shared.stats.is_due(kept, now)) {
        queue.queue.push_used(guard, buffer.head, 0)?;
    }
    queue.notify(guard)?;
    Ok(())
}

fn read(guard: &ReadGuard<'_>, chain: &Chain, shared: &Shared) -> Result<(), Fault> {
    let mut bytes = [0; STAT_BYTES * STATS_MAX];
    match chain.readable.copy_to(guard, &mut bytes) {
        Ok(length) => {
            let stats = BalloonStats::parse(bytes.get(..length).unwrap_or_default());
            lock(&shared.stats.0).last = stats;
            add(&shared.counters.stats, 1);
            Ok(())
        }
        // The guest gave the memory of its buffer back: there are no statistics.
        Err(AccessError::Unplugged { .. }) => Ok(()),
        Err(source) => {
            let head = chain.head;
            Err(Fault::Memory { head, source })
        }
    }
}

impl Stats {
    /// Whether the buffer is to go back to the driver now; a wish is then fulfilled.
    fn is_due(&self, kept: &Kept, now: Instant) -> bool {
        let mut state = lock(&self.0);
        let interval = state.interval;
        let over = !interval.is_zero() && now.saturating_duration_since(kept.since) >= interval;
        std::mem::take(&mut state.wanted) || over
    }

    /// When the buffer is to go back to the driver; `None`: not by itself.
    fn due(&self, kept: &Kept) -> Option<Instant> {
        let interval = lock(&self.0).interval;
        (!interval.is_zero()).then(|| kept.since.checked_add(interval))?
    }
}

/// Waits for a buffer or, with one that is `kept`, for the time or the wish to give it back; false at the end of the
/// activation.
async fn news(
    local: &Local,
    queue: &mut ActiveQueue,
    gate: &Arc<Gate>,
    stats: &Stats,
    kept: Option<&Kept>,
) -> bool {
    let interval = lock(&stats.0).interval;
    let due = kept.and_then(|kept| stats.due(kept));
    let mut alarm = pin!(async {
        match due {
            Some(due) => local.sleep_until(due).await,
            None => std::future::pending().await,
        }
    });
    let mut drained = pin!(gate.drained());
    let mut kicked = pin!(queue.kick.wait(local));
    poll_fn(|cx| {
        if drained.as_mut().poll(cx).is_ready() {
            return Poll::Ready(false);
        }
        {
            let mut state = lock(&stats.0);
            if kept.is_some() && (state.wanted || state.interval != interval) {
                return Poll::Ready(true);
            }
            state.waker = Some(cx.waker().clone());
        }
        if alarm.as_mut().poll(cx).is_ready() {
            return Poll::Ready(true);
        }
        kicked.as_mut().poll(cx).map(|kicked| kicked.is_ok())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_known_tags_count() {
        let mut bytes = Vec::new();
        for (tag, value) in [
            (4_u16, 100_u64),
            (0, 7),
            (16, 9),
            (0xffff, 9),
            (15, u64::MAX),
        ] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([5, 0, 1]);
        let stats = BalloonStats::parse(&bytes);
        let told: Vec<_> = Stat::all()
            .filter_map(|stat| Some((stat.name(), stats.get(stat)?)))
            .collect();
        let expected = [
            ("stat-swap-in", 7),
            ("stat-free-memory", 100),
            ("stat-direct-reclaims", u64::MAX),
        ];
        assert_eq!(told, expected);
        assert!(stats.updated.is_some());
        assert_eq!(BalloonStats::default().updated, None);
    }
}
