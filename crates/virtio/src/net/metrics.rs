// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a network card has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of a card, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetMetrics {
    /// Frames given to the driver.
    pub received: u64,
    /// Their bytes, without headers.
    pub received_bytes: u64,
    /// Frames the filter did not let pass.
    pub filtered: u64,
    /// Frames for which the driver had too little room, and those that left more to the driver than it had agreed to.
    pub unfit: u64,
    /// Frames handed to the backend.
    pub sent: u64,
    /// Their bytes, without headers.
    pub sent_bytes: u64,
    /// Frames the backend refused.
    pub refused: u64,
    /// Frames dropped, either way, because the link was down or the device was removed.
    pub link_down: u64,
    /// Chains that are no frame, or no room for one.
    pub malformed: u64,
    /// Chains with memory that is no RAM.
    pub bad_memory: u64,
    /// Commands carried out.
    pub commands: u64,
    /// Commands that failed.
    pub failed_commands: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub received: AtomicU64,
    pub received_bytes: AtomicU64,
    pub filtered: AtomicU64,
    pub unfit: AtomicU64,
    pub sent: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub refused: AtomicU64,
    pub link_down: AtomicU64,
    pub malformed: AtomicU64,
    pub bad_memory: AtomicU64,
    pub commands: AtomicU64,
    pub failed_commands: AtomicU64,
}

/// Counts one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Counts a frame of a packet.
pub(super) fn count_frame(frames: &AtomicU64, bytes: &AtomicU64, packet_len: usize) {
    count(frames);
    let frame = packet_len.saturating_sub(ebbtide_net::HEADER_BYTES);
    bytes.fetch_add(frame as u64, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn snapshot(&self) -> NetMetrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetMetrics {
            received: load(&self.received),
            received_bytes: load(&self.received_bytes),
            filtered: load(&self.filtered),
            unfit: load(&self.unfit),
            sent: load(&self.sent),
            sent_bytes: load(&self.sent_bytes),
            refused: load(&self.refused),
            link_down: load(&self.link_down),
            malformed: load(&self.malformed),
            bad_memory: load(&self.bad_memory),
            commands: load(&self.commands),
            failed_commands: load(&self.failed_commands),
        }
    }
}
