// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loom models of the kick protocol. Run by `cargo xtask models`; `models.toml` lists them.
#![cfg(loom)]

use ebbtide_hypervisor::models::{after_interruption, before_entry, kick, without_guest};
use ebbtide_models::explore;
use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// What the kernel keeps for the thread: a pending signal, and the sleep that one ends.
struct Kernel {
    flag: AtomicU8,
    pending: Mutex<bool>,
    arrived: Condvar,
}

impl Kernel {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            flag: AtomicU8::new(0),
            pending: Mutex::new(false),
            arrived: Condvar::new(),
        })
    }

    fn signal(&self) {
        *self.pending.lock().unwrap() = true;
        self.arrived.notify_all();
    }

    /// A signal that finds the thread in user mode runs the empty handler and is gone.
    fn user_mode(&self) {
        *self.pending.lock().unwrap() = false;
    }

    /// KVM_RUN of a guest that never leaves by itself.
    fn run(&self) {
        self.user_mode();
        before_entry(&self.flag);
        if self.flag.load(SeqCst) == 0 {
            let mut pending = self.pending.lock().unwrap();
            while !*pending {
                pending = self.arrived.wait(pending).unwrap();
            }
        }
        self.user_mode();
        after_interruption(&self.flag);
    }

    /// The thread's loop, until there is nothing left to look for.
    fn vcpu_thread(&self, done: impl Fn() -> bool) {
        loop {
            self.user_mode();
            if done() {
                return;
            }
            self.run();
        }
    }
}

// A lost kick is a thread that waits for ever, which loom reports as a deadlock. Every one known takes at most two
// preemptions; three keep the models to seconds.

#[test]
fn a_kick_is_never_lost() {
    const INVARIANT: &str =
        "a vCPU that never leaves the guest by itself stops after one kick, whenever it comes";
    explore("hypervisor/kick", INVARIANT, 3, || {
        let kernel = Kernel::new();
        let stop = Arc::new(AtomicBool::new(false));
        let vcpu = {
            let (kernel, stop) = (kernel.clone(), stop.clone());
            thread::spawn(move || kernel.vcpu_thread(|| stop.load(SeqCst)))
        };
        stop.store(true, SeqCst);
        kick(&kernel.flag, || kernel.signal());
        vcpu.join().unwrap();
    });
}

#[test]
fn two_kickers_are_both_served() {
    const INVARIANT: &str = "of two kicks neither hides the other's work";
    explore("hypervisor/two-kicks", INVARIANT, 3, || {
        let kernel = Kernel::new();
        let work = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let vcpu = {
            let (kernel, work) = (kernel.clone(), work.clone());
            thread::spawn(move || kernel.vcpu_thread(|| work.iter().all(|w| w.load(SeqCst))))
        };
        let second = {
            let (kernel, work) = (kernel.clone(), work.clone());
            thread::spawn(move || {
                work[1].store(true, SeqCst);
                kick(&kernel.flag, || kernel.signal());
            })
        };
        work[0].store(true, SeqCst);
        kick(&kernel.flag, || kernel.signal());
        second.join().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_kick_during_a_restore_is_kept() {
    const INVARIANT: &str = "a kick that comes while a vCPU is restored is served by the next run";
    explore("hypervisor/kick-during-restore", INVARIANT, 3, || {
        let kernel = Kernel::new();
        let stop = Arc::new(AtomicBool::new(false));
        let vcpu = {
            let (kernel, stop) = (kernel.clone(), stop.clone());
            thread::spawn(move || {
                if !stop.load(SeqCst) {
                    // The entry that takes the answer to an exit may take the kick's signal too.
                    without_guest(&kernel.flag, || kernel.user_mode());
                    kernel.run();
                }
                kernel.vcpu_thread(|| stop.load(SeqCst));
            })
        };
        stop.store(true, SeqCst);
        kick(&kernel.flag, || kernel.signal());
        vcpu.join().unwrap();
    });
}
