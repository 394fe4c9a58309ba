// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hearing of an eventfd's signals, with a standing poll and without.

use std::future::poll_fn;
use std::time::Duration;

use ebbtide_iothread::{Config, Event, Kernel, Local, Signals, run_with};
use io_uring::opcode;

const KERNELS: [Kernel; 3] = [Kernel::Newest, Kernel::Linux5_19, Kernel::Linux5_6];
const QUIET: Duration = Duration::from_millis(30);

async fn heard(signals: &mut Signals) {
    let heard = poll_fn(|cx| signals.poll(cx)).await;
    heard.unwrap();
}

async fn is_quiet(local: &Local, signals: &mut Signals) -> bool {
    local.timeout(QUIET, heard(signals)).await.is_err()
}

fn on_each(test: impl AsyncFn(Local) + Copy + 'static) {
    for kernel in KERNELS {
        let config = Config {
            kernel,
            ..Config::default()
        };
        run_with("test", config, |local| async move { test(local).await }).unwrap();
    }
}

#[test]
fn each_signal_is_heard_also_when_the_count_is_left_alone() {
    on_each(async |local| {
        let event = Event::new().unwrap();
        let notifier = event.notifier();
        // What came before counts.
        notifier.notify();
        let mut signals = event.signals(&local);
        heard(&mut signals).await;
        assert!(is_quiet(&local, &mut signals).await);
        for _ in 0..3 {
            notifier.notify();
            heard(&mut signals).await;
        }
        assert!(is_quiet(&local, &mut signals).await);
        // Several may be heard as one.
        notifier.notify();
        notifier.notify();
        heard(&mut signals).await;
        let _ = is_quiet(&local, &mut signals).await;
        assert!(is_quiet(&local, &mut signals).await);
    });
}

#[test]
fn no_signal_of_another_thread_is_lost() {
    const SIGNALS: u32 = 3000;
    on_each(async |local| {
        let (event, back) = (Event::new().unwrap(), Event::new().unwrap());
        let (notifier, answer) = (event.notifier(), back.notifier());
        let mut signals = event.signals(&local);
        // The thread goes on when it was heard: a signal that is lost ends this test by its limit.
        let thread = std::thread::spawn(move || {
            let answered = ebbtide_iothread::run("other", |local| async move {
                let mut back = back;
                for _ in 0..SIGNALS {
                    notifier.notify();
                    back.wait(&local).await.unwrap();
                }
            });
            answered.unwrap();
        });
        for _ in 0..SIGNALS {
            let limit = Duration::from_secs(60);
            local.timeout(limit, heard(&mut signals)).await.unwrap();
            answer.notify();
        }
        thread.join().unwrap();
    });
}

/// The kernel ends a standing poll when there is no room for what it has to tell: it is asked again.
#[test]
fn no_signal_is_lost_in_a_ring_that_is_full() {
    for kernel in KERNELS {
        let config = Config {
            kernel,
            entries: 1,
            ..Config::default()
        };
        let ran = run_with("test", config, |local| async move {
            let event = Event::new().unwrap();
            let notifier = event.notifier();
            let mut signals = event.signals(&local);
            assert!(is_quiet(&local, &mut signals).await);
            for round in 0..300 {
                // SAFETY: the entries point to nothing.
                let nop = || unsafe { local.submit(opcode::Nop::new().build(), ()) };
                let before: Vec<_> = (0..round % 41).map(|_| nop()).collect();
                notifier.notify();
                let after: Vec<_> = (0..round % 29).map(|_| nop()).collect();
                let limit = Duration::from_secs(60);
                local.timeout(limit, heard(&mut signals)).await.unwrap();
                for nop in before.into_iter().chain(after) {
                    assert_eq!(nop.await.0, 0);
                }
                while !is_quiet_now(&local, &mut signals).await {}
            }
        });
        ran.unwrap();
    }
}

/// Whether nothing has come that the ring has to tell already.
async fn is_quiet_now(local: &Local, signals: &mut Signals) -> bool {
    let turns = local.timeout(Duration::ZERO, heard(signals)).await;
    turns.is_err()
}

#[test]
fn dropping_it_gives_the_descriptor_back() {
    on_each(async |local| {
        let event = Event::new().unwrap();
        let fd = std::sync::Arc::downgrade(event.fd());
        let mut signals = event.signals(&local);
        assert!(is_quiet(&local, &mut signals).await);
        drop((signals, event));
        while fd.strong_count() > 0 {
            local.sleep(Duration::from_millis(1)).await;
        }
    });
}
