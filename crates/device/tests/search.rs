// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every order in which guest, management, backends and the pool can act on a switch with two devices, up to one action
//! of each kind: the removal itself, with its real types, polled by an executor whose every choice is enumerated.
//!
//! A run is a tape of choices; after each run the last choice that has an alternative is changed. What is checked is in
//! [`World::check`] and [`World::finish`].

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebbtide_models::holds;
use world::World;

/// The choices of a run, and where the next run differs.
#[derive(Default)]
struct Tape {
    choices: Vec<(usize, usize)>,
    at: usize,
}

impl Tape {
    /// One of `options`, at least one.
    fn choose(&mut self, options: usize) -> usize {
        if self.at == self.choices.len() {
            self.choices.push((0, options));
        }
        let (choice, known) = self.choices[self.at];
        assert_eq!(known, options, "a run is not repeatable");
        self.at += 1;
        choice
    }

    /// To the next run; false when all were done.
    fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((choice, options)) = self.choices.pop() {
            if choice + 1 < options {
                self.choices.push((choice + 1, options));
                return true;
            }
        }
        false
    }
}

/// One run. Under loom the gates are loom's and work only inside of it.
fn in_model(run: impl Fn() + Send + Sync + 'static) {
    #[cfg(loom)]
    loom::model(run);
    #[cfg(not(loom))]
    run();
}

/// Runs all orders; `actions` names what may happen.
fn search(actions: &'static [world::Action]) -> u64 {
    let tape = Arc::new(std::sync::Mutex::new(Tape::default()));
    let runs = AtomicU64::new(0);
    loop {
        let this = Arc::clone(&tape);
        in_model(move || {
            let mut tape = this.lock().unwrap_or_else(|e| e.into_inner());
            tape.at = 0;
            let mut world = World::new(actions);
            loop {
                let options = world.options();
                if options == 0 {
                    break;
                }
                let choice = tape.choose(options);
                world.act(choice);
                world.check();
            }
            world.finish();
        });
        runs.fetch_add(1, Ordering::Relaxed);
        if !tape.lock().expect("a run failed").next() {
            return runs.load(Ordering::Relaxed);
        }
    }
}

#[test]
fn search_removals() {
    use world::Action::*;
    const INVARIANT: &str = "no notice before the drain and the notices below, one DEVICE_DELETED each after the drop, ids free then and not before, every isolated device ends";
    let sets: [&'static [world::Action]; 5] = [
        // A child's removal and the switch's, in any order, while both have requests in flight.
        &[
            RequestChild,
            RequestSwitch,
            EjectChild,
            EjectSwitch,
            CompleteChild,
            CompleteSwitch,
        ],
        // The request is withdrawn, and made again, while the guest answers.
        &[
            RequestChild,
            CancelChild,
            RequestChild,
            EjectChild,
            EjectChild,
            CompleteChild,
        ],
        // A device is plugged below while the switch goes.
        &[
            RequestSwitch,
            Plug,
            EjectSwitch,
            CompleteSwitch,
            CompleteChild,
            ReuseId,
        ],
        // Time runs out, force, reset.
        &[
            RequestSwitch,
            EjectSwitch,
            TimeOut,
            Force,
            TimeOut,
            CompleteChild,
        ],
        &[
            RequestChild,
            EjectChild,
            Reset,
            CompleteChild,
            CompleteSwitch,
            ReuseId,
        ],
    ];
    let runs: u64 = sets.into_iter().map(search).sum();
    assert!(runs > 1000, "{runs}");
    holds("device/removal", INVARIANT, runs);
}
