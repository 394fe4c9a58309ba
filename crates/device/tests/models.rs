// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the eject word. Run with
//! `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-device --test models --release`.
#![cfg(loom)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebbtide_device::{Answer, Eject, GuestEject};
use ebbtide_gate::Gate;
use loom::thread;

fn check(model: &str, invariant: &str, body: fn()) {
    let schedules = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&schedules);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(4));
    builder.check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let schedules = schedules.load(Ordering::Relaxed);
    assert!(schedules > 1, "{model}: nothing was interleaved");
    println!(r#"MODEL {{"model":"{model}","invariant":"{invariant}","schedules":{schedules}}}"#);
}

#[test]
fn model_eject_or_cancel() {
    const INVARIANT: &str = "of an eject and a cancellation exactly one wins, and gates are shut if and only if it is the eject";
    check("device/eject-or-cancel", INVARIANT, || {
        let gate = Gate::new("modelled");
        let eject = Eject::new(GuestEject::Requested, &gate);
        assert!(eject.request());
        let vcpus = [0, 1].map(|_| {
            let eject = Arc::clone(&eject);
            thread::spawn(move || eject.eject())
        });
        let cancelled = eject.cancel();
        let answers = vcpus.map(|vcpu| vcpu.join().unwrap());
        let ejected = answers.iter().filter(|a| **a == Answer::Isolated).count();
        assert_eq!(
            ejected + usize::from(cancelled),
            1,
            "{answers:?} {cancelled}"
        );
        assert_eq!(gate.is_closed(), ejected == 1);
        assert_eq!(eject.is_isolated(), ejected == 1);
    });
}

#[test]
fn model_cover() {
    const INVARIANT: &str = "a device plugged below one that is ejected at the same moment is shut, and no list is freed under its reader";
    check("device/cover", INVARIANT, || {
        let top = Gate::new("top");
        let eject = Eject::new(GuestEject::On, &top);
        let vcpu = {
            let eject = Arc::clone(&eject);
            thread::spawn(move || eject.eject())
        };
        let below = [Gate::new("a"), Gate::new("b")];
        let covered: Vec<bool> = below.iter().map(|gate| eject.cover(gate)).collect();
        assert_eq!(vcpu.join().unwrap(), Answer::Isolated);
        assert!(top.is_closed());
        for (gate, covered) in below.iter().zip(covered) {
            assert!(
                gate.is_closed(),
                "plugged below and left open; told it was in time: {covered}"
            );
        }
    });
}
