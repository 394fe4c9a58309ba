// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the buses. Run with `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-bus --test models --release`.
//!
//! Each seeded bug is a deviation from the protocol, chosen by `EBBTIDE_SEEDED=<bug>`; with it the model must fail:
//!
//! seeded: intx_level_unlocked breaks model_intx_wire
//! seeded: intx_pin_unlocked breaks model_intx_pin
#![cfg(loom)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Counter, Ordering as CounterOrdering};

use ebbtide_bus::irq::IrqLine;
use ebbtide_bus::pci::intx::{pins_on_one_wire, set_intx_disable};
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

/// Runs the schedules of `body` with up to `preemptions` preemptions (all when `None`), then says so.
/// LOOM_MAX_PREEMPTIONS sets another bound.
fn check(model: &str, invariant: &str, preemptions: Option<usize>, body: fn()) {
    let schedules = Arc::new(Counter::new(0));
    let counter = Arc::clone(&schedules);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.check(move || {
        counter.fetch_add(1, CounterOrdering::Relaxed);
        body();
    });
    let schedules = schedules.load(CounterOrdering::Relaxed);
    assert!(schedules > 1, "{model}: nothing was interleaved");
    println!(r#"MODEL {{"model":"{model}","invariant":"{invariant}","schedules":{schedules}}}"#);
}

/// An input of the interrupt controller.
struct Line(AtomicBool);

impl IrqLine for Line {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

#[test]
fn model_intx_wire() {
    const INVARIANT: &str = "when nobody moves any more, a shared interrupt wire is high exactly if one of its pins drives it";
    check("bus/intx_wire", INVARIANT, Some(3), || {
        let line = Arc::new(Line(AtomicBool::new(false)));
        let [busy, other] = pins_on_one_wire(Arc::clone(&line) as _);
        let device = thread::spawn({
            let busy = Arc::clone(&busy);
            move || busy.set(true)
        });
        other.set(true);
        other.set(false);
        device.join().unwrap();
        assert!(line.0.load(Ordering::SeqCst), "one pin asserts");
        busy.set(false);
        assert!(!line.0.load(Ordering::SeqCst), "nobody does");
    });
}

#[test]
fn model_intx_pin() {
    const INVARIANT: &str = "a pin that the guest has disabled does not drive its wire, however the device races with that";
    check("bus/intx_pin", INVARIANT, Some(3), || {
        let line = Arc::new(Line(AtomicBool::new(false)));
        let [pin, other] = pins_on_one_wire(Arc::clone(&line) as _);
        let device = thread::spawn({
            let pin = Arc::clone(&pin);
            move || pin.set(true)
        });
        set_intx_disable(&pin, true);
        device.join().unwrap();
        assert!(!line.0.load(Ordering::SeqCst), "disabled");
        set_intx_disable(&pin, false);
        assert!(line.0.load(Ordering::SeqCst), "asserted all the time");
        drop((pin, other));
        assert!(!line.0.load(Ordering::SeqCst), "gone");
    });
}
