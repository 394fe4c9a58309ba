// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the queues of a balloon share, and its configuration space (virtio 1.3, 5.5.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_iothread::Sender;

use super::metrics::Counters;
use super::pages::Tracker;
use super::stats::Stats;
use super::{BalloonEvent, PAGE_BYTES};
use crate::sync::{Mutex, lock};

/// Where the one field is that a driver writes.
const ACTUAL_OFFSET: u64 = 4;

pub(super) struct Shared {
    pub id: Arc<str>,
    /// `num_pages`: the size the balloon is to have.
    target: AtomicU32,
    /// `actual`: the size the driver says it has.
    actual: AtomicU32,
    events: Sender<BalloonEvent>,
    pub tracker: Mutex<Tracker>,
    pub stats: Stats,
    pub counters: Counters,
    /// For what the host does not take.
    pub refusals: LogLimit,
}

impl Shared {
    pub(super) fn new(
        id: Arc<str>,
        events: Sender<BalloonEvent>,
        stats_interval: Duration,
    ) -> Arc<Shared> {
        Arc::new(Shared {
            id,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            events,
            tracker: Mutex::default(),
            stats: Stats::new(stats_interval),
            counters: Counters::default(),
            refusals: LogLimit::default(),
        })
    }

    pub(super) fn target(&self) -> u32 {
        self.target.load(Ordering::Relaxed)
    }

    pub(super) fn set_target(&self, pages: u32) {
        self.target.store(pages, Ordering::Relaxed);
    }

    pub(super) fn actual(&self) -> u32 {
        self.actual.load(Ordering::Relaxed)
    }

    fn set_actual(&self, pages: u32) {
        if self.actual.swap(pages, Ordering::Relaxed) != pages {
            self.events.send(BalloonEvent::Changed {
                id: Arc::clone(&self.id),
                ballooned_bytes: u64::from(pages) * PAGE_BYTES,
            });
        }
    }

    /// A driver begins: its balloon is empty.
    pub(super) fn reset(&self) {
        self.set_actual(0);
        *lock(&self.tracker) = Tracker::default();
        self.stats.forget();
    }

    /// Fills `data` from byte `offset` on; what belongs to features that are not offered, and what is behind the end,
    /// is zero.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = self
            .target()
            .to_le_bytes()
            .into_iter()
            .chain(self.actual().to_le_bytes())
            .chain(std::iter::repeat(0));
        // Only the first eight bytes are ever anything but zero.
        let start = usize::try_from(offset.min(8)).unwrap_or(8);
        for (to, from) in data.iter_mut().zip(fields.skip(start)) {
            *to = from;
        }
    }

    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, &[b0, b1, b2, b3]) = (offset, data) {
            self.set_actual(u32::from_le_bytes([b0, b1, b2, b3]));
        }
    }
}
