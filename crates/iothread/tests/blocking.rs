// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pool for calls that block.
#![cfg(not(loom))]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use ebbtide_iothread::{Blocking, run};

#[test]
fn jobs_run_elsewhere_and_at_the_same_time() {
    let pool = Blocking::new("reaper", 2).unwrap();
    let barrier = Arc::new(Barrier::new(2));
    let here = thread::current().id();
    run("control", |local| async move {
        let jobs = [1, 2].map(|number| {
            let barrier = Arc::clone(&barrier);
            pool.run(move || {
                // Gets on only if both jobs are running.
                barrier.wait();
                assert_ne!(thread::current().id(), here);
                number
            })
        });
        let mut sum = 0;
        for job in jobs {
            sum += local.timeout(Duration::from_secs(30), job).await.unwrap();
        }
        assert_eq!(sum, 3);
    })
    .unwrap();
}

#[test]
fn a_blocked_pool_does_not_block_the_executor() {
    let pool = Blocking::new("reaper", 1).unwrap();
    let (release, blocked) = mpsc::channel::<()>();
    run("control", |local| async move {
        let job = pool.run(move || blocked.recv().is_ok());
        local.sleep(Duration::from_millis(5)).await;
        release.send(()).unwrap();
        assert!(job.await);
    })
    .unwrap();
}

#[test]
fn a_jobs_panic_reaches_who_waits_and_not_the_pool() {
    let pool = Blocking::new("reaper", 1).unwrap();
    let job = pool.run(|| panic!("on purpose"));
    let panicked = catch_unwind(AssertUnwindSafe(|| run("control", |_| job).unwrap()));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"on purpose"));
    assert_eq!(run("control", |_| pool.run(|| 7)).unwrap(), 7);
}

#[test]
fn every_job_runs_even_if_nobody_waits_and_the_pool_is_dropped() {
    let done = Arc::new(AtomicU32::new(0));
    let pool = Blocking::new("reaper", 2).unwrap();
    for _ in 0..100 {
        let done = Arc::clone(&done);
        drop(pool.run(move || done.fetch_add(1, Ordering::SeqCst)));
    }
    drop(pool.run(|| panic!("that nobody sees")));
    drop(pool);
    assert_eq!(done.load(Ordering::SeqCst), 100);
}

#[test]
fn a_job_may_drop_the_pool() {
    let pool = Arc::new(Blocking::new("reaper", 1).unwrap());
    let (release, blocked) = mpsc::channel::<()>();
    let job = pool.run({
        let pool = Arc::clone(&pool);
        move || {
            blocked.recv().unwrap();
            drop(pool);
            7
        }
    });
    drop(pool);
    release.send(()).unwrap();
    assert_eq!(run("control", |_| job).unwrap(), 7);
}
