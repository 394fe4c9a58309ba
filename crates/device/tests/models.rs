// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the eject word. Run with
//! `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-device --test models --release`.
#![cfg(loom)]

use std::sync::Arc;

use ebbtide_device::{Answer, Eject, GuestEject};
use ebbtide_gate::Gate;
use ebbtide_models::explore;
use loom::thread;

#[test]
fn model_eject_or_cancel() {
    const INVARIANT: &str = "of an eject and a cancellation exactly one wins, and gates are shut if and only if it is the eject";
    explore("device/eject-or-cancel", INVARIANT, 4, || {
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
    explore("device/cover", INVARIANT, 4, || {
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
