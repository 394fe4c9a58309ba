// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel may write to stays as it is until the kernel is through with it, whatever is dropped when.
#![cfg(not(loom))]

mod setups;

use std::cell::{Cell, RefCell};
use std::io::{Read, Write, pipe};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_iothread::{Elapsed, Local, Op, run, run_with};
use io_uring::{opcode, types};
use setups::each_setup;

const POISON: u8 = 0xa5;
const BYTES: usize = 64;

/// Memory that outlives its owner, so that a test can see a write after the owner has given it up.
struct Lent {
    memory: *mut u8,
    returned: Rc<Cell<bool>>,
}

/// The test's view of it.
struct Watch {
    memory: *const u8,
    returned: Rc<Cell<bool>>,
}

fn lend() -> (Lent, Watch) {
    let memory = Box::leak(Box::new([0_u8; BYTES])).as_mut_ptr();
    let returned = Rc::new(Cell::new(false));
    (
        Lent {
            memory,
            returned: Rc::clone(&returned),
        },
        Watch { memory, returned },
    )
}

impl Drop for Lent {
    fn drop(&mut self) {
        assert!(!self.returned.replace(true), "given back twice");
        // SAFETY: the memory is never freed, and by the claim under test the kernel is through with it.
        unsafe { self.memory.write_bytes(POISON, BYTES) };
    }
}

impl Watch {
    fn is_returned(&self) -> bool {
        self.returned.get()
    }

    fn assert_untouched(&self) {
        assert!(self.is_returned());
        for at in 0..BYTES {
            // SAFETY: the memory is never freed; volatile, for a wrong kernel could write to it.
            let byte = unsafe { self.memory.add(at).read_volatile() };
            assert_eq!(byte, POISON, "written to after it was given back");
        }
    }
}

type Reading = Op<(Lent, Arc<OwnedFd>)>;

fn read_into(local: &Local, lent: Lent, fd: &Arc<OwnedFd>) -> Reading {
    let entry =
        opcode::Read::new(types::Fd(fd.as_raw_fd()), lent.memory, BYTES as u32).offset(u64::MAX);
    // SAFETY: the memory is never freed and the descriptor is kept with it.
    unsafe { local.submit(entry.build(), (lent, Arc::clone(fd))) }
}

#[test]
fn stopping_with_a_pending_read_waits_for_the_kernel() {
    each_setup(|config| {
        let (reader, mut writer) = pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let (lent, watch) = lend();
        let returned = run_with("test", config, |local| async move {
            let reading = read_into(&local, lent, &reader);
            local.spawn(reading).detach();
            local.sleep(Duration::from_millis(10)).await;
            let early = watch.is_returned();
            (watch, early, reader)
        });
        let (watch, early, reader) = returned.unwrap();
        assert!(!early, "given back while the read was pending");
        watch.assert_untouched();
        // Had the read survived, this would land in the poisoned memory.
        writer.write_all(&[1; BYTES]).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        watch.assert_untouched();
        drop(reader);
    });
}

#[test]
fn a_dropped_read_keeps_its_memory_until_the_kernel_answers() {
    each_setup(|config| {
        let (reader, mut writer) = pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let watch = run_with("test", config, |local| async move {
            let (lent, watch) = lend();
            let reading = read_into(&local, lent, &reader);
            local.sleep(Duration::from_millis(5)).await;
            drop(reading);
            assert!(!watch.is_returned(), "the kernel was not even asked yet");
            local
                .timeout(Duration::from_secs(60), async {
                    while !watch.is_returned() {
                        local.yield_now().await;
                    }
                })
                .await
                .expect("a read of a pipe can be cancelled");
            writer.write_all(&[1; BYTES]).unwrap();
            local.sleep(Duration::from_millis(5)).await;
            watch.assert_untouched();
            // The cancelled read has not taken the data either.
            let (lent, _watch) = lend();
            let (result, _) = read_into(&local, lent, &reader).await;
            assert_eq!(result, BYTES as i32);
            watch
        });
        watch.unwrap().assert_untouched();
    });
}

#[test]
fn an_operation_dropped_before_its_turn_is_never_started() {
    each_setup(|config| {
        let (reader, mut writer) = pipe().unwrap();
        writer.write_all(&[1; BYTES]).unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let done = run_with("test", config, |local| async move {
            let (lent, watch) = lend();
            drop(read_into(&local, lent, &reader));
            watch.assert_untouched();
            local.sleep(Duration::from_millis(5)).await;
            watch.assert_untouched();
            let (lent, _watch) = lend();
            assert_eq!(read_into(&local, lent, &reader).await.0, BYTES as i32);
        });
        done.unwrap();
    });
}

#[test]
fn a_result_nobody_fetched_gives_its_memory_back() {
    let (reader, mut writer) = pipe().unwrap();
    writer.write_all(&[1; BYTES]).unwrap();
    let reader = Arc::new(OwnedFd::from(reader));
    run("test", |local| async move {
        let (lent, watch) = lend();
        let reading = read_into(&local, lent, &reader);
        local.sleep(Duration::from_millis(5)).await;
        assert!(!watch.is_returned());
        drop(reading);
        watch.assert_untouched();
    })
    .unwrap();
}

#[test]
fn a_timeout_cancels_what_it_waited_for() {
    each_setup(|config| {
        let (reader, mut writer) = pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let done = run_with("test", config, |local| async move {
            let (lent, watch) = lend();
            let reading = read_into(&local, lent, &reader);
            let result = local.timeout(Duration::from_millis(5), reading).await;
            assert_eq!(result.err(), Some(Elapsed));
            local.sleep(Duration::from_millis(5)).await;
            watch.assert_untouched();
            writer.write_all(&[1; BYTES]).unwrap();
            let (lent, _watch) = lend();
            let reading = read_into(&local, lent, &reader);
            let (result, _) = local
                .timeout(Duration::from_secs(60), reading)
                .await
                .unwrap();
            assert_eq!(result, BYTES as i32, "the timed out read took nothing");
        });
        done.unwrap();
    });
}

#[test]
fn a_cancelled_operation_still_resolves() {
    each_setup(|config| {
        let (reader, mut writer) = pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let done = run_with("test", config, |local| async move {
            for started in [false, true] {
                let (lent, watch) = lend();
                let reading = read_into(&local, lent, &reader);
                if started {
                    local.sleep(Duration::from_millis(2)).await;
                }
                reading.cancel();
                let (result, kept) = local
                    .timeout(Duration::from_secs(60), reading)
                    .await
                    .unwrap();
                assert!(
                    [-libc::ECANCELED, -libc::EINTR].contains(&result),
                    "{result}"
                );
                assert!(!watch.is_returned());
                drop(kept);
                watch.assert_untouched();
            }
            writer.write_all(&[1; BYTES]).unwrap();
            let (lent, _watch) = lend();
            let reading = read_into(&local, lent, &reader);
            local.sleep(Duration::from_millis(2)).await;
            reading.cancel();
            assert_eq!(reading.await.0, BYTES as i32, "too late to cancel");
        });
        done.unwrap();
    });
}

#[test]
fn a_panic_leaves_nothing_in_flight() {
    let (reader, mut writer) = pipe().unwrap();
    let reader = Arc::new(OwnedFd::from(reader));
    let (lent, watch) = lend();
    let (task_lent, task_watch) = lend();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        run("test", |local| async move {
            let _reading = read_into(&local, lent, &reader);
            let in_task = read_into(&local, task_lent, &reader);
            local.spawn(in_task).detach();
            local.sleep(Duration::from_millis(5)).await;
            panic!("on purpose");
        })
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"on purpose"));
    watch.assert_untouched();
    task_watch.assert_untouched();
    assert!(writer.write_all(&[1]).is_err(), "the last reader is closed");
}

#[test]
fn an_executor_that_has_stopped_refuses_and_gives_back() {
    let (mut reader, writer) = pipe().unwrap();
    let writer = Arc::new(OwnedFd::from(writer));
    let local = run("test", |local| async move { local }).unwrap();
    let stuck = Box::pin(local.write_at(&writer, vec![1, 2, 3], u64::MAX));
    let waker = std::task::Waker::noop();
    let mut cx = std::task::Context::from_waker(waker);
    let std::task::Poll::Ready((result, buffer)) = Future::poll({ stuck }.as_mut(), &mut cx) else {
        panic!("refused at once");
    };
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    assert_eq!(buffer, [1, 2, 3]);
    let dropped = Rc::new(());
    local
        .spawn({
            let dropped = Rc::clone(&dropped);
            async move { drop(dropped) }
        })
        .detach();
    assert_eq!(
        Rc::strong_count(&dropped),
        1,
        "dropped at once, for nobody would poll it"
    );
    drop((writer, local));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nothing was written");
}

/// What an operation keeps may itself own operations, tasks and the executor.
#[test]
fn what_is_kept_may_come_back_to_the_ring_when_dropped() {
    struct Reenter {
        local: Local,
        fd: Arc<OwnedFd>,
        inner: RefCell<Option<Reading>>,
        drops: Rc<Cell<u32>>,
    }
    impl Drop for Reenter {
        fn drop(&mut self) {
            self.drops.set(self.drops.get() + 1);
            drop(self.inner.take());
            let (lent, _) = lend();
            drop(read_into(&self.local, lent, &self.fd));
            self.local.spawn(async {}).detach();
        }
    }
    each_setup(|config| {
        let (reader, _writer) = pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let drops = Rc::new(Cell::new(0));
        let done = run_with("test", config, |local| {
            let drops = Rc::clone(&drops);
            async move {
                for keep_until_stop in [false, true] {
                    let (lent, _) = lend();
                    let inner = RefCell::new(Some(read_into(&local, lent, &reader)));
                    let drops = Rc::clone(&drops);
                    let keep = Reenter {
                        local: local.clone(),
                        fd: Arc::clone(&reader),
                        inner,
                        drops,
                    };
                    let fd = types::Fd(reader.as_raw_fd());
                    let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
                    // SAFETY: the descriptor is kept.
                    let op = unsafe { local.submit(entry, keep) };
                    local.sleep(Duration::from_millis(5)).await;
                    if keep_until_stop {
                        local.spawn(op).detach();
                    } else {
                        drop(op);
                    }
                    local.sleep(Duration::from_millis(5)).await;
                }
                drops.get()
            }
        });
        assert_eq!(done.unwrap(), 1, "the cancelled one");
        assert_eq!(drops.get(), 2, "and the one that stopping cancelled");
    });
}
