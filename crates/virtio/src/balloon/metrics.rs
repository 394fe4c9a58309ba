// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a balloon has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of a balloon, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonMetrics {
    /// Pages of 4 KiB the driver put into the balloon.
    pub inflated_pages: u64,
    /// Pages it took out.
    pub deflated_pages: u64,
    /// Bytes it reported to be free.
    pub reported_bytes: u64,
    /// Bytes the host was given back.
    pub discarded_bytes: u64,
    /// Bytes the host was not given back because somebody disables that.
    pub kept_bytes: u64,
    /// Bytes that the host did not take.
    pub refused_bytes: u64,
    /// Pages and reports that are not in RAM, or not any more.
    pub not_ram: u64,
    /// Queues of pages the driver broke, by chains that are none or could not be read: the device wanted a reset.
    pub malformed: u64,
    /// How often the driver sent statistics.
    pub stats: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub inflated_pages: AtomicU64,
    pub deflated_pages: AtomicU64,
    pub reported_bytes: AtomicU64,
    pub discarded_bytes: AtomicU64,
    pub kept_bytes: AtomicU64,
    pub refused_bytes: AtomicU64,
    pub not_ram: AtomicU64,
    pub malformed: AtomicU64,
    pub stats: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn snapshot(&self) -> BalloonMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BalloonMetrics {
            inflated_pages: get(&self.inflated_pages),
            deflated_pages: get(&self.deflated_pages),
            reported_bytes: get(&self.reported_bytes),
            discarded_bytes: get(&self.discarded_bytes),
            kept_bytes: get(&self.kept_bytes),
            refused_bytes: get(&self.refused_bytes),
            not_ram: get(&self.not_ram),
            malformed: get(&self.malformed),
            stats: get(&self.stats),
        }
    }
}
