// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the buses. Run with `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-bus --test models --release`.
//!
//! Each seeded bug is a deviation from the protocol, chosen by `EBBTIDE_SEEDED=<bug>`; with it the model must fail:
//!
//! seeded: intx_level_unlocked breaks model_intx_wire
//! seeded: intx_pin_unlocked breaks model_intx_pin
#![cfg(loom)]

use std::sync::Arc;

use ebbtide_bus::irq::IrqLine;
use ebbtide_bus::pci::intx::{pins_on_one_wire, set_intx_disable};
use ebbtide_models::explore;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

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
    explore("bus/intx_wire", INVARIANT, 3, || {
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
    explore("bus/intx_pin", INVARIANT, 3, || {
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
