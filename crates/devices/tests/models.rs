// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of devices. Run with `RUSTFLAGS='--cfg loom' cargo test -p ebbtide-devices --test models --release`.
//!
//! Each seeded bug is a deviation from the protocol, chosen by `EBBTIDE_SEEDED=<bug>`; with it the model must fail:
//!
//! seeded: order_missed breaks model_orders
//! seeded: stale_run_counts breaks model_reload
#![cfg(loom)]

use std::sync::Arc;
use std::time::Duration;

use ebbtide_devices::i6300esb::timer::{Orders, Runs};
use ebbtide_models::explore;
use loom::future::block_on;
use loom::sync::Mutex;
use loom::thread;

const SECOND: Option<Duration> = Some(Duration::from_secs(1));

#[test]
fn model_orders() {
    const INVARIANT: &str = "the thread that keeps a watchdog's time takes the last order, and ends when there will be none";
    explore("devices/watchdog_orders", INVARIANT, 3, || {
        let orders = Arc::new(Orders::default());
        let clock = thread::spawn({
            let orders = Arc::clone(&orders);
            move || {
                let mut last = None;
                // A lost order ends here: loom reports a deadlock.
                while last != Some(2) {
                    let order = block_on(orders.next()).expect("not closed yet");
                    last = order.run.map(|run| run.number);
                }
                orders
            }
        });
        let mut runs = Runs::default();
        runs.order(&orders, SECOND);
        runs.order(&orders, SECOND);
        let taken = clock.join().unwrap();
        let ends = thread::spawn(move || block_on(taken.next()).is_none());
        orders.close();
        assert!(ends.join().unwrap());
    });
}

/// The registers, as far as they matter: which run counts, what the guest did, what the timer did.
#[derive(Default)]
struct Registers {
    runs: Runs,
    reloaded: bool,
}

#[test]
fn model_reload() {
    const INVARIANT: &str = "a timer that has run off does nothing once the guest has reloaded it";
    explore("devices/watchdog_reload", INVARIANT, 3, || {
        let orders = Arc::new(Orders::default());
        let registers = Arc::new(Mutex::new(Registers::default()));
        registers.lock().unwrap().runs.order(&orders, SECOND);
        let clock = thread::spawn({
            let (orders, registers) = (Arc::clone(&orders), Arc::clone(&registers));
            move || {
                let order = block_on(orders.next()).expect("not closed");
                let run = order.run.expect("one was ordered");
                // The time of whatever run it took is up.
                let registers = registers.lock().unwrap();
                let fires = registers.runs.is_latest(run.number);
                assert!(
                    !fires || run.number == 2 || !registers.reloaded,
                    "the first run fires after the reload"
                );
                fires
            }
        });
        let mut guest = registers.lock().unwrap();
        guest.runs.order(&orders, SECOND);
        guest.reloaded = true;
        drop(guest);
        clock.join().unwrap();
    });
}
