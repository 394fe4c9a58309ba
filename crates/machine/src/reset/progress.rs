// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a reset is at, for monitors, which are answered while it waits: the guest's state is as before it.

use std::cell::RefCell;
use std::time::Instant;

use ebbtide_qmp::types::ebbtide::{Reset, ResetStep};
use ebbtide_qmp::types::run_state::ShutdownCause;

/// The reset that is under way, if one is.
#[derive(Default)]
pub(crate) struct Progress(RefCell<Option<At>>);

struct At {
    cause: ShutdownCause,
    began: Instant,
    step: ResetStep,
    memory: Vec<String>,
}

/// A reset, until this is dropped.
pub(super) struct UnderWay<'p>(&'p Progress);

impl Progress {
    /// A reset begins, with its first step.
    pub(super) fn begin(&self, cause: ShutdownCause, now: Instant) -> UnderWay<'_> {
        self.0.replace(Some(At {
            cause,
            began: now,
            step: ResetStep::Draining,
            memory: Vec::new(),
        }));
        UnderWay(self)
    }

    /// What is told of it.
    pub(crate) fn told(&self, now: Instant) -> Option<Reset> {
        self.0.borrow().as_ref().map(|at| {
            let age = now.saturating_duration_since(at.began).as_millis();
            Reset {
                cause: at.cause,
                step: at.step,
                age_ms: u64::try_from(age).unwrap_or(u64::MAX),
                memory: at.memory.clone(),
            }
        })
    }
}

impl UnderWay<'_> {
    /// The next step begins.
    pub(super) fn step(&self, step: ResetStep) {
        if let Some(at) = &mut *self.0.0.borrow_mut() {
            (at.step, at.memory) = (step, Vec::new());
        }
    }

    /// It waits for this memory.
    pub(super) fn waits_for(&self, memory: Vec<String>) {
        if let Some(at) = &mut *self.0.0.borrow_mut() {
            at.memory = memory;
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.0.take();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_is_told_of_while_it_is_under_way() {
        let (progress, began) = (Progress::default(), Instant::now());
        let told = |ms| progress.told(began + Duration::from_millis(ms));
        assert_eq!(told(0), None);
        let cause = ShutdownCause::HostQmpSystemReset;
        let reset = progress.begin(cause, began);
        let at = |step, age_ms, memory: &[&str]| {
            let memory = memory.iter().map(|name| (*name).to_owned()).collect();
            Some(Reset {
                cause,
                step,
                age_ms,
                memory,
            })
        };
        assert_eq!(told(1), at(ResetStep::Draining, 1, &[]));
        reset.step(ResetStep::Memory);
        reset.waits_for(vec!["ram".to_owned()]);
        assert_eq!(told(2000), at(ResetStep::Memory, 2000, &["ram"]));
        reset.step(ResetStep::Loading);
        assert_eq!(told(2001), at(ResetStep::Loading, 2001, &[]));
        drop(reset);
        assert_eq!(told(2002), None);
    }
}
