// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Failures of the host on order, for tests of what the driver is told about them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What the host can fail at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Making memory accessible, and populating it.
    Plug,
    /// Taking memory out of use.
    Seal,
    /// Giving its pages back.
    Discard,
}

/// Failures on order. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct HostFaults {
    left: Arc<[AtomicU32; 3]>,
}

impl HostFaults {
    /// The next `times` attempts at `step` fail.
    pub fn fail(&self, step: Step, times: u32) {
        self.of(step).store(times, Ordering::Release);
    }

    /// How many failures ordered for `step` have not happened yet.
    pub fn left(&self, step: Step) -> u32 {
        self.of(step).load(Ordering::Acquire)
    }

    /// Whether this attempt is to fail.
    pub(super) fn strikes(&self, step: Step) -> bool {
        let used = self
            .of(step)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                left.checked_sub(1)
            });
        used.is_ok()
    }

    fn of(&self, step: Step) -> &AtomicU32 {
        let [plug, seal, discard] = &*self.left;
        match step {
            Step::Plug => plug,
            Step::Seal => seal,
            Step::Discard => discard,
        }
    }
}
