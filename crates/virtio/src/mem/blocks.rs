// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host side of a region: plugging and unplugging its blocks, with patience instead of errors.
//!
//! ```text
//! plug:    make accessible (populate) ─► listeners ── fails, veto ──► pause, try again ── time is up ──► Busy
//! unplug:  seal ─► wait for pins ─► listeners ─► discard ── fails ──► pause, try again ── time is up ──► undo, Busy
//!                       └── time is up ──► undo, Busy
//! ```
//!
//! The driver waits for its answer with one request and does nothing else meanwhile; told "busy" it does nothing for a
//! minute. So answers come late rather than busy, and what could not be done leaves everything as it was.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_gate::Gate;
use ebbtide_iothread::{Blocking, Local};
use ebbtide_memory::{Error, Plugged, RamBlock, Seal};

use super::fault::{HostFaults, Step};
use super::metrics::Counters;
use super::resize::Setback;

/// Freeing this much takes the host less than handing the job to another thread is worth.
const INLINE_DISCARD_BYTES: u64 = 16 << 20;
/// How often a wait looks whether the driver is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// The first pause after a failure of the host; later ones are longer.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How often a system reset tries to discard. It cannot wait; and the next driver unplugs what is left by itself.
const RESET_TRIES: u32 = 3;

/// How long a driver is kept waiting before it is told "busy".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For transfers in memory that is to be unplugged.
    pub drain: Duration,
    /// For a host that fails to provide or take memory.
    pub host: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            drain: Duration::from_secs(10),
            host: Duration::from_secs(5),
        }
    }
}

/// What came of an attempt to change blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    /// It was not to be done any more.
    Obsolete,
    /// It cannot be done now. All is as before.
    Busy(Setback),
    /// The driver has gone: nobody waits for an answer.
    Abandoned,
}

#[derive(Clone)]
pub(super) struct Blocks {
    /// What the guest has now: another one after a reset that the use of the last one outlasts.
    pub block: Arc<Mutex<Arc<RamBlock>>>,
    pub populate: bool,
    pub patience: Patience,
    pub blocking: Arc<Blocking>,
    pub faults: Option<HostFaults>,
    pub counters: Arc<Counters>,
    pub complaints: Arc<LogLimit>,
}

impl Blocks {
    /// The RAM block.
    pub(super) fn block(&self) -> Arc<RamBlock> {
        Arc::clone(&self.block.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes on with another RAM block; nothing is under way.
    pub(super) fn renew(&self, block: Arc<RamBlock>) {
        *self.block.lock().unwrap_or_else(PoisonError::into_inner) = block;
    }

    /// Plugs `range`, trying again until it works, `obsolete` says it is not to be done any more, or patience ends.
    pub(super) async fn plug(
        &self,
        local: &Local,
        gate: &Gate,
        range: &Range<u64>,
        obsolete: impl Fn() -> bool,
    ) -> Outcome {
        let mut retry = Retry::new(local, self.patience.host);
        loop {
            let Err(error) = self.plug_once(range.clone()).await else {
                return Outcome::Done;
            };
            self.failed("provide", &error);
            if !retry.pause(local, gate).await {
                let vetoed = matches!(error, Error::PopulateVetoed { .. });
                let setback = if vetoed {
                    Setback::MapperRefused
                } else {
                    Setback::HostMemory
                };
                return self.gave_up(gate, setback);
            }
            if obsolete() {
                return Outcome::Obsolete;
            }
        }
    }

    /// Unplugs all of `ranges`, or, when that cannot be done in time, none of them; except that those the host took
    /// before it refused another stay unplugged.
    pub(super) async fn unplug(
        &self,
        local: &Local,
        gate: &Gate,
        ranges: Vec<Range<u64>>,
    ) -> Outcome {
        let mut seals = Vec::with_capacity(ranges.len());
        for range in ranges {
            match self.seal(range) {
                Ok(seal) => seals.push(seal),
                Err(error) => {
                    self.failed("release", &error);
                    return Outcome::Busy(Setback::HostMemory);
                }
            }
        }
        if !self.drained(local, gate, &seals).await {
            return self.gave_up(gate, Setback::IoInFlight);
        }
        let mut retry = Retry::new(local, self.patience.host);
        loop {
            seals = match self.discard(seals).await {
                Ok(()) => return Outcome::Done,
                Err((left, error)) => {
                    self.failed("release", &error);
                    left
                }
            };
            if !retry.pause(local, gate).await {
                return self.gave_up(gate, Setback::HostMemory);
            }
        }
    }

    /// Unplugs all there is, however long transfers take: for a system reset. `done` is called before this resolves,
    /// and also when nobody waits for it any more, once blocks have changed.
    pub(super) async fn empty(&self, done: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let mut seals = Vec::new();
        for range in plugged_runs(&self.block()) {
            seals.push(self.seal(range)?);
        }
        for seal in &seals {
            seal.drained().await;
        }
        let this = self.clone();
        let job = move || {
            let mut result = this.discard_here(seals);
            for _ in 1..RESET_TRIES {
                let Err((left, error)) = result else { break };
                this.failed("release", &error);
                result = this.discard_here(left);
            }
            // What is left is plugged again before the sizes are looked at.
            let result = result.map_err(|(left, error)| {
                drop(left);
                error
            });
            done();
            result
        };
        self.blocking.run(job).await
    }

    async fn plug_once(&self, range: Range<u64>) -> Result<(), Error> {
        self.strike(Step::Plug)?;
        let populate = self.populate;
        if !populate && !self.block().has_discard_listeners() {
            return self.block().plug(range, false);
        }
        let block = self.block();
        let plug = move || block.plug(range, populate);
        self.blocking.run(plug).await
    }

    fn seal(&self, range: Range<u64>) -> Result<Seal, Error> {
        self.strike(Step::Seal)?;
        self.block().seal(range)
    }

    /// False when that takes too long or the driver has gone.
    async fn drained(&self, local: &Local, gate: &Gate, seals: &[Seal]) -> bool {
        let deadline = local.now() + self.patience.drain;
        let mut waited = false;
        for seal in seals {
            let mut drained = std::pin::pin!(seal.drained());
            while local
                .timeout(LOOK_INTERVAL, drained.as_mut())
                .await
                .is_err()
            {
                if !std::mem::replace(&mut waited, true) {
                    Counters::count(&self.counters.fence_waits);
                }
                if gate.is_closed() || local.now() >= deadline {
                    return false;
                }
            }
        }
        true
    }

    /// Gives back those it could not discard.
    async fn discard(&self, seals: Vec<Seal>) -> Result<(), (Vec<Seal>, Error)> {
        let bytes: u64 = seals
            .iter()
            .map(|seal| seal.range().end - seal.range().start)
            .sum();
        if bytes <= INLINE_DISCARD_BYTES && !self.block().has_discard_listeners() {
            return self.discard_here(seals);
        }
        let this = self.clone();
        self.blocking.run(move || this.discard_here(seals)).await
    }

    fn discard_here(&self, seals: Vec<Seal>) -> Result<(), (Vec<Seal>, Error)> {
        let mut left = Vec::new();
        let mut first_error = None;
        for seal in seals {
            let result = match self.strike(Step::Discard) {
                Ok(()) => seal.discard(),
                Err(error) => Err((seal, error)),
            };
            if let Err((seal, error)) = result {
                left.push(seal);
                first_error.get_or_insert(error);
            }
        }
        match first_error {
            None => Ok(()),
            Some(error) => Err((left, error)),
        }
    }

    fn gave_up(&self, gate: &Gate, setback: Setback) -> Outcome {
        if gate.is_closed() {
            Outcome::Abandoned
        } else {
            Outcome::Busy(setback)
        }
    }

    fn failed(&self, what: &str, error: &Error) {
        Counters::count(&self.counters.host_failures);
        if let Some(suppressed) = self.complaints.allow() {
            let block = self.block();
            let block = block.name();
            tracing::warn!(block, suppressed, %error, "the host did not {what} memory");
        }
    }

    fn strike(&self, step: Step) -> Result<(), Error> {
        match &self.faults {
            Some(faults) if faults.strikes(step) => Err(ordered_failure(step, &self.block())),
            _ => Ok(()),
        }
    }
}

fn ordered_failure(step: Step, block: &RamBlock) -> Error {
    Error::Host {
        name: block.name().to_owned(),
        what: format!("{step:?}"),
        source: std::io::Error::other("ordered by a test"),
    }
}

/// Time to try again.
struct Retry {
    pause: Duration,
    deadline: std::time::Instant,
}

impl Retry {
    fn new(local: &Local, patience: Duration) -> Retry {
        Retry {
            pause: FIRST_PAUSE,
            deadline: local.now() + patience,
        }
    }

    /// False: no more tries, for the time is up or the driver has gone.
    async fn pause(&mut self, local: &Local, gate: &Gate) -> bool {
        let until = local.now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if until > self.deadline {
            return false;
        }
        while local.now() < until {
            if gate.is_closed() {
                return false;
            }
            local
                .sleep(LOOK_INTERVAL.min(until.saturating_duration_since(local.now())))
                .await;
        }
        !gate.is_closed()
    }
}

/// The plugged parts of a sparse block, each as long as possible.
pub(super) fn plugged_runs(block: &RamBlock) -> Vec<Range<u64>> {
    let mut runs = Vec::new();
    if let Some(unit) = block.block_size_bytes() {
        find_runs(
            &|range| block.plugged(range),
            unit,
            0..block.size_bytes(),
            &mut runs,
        );
    }
    runs
}

/// Halves what is mixed. `range` is a multiple of `unit`, so the recursion is as deep as the number of units has bits.
fn find_runs(
    plugged: &impl Fn(Range<u64>) -> Plugged,
    unit: u64,
    range: Range<u64>,
    runs: &mut Vec<Range<u64>>,
) {
    match plugged(range.clone()) {
        Plugged::None => {}
        Plugged::All => match runs.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => runs.push(range),
        },
        Plugged::Mixed => {
            let units = (range.end - range.start) / unit;
            if units < 2 {
                return;
            }
            let middle = range.start + units / 2 * unit;
            find_runs(plugged, unit, range.start..middle, runs);
            find_runs(plugged, unit, middle..range.end, runs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs_of(bits: u32, units: u64) -> Vec<Range<u64>> {
        let plugged = |range: Range<u64>| {
            let count = range.clone().filter(|unit| bits >> unit & 1 == 1).count() as u64;
            match count {
                0 => Plugged::None,
                n if n == range.end - range.start => Plugged::All,
                _ => Plugged::Mixed,
            }
        };
        let mut runs = Vec::new();
        find_runs(&plugged, 1, 0..units, &mut runs);
        runs
    }

    #[test]
    fn runs_cover_exactly_what_is_plugged() {
        for units in [1, 2, 3, 7, 10] {
            for bits in 0..1_u32 << units {
                let runs = runs_of(bits, units);
                let mut covered = 0;
                for run in &runs {
                    for unit in run.clone() {
                        covered |= 1 << unit;
                    }
                }
                assert_eq!(covered, bits);
                assert!(
                    runs.windows(2).all(|pair| pair[0].end < pair[1].start),
                    "{runs:?}"
                );
            }
        }
    }
}
