// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tasks, timers, wake-ups from other threads, a ring that is full, starting and stopping.
#![cfg(not(loom))]

mod setups;

use std::cell::{Cell, RefCell};
use std::io::{Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_iothread::{
    Config, Either, Event, IoThread, Kernel, Local, ManualClock, Stopped, channel, oneshot, race,
    run, run_with,
};
use setups::each_setup;

const LONG: Duration = Duration::from_secs(30);

#[test]
fn ten_thousand_operations_on_a_small_ring() {
    const READS: usize = 10_000;
    for kernel in [Kernel::Newest, Kernel::Linux5_6] {
        let config = Config {
            entries: 8,
            kernel,
            ..Config::default()
        };
        let (reader, mut writer) = pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let done = run_with("test", config, |local| async move {
            let got = Rc::new(RefCell::new(vec![0_u32; 256]));
            let tasks: Vec<_> = (0..READS)
                .map(|_| {
                    let (local, reader, got) =
                        (local.clone(), Arc::clone(&reader), Rc::clone(&got));
                    local.clone().spawn(async move {
                        let (result, buffer) = local.read_at(&reader, vec![0], u64::MAX).await;
                        assert_eq!(result.unwrap(), 1);
                        got.borrow_mut()[usize::from(buffer[0])] += 1;
                    })
                })
                .collect();
            // All of them are in flight before there is anything to read.
            local.sleep(Duration::from_millis(50)).await;
            let bytes: Vec<u8> = (0..READS).map(|at| at as u8).collect();
            let feeder = thread::spawn(move || writer.write_all(&bytes));
            for task in tasks {
                local
                    .timeout(LONG, task)
                    .await
                    .expect("no operation got lost");
            }
            feeder.join().unwrap().unwrap();
            let mut expected = vec![0_u32; 256];
            (0..READS).for_each(|at| expected[at % 256] += 1);
            assert_eq!(*got.borrow(), expected);
        });
        done.unwrap();
    }
}

#[test]
fn files_are_read_and_written() {
    each_setup(|config| {
        let done = run_with("test", config, |local| async move {
            let file = Arc::new(tempfile::tempfile().unwrap());
            let (written, buffer) = local.write_at(&file, b"ebb and tide".to_vec(), 4096).await;
            assert_eq!((written.unwrap(), buffer.len()), (12, 12));
            local.fsync(&file).await.unwrap();
            let (read, buffer) = local.read_at(&file, vec![0xff; 32], 4100).await;
            assert_eq!(read.unwrap(), 8);
            assert_eq!(&buffer[..8], b"and tide");
            assert_eq!(&buffer[8..], [0xff; 24]);
            assert_eq!(
                local.read_at(&file, vec![0; 8], 1 << 40).await.0.unwrap(),
                0
            );
        });
        done.unwrap();
    });
}

#[test]
fn timers_fire_in_order_of_their_deadlines() {
    // A clock that is turned, so that no deadline passes before its timer is set.
    let clock = ManualClock::new();
    let config = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    let order = run_with("test", config, |local| async move {
        let order = Rc::new(RefCell::new(Vec::new()));
        let base = local.now();
        let tasks: Vec<_> = (0..)
            .zip([30, 5, 20, 5, 0, 10])
            .map(|(number, delay_ms)| {
                let (inner, order) = (local.clone(), Rc::clone(&order));
                local.spawn(async move {
                    inner
                        .sleep_until(base + Duration::from_millis(delay_ms))
                        .await;
                    order.borrow_mut().push(number);
                })
            })
            .collect();
        local.yield_now().await;
        clock.advance(Duration::from_millis(30));
        for task in tasks {
            task.await;
        }
        order.take()
    });
    // Those of one deadline in the order in which they were started.
    assert_eq!(order.unwrap(), [4, 1, 3, 5, 2, 0]);
}

#[test]
fn no_timer_fires_early() {
    each_setup(|config| {
        let done = run_with("test", config, |local| async move {
            let tasks: Vec<_> = (0..40)
                .map(|step| {
                    let (inner, delay) = (local.clone(), Duration::from_micros(step * 500));
                    local.spawn(async move {
                        let deadline = inner.now() + delay;
                        inner.sleep_until(deadline).await;
                        assert!(inner.now() >= deadline, "too early");
                    })
                })
                .collect();
            for task in tasks {
                local.timeout(LONG, task).await.expect("fires at all");
            }
        });
        done.unwrap();
    });
}

#[test]
fn a_handed_in_clock_decides_what_is_due() {
    let clock = ManualClock::new();
    let config = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    let iothread = IoThread::spawn_with("test", config).unwrap();
    let (fired, mut events) = channel();
    let spawned = iothread.remote().spawn(move |local| async move {
        for hours in [1, 3, 2] {
            let (inner, fired) = (local.clone(), fired.clone());
            let task = local.spawn(async move {
                inner.sleep(Duration::from_secs(3600 * hours)).await;
                fired.send(hours);
            });
            task.detach();
        }
        // Every task is asleep before the clock is turned.
        local.yield_now().await;
        fired.send(0);
    });
    spawned.unwrap();
    run("control", |local| async move {
        assert_eq!(local.timeout(LONG, events.recv()).await, Ok(Some(0)));
        clock.advance(Duration::from_secs(3599));
        let none = local
            .timeout(Duration::from_millis(20), events.recv())
            .await;
        assert!(none.is_err(), "no hour has passed");
        clock.advance(Duration::from_secs(1));
        assert_eq!(local.timeout(LONG, events.recv()).await, Ok(Some(1)));
        clock.advance(Duration::from_secs(7200));
        assert_eq!(local.timeout(LONG, events.recv()).await, Ok(Some(2)));
        assert_eq!(local.timeout(LONG, events.recv()).await, Ok(Some(3)));
    })
    .unwrap();
}

#[test]
fn wakes_from_other_threads_are_not_lost() {
    const THREADS: u32 = 4;
    const ROUNDS: u32 = 5_000;
    each_setup(|config| {
        let done = run_with("test", config, |local| async move {
            // Ping-pong with each thread: every round the executor may be about to fall asleep.
            let tasks: Vec<_> = (0..THREADS)
                .map(|_| {
                    let (ask, asked) = std::sync::mpsc::channel::<oneshot::Sender<u32>>();
                    let thread = thread::spawn(move || {
                        for (round, answer) in (0..).zip(asked) {
                            answer.send(round).unwrap();
                        }
                    });
                    local.spawn(async move {
                        for round in 0..ROUNDS {
                            let (answer, answered) = oneshot::channel();
                            ask.send(answer).unwrap();
                            assert_eq!(answered.await, Some(round));
                        }
                        drop(ask);
                        thread.join().unwrap();
                    })
                })
                .collect();
            for task in tasks {
                local
                    .timeout(Duration::from_secs(120), task)
                    .await
                    .expect("no wake-up got lost");
            }
        });
        done.unwrap();
    });
}

#[test]
fn messages_arrive_complete_and_in_their_senders_order() {
    const SENDERS: u32 = 4;
    const MESSAGES: u32 = 20_000;
    let (sender, mut receiver) = channel();
    let threads: Vec<_> = (0..SENDERS)
        .map(|from| {
            let sender = sender.clone();
            thread::spawn(move || (0..MESSAGES).for_each(|n| assert!(sender.send((from, n)))))
        })
        .collect();
    drop(sender);
    run("test", |_| async move {
        let mut next = [0; SENDERS as usize];
        while let Some((from, n)) = receiver.recv().await {
            assert_eq!(n, next[from as usize]);
            next[from as usize] += 1;
        }
        assert_eq!(next, [MESSAGES; SENDERS as usize]);
        assert_eq!(receiver.try_recv(), None);
    })
    .unwrap();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

#[test]
fn channels_tell_when_the_other_side_is_gone() {
    let (sender, receiver) = channel();
    assert!(sender.send(1));
    drop(receiver);
    assert!(!sender.send(2));

    let (sender, receiver) = oneshot::channel();
    drop(receiver);
    assert!(sender.is_closed());
    assert_eq!(sender.send(3), Err(3));

    let (sender, receiver) = oneshot::channel::<u32>();
    drop(sender);
    assert_eq!(run("test", |_| receiver).unwrap(), None);
}

/// A task that keeps waking itself, and what has to go on meanwhile.
#[test]
fn a_busy_task_starves_nothing() {
    each_setup(|config| {
        let iothread = IoThread::spawn_with("busy", config).unwrap();
        let polls = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&polls);
        let busy = move |local: Local| async move {
            loop {
                counter.fetch_add(1, Ordering::Relaxed);
                local.yield_now().await;
            }
        };
        iothread.remote().spawn(busy).unwrap();
        let mut event = Event::new().unwrap();
        let notifier = event.notifier();
        let (sender, mut steps) = channel();
        let served = iothread.remote().spawn(move |local| async move {
            sender.send("remote");
            local.sleep(Duration::from_millis(1)).await;
            sender.send("timer");
            event.wait(&local).await.unwrap();
            sender.send("completion");
        });
        served.unwrap();
        run("control", |local| async move {
            assert_eq!(local.timeout(LONG, steps.recv()).await, Ok(Some("remote")));
            assert_eq!(local.timeout(LONG, steps.recv()).await, Ok(Some("timer")));
            notifier.notify();
            assert_eq!(
                local.timeout(LONG, steps.recv()).await,
                Ok(Some("completion"))
            );
        })
        .unwrap();
        assert!(polls.load(Ordering::Relaxed) > 64);
        // And it does not hold up stopping.
        drop(iothread);
    });
}

#[test]
fn an_event_counts_and_loses_nothing_when_its_wait_is_dropped() {
    each_setup(|config| {
        let done = run_with("test", config, |local| async move {
            let mut event = Event::new().unwrap();
            let notifier = event.notifier();
            for _ in 0..3 {
                notifier.notify();
            }
            assert_eq!(event.wait(&local).await.unwrap(), 3);
            assert_eq!(event.take().unwrap(), None);
            assert!(
                local
                    .timeout(Duration::from_millis(2), event.wait(&local))
                    .await
                    .is_err()
            );
            for _ in 0..100 {
                let other = notifier.clone();
                let thread = thread::spawn(move || other.notify());
                // Whoever wins: the signal is taken exactly once.
                let first = race(event.wait(&local), local.yield_now()).await;
                let count = match first {
                    Either::Left(count) => count.unwrap(),
                    Either::Right(()) => local
                        .timeout(LONG, event.wait(&local))
                        .await
                        .unwrap()
                        .unwrap(),
                };
                assert_eq!(count, 1);
                thread.join().unwrap();
                assert_eq!(event.take().unwrap(), None);
            }
        });
        done.unwrap();
    });
}

struct CountDrop(Arc<AtomicU32>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn stopping_drops_every_task_on_its_thread() {
    each_setup(|config| {
        let iothread = IoThread::spawn_with("test", config).unwrap();
        let drops = Arc::new(AtomicU32::new(0));
        let (never, waiting) = oneshot::channel::<()>();
        let (parked, mut all_parked) = channel();
        let inner_drops = Arc::clone(&drops);
        let spawned = iothread.remote().spawn(move |local| async move {
            let waiting = Rc::new(RefCell::new(Some(waiting)));
            for number in 0..300 {
                let counted = CountDrop(Arc::clone(&inner_drops));
                let (inner, waiting) = (local.clone(), Rc::clone(&waiting));
                let task = local.spawn(async move {
                    let _counted = counted;
                    let first_wait = if number == 0 { waiting.take() } else { None };
                    match (number % 3, first_wait) {
                        (_, Some(waiting)) => drop(waiting.await),
                        (1, _) => inner.sleep(LONG).await,
                        _ => loop {
                            inner.yield_now().await;
                        },
                    }
                });
                task.detach();
            }
            local.yield_now().await;
            parked.send(());
        });
        spawned.unwrap();
        run("control", |_| async move { all_parked.recv().await }).unwrap();
        // A wake-up from another thread while it stops.
        let late = thread::spawn(move || drop(never));
        let remote = iothread.remote();
        drop(iothread);
        assert_eq!(drops.load(Ordering::SeqCst), 300);
        late.join().unwrap();
        assert_eq!(remote.spawn(|_| async {}), Err(Stopped));
    });
}

/// A task that never has to wait for what it reads, and others that want their turn.
#[test]
fn a_flood_of_input_starves_nothing() {
    run("test", |local| async move {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let inner = local.clone();
        let reading = local.spawn(async move {
            loop {
                let read = inner.when_readable(&zero, || (&zero).read(&mut [0])).await;
                assert_eq!(read.unwrap(), 1);
            }
        });
        let (sender, mut receiver) = channel();
        let receiving = local.spawn(async move {
            // Each message puts the next one there before it is asked for.
            while let Some(sender) = receiver.recv().await {
                let sender: Box<dyn Fn() + Send> = sender;
                sender();
            }
        });
        fn refill(sender: ebbtide_iothread::Sender<Box<dyn Fn() + Send>>) {
            let next = sender.clone();
            sender.send(Box::new(move || refill(next.clone())));
        }
        refill(sender);
        for _ in 0..10 {
            local.sleep(Duration::from_millis(1)).await;
        }
        assert!(!reading.is_finished() && !receiving.is_finished());
    })
    .unwrap();
}

/// Threads keep waking tasks while the executor stops.
#[test]
fn stress_stopping_against_wakes() {
    for round in 0..200 {
        let iothread = IoThread::spawn("test").unwrap();
        let (sender, mut receiver) = channel::<u32>();
        let receiving = iothread.remote().spawn(move |local| async move {
            let inner = local.clone();
            let pump = local.spawn(async move { while receiver.recv().await.is_some() {} });
            let sleeper = local.spawn(async move { inner.sleep(LONG).await });
            race(pump, sleeper).await;
        });
        receiving.unwrap();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let sender = sender.clone();
                thread::spawn(move || while sender.send(1) {})
            })
            .collect();
        thread::sleep(Duration::from_micros(round * 10));
        drop(iothread);
        // Stopping drops the receiver, which is what ends the threads.
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    }
}

#[test]
fn a_dropped_task_is_cancelled_and_a_detached_one_is_not() {
    run("test", |local| async move {
        let drops = Arc::new(AtomicU32::new(0));
        let done = Rc::new(Cell::new(0));
        let work = |detach: bool| {
            let (inner, counted) = (local.clone(), CountDrop(Arc::clone(&drops)));
            let done = Rc::clone(&done);
            let task = local.spawn(async move {
                inner.sleep(Duration::from_millis(5)).await;
                done.set(done.get() + 1);
                drop(counted);
            });
            if detach { task.detach() } else { drop(task) }
        };
        work(false);
        work(true);
        // The dropped one would be the first to be done.
        while done.get() == 0 {
            local.sleep(Duration::from_millis(1)).await;
        }
        local.sleep(Duration::from_millis(20)).await;
        assert_eq!((done.get(), drops.load(Ordering::SeqCst)), (1, 2));

        let counted = CountDrop(Arc::clone(&drops));
        let endless = local.spawn(async move {
            std::future::pending::<()>().await;
            drop(counted);
        });
        local.yield_now().await;
        assert!(!endless.is_finished());
        assert_eq!(endless.cancel().await, None);
        assert_eq!(
            drops.load(Ordering::SeqCst),
            3,
            "dropped by the time cancel returns"
        );
        assert_eq!(local.spawn(async { 7 }).await, 7);
    })
    .unwrap();
}

#[test]
fn a_panic_in_a_task_comes_out_of_run() {
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        run("test", |local| async move {
            local.spawn(async { panic!("on purpose") }).detach();
            std::future::pending::<()>().await;
        })
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"on purpose"));
}

#[test]
fn executors_may_be_nested() {
    let sum = run("outer", |outer| async move {
        let task = outer.spawn(async { 1 });
        let inner = run("inner", |inner| async move {
            inner.sleep(Duration::from_millis(1)).await;
            inner.spawn(async { 2 }).await
        });
        task.await + inner.unwrap()
    });
    assert_eq!(sum.unwrap(), 3);
}

#[test]
fn an_idle_executor_sleeps() {
    each_setup(|config| {
        let cpu = || {
            let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
            // SAFETY: the kernel fills the structure, whose every bit pattern is valid.
            let usage = unsafe {
                assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()), 0);
                usage.assume_init()
            };
            Duration::new(
                usage.ru_utime.tv_sec as u64,
                usage.ru_utime.tv_usec as u32 * 1000,
            ) + Duration::new(
                usage.ru_stime.tv_sec as u64,
                usage.ru_stime.tv_usec as u32 * 1000,
            )
        };
        let began = Instant::now();
        let used = run_with("test", config, |local| async move {
            let before = cpu();
            local.sleep(Duration::from_millis(300)).await;
            cpu() - before
        });
        let used = used.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(300));
        assert!(
            used < Duration::from_millis(100),
            "{used:?} of CPU time for doing nothing"
        );
    });
}

#[test]
fn the_types_travel_as_documented() {
    fn send<T: Send + 'static>() {}
    fn send_sync<T: Send + Sync + 'static>() {}
    send_sync::<ebbtide_iothread::Remote>();
    send_sync::<ebbtide_iothread::Notifier>();
    send_sync::<IoThread>();
    send_sync::<ebbtide_iothread::Blocking>();
    send_sync::<ebbtide_iothread::Sender<Cell<u8>>>();
    send::<Event>();
    send::<ebbtide_iothread::Receiver<Cell<u8>>>();
    send::<ebbtide_iothread::Finished<Cell<u8>>>();
    send::<oneshot::Receiver<Cell<u8>>>();
}
