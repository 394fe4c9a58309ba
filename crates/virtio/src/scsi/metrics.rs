// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a SCSI device has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use super::request::Response;

/// The counters of a device, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScsiMetrics {
    /// Commands answered.
    pub commands: u64,
    /// Of those, how many with CHECK CONDITION.
    pub check_conditions: u64,
    /// How many were for no unit.
    pub bad_targets: u64,
    /// How many asked for more data than they had buffers for.
    pub overruns: u64,
    /// How many were aborted, or their unit reset.
    pub aborted: u64,
    /// Bytes of data moved.
    pub bytes: u64,
    /// Queues the driver broke, by chains that are none or have no place for an answer: the device wanted a reset.
    pub malformed: u64,
    /// Commands that a disk works on now.
    pub in_flight: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    commands: AtomicU64,
    check_conditions: AtomicU64,
    bad_targets: AtomicU64,
    overruns: AtomicU64,
    aborted: AtomicU64,
    bytes: AtomicU64,
    malformed: AtomicU64,
    in_flight: AtomicU64,
}

impl Counters {
    fn count(&self, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn begin(&self) {
        self.count(&self.in_flight);
    }

    pub(super) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// The driver broke a queue.
    pub(super) fn broken(&self) {
        self.count(&self.malformed);
    }

    pub(super) fn answered(&self, response: Response, check_condition: bool, bytes: u32) {
        self.count(&self.commands);
        self.bytes.fetch_add(bytes.into(), Ordering::Relaxed);
        if check_condition {
            self.count(&self.check_conditions);
        }
        match response {
            Response::BadTarget => self.count(&self.bad_targets),
            Response::Overrun => self.count(&self.overruns),
            Response::Aborted | Response::Reset => self.count(&self.aborted),
            _ => {}
        }
    }

    pub(super) fn snapshot(&self) -> ScsiMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ScsiMetrics {
            commands: get(&self.commands),
            check_conditions: get(&self.check_conditions),
            bad_targets: get(&self.bad_targets),
            overruns: get(&self.overruns),
            aborted: get(&self.aborted),
            bytes: get(&self.bytes),
            malformed: get(&self.malformed),
            in_flight: get(&self.in_flight),
        }
    }
}
