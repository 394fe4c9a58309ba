// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiters of the bounce budget, and DMA through an IOMMU while it is told to forget.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use ebbtide_memory::BounceGrant;
use ebbtide_memory::modelled::{Bounce, Translations};
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::{Page, explore};

/// What a grant of the whole budget gives the right to.
struct Buffer(UnsafeCell<u32>);

// SAFETY: loom checks that two threads never use it without order between them.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn new() -> Arc<Buffer> {
        Arc::new(Buffer(UnsafeCell::new(0)))
    }

    fn scribble(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|value| unsafe { *value += 1 });
    }
}

fn get(bounce: &Bounce, bytes: u64) -> BounceGrant {
    bounce.take(bytes).unwrap_or_else(block_on)
}

#[test]
fn model_bounce_wake() {
    explore(
        "memory/bounce-wake",
        "what is given back of a bounce buffer serves everybody it is enough for, and nobody twice",
        3,
        || {
            let bounce = Bounce::new(2);
            let buffer = Buffer::new();
            let all = get(&bounce, 2);
            // They keep what they got until both have it.
            let waiters: Vec<_> = (0..2)
                .map(|_| {
                    let bounce = bounce.clone();
                    thread::spawn(move || get(&bounce, 1))
                })
                .collect();
            buffer.scribble();
            drop(all);
            let grants: Vec<_> = waiters.into_iter().map(|it| it.join().unwrap()).collect();
            assert_eq!(bounce.used(), 2);
            let last = {
                let (bounce, buffer) = (bounce.clone(), Arc::clone(&buffer));
                thread::spawn(move || {
                    let grant = get(&bounce, 2);
                    buffer.scribble();
                    drop(grant);
                })
            };
            buffer.scribble();
            drop(grants);
            last.join().unwrap();
            assert_eq!(bounce.used(), 0);
        },
    );
}

#[test]
fn model_bounce_gives_up() {
    explore(
        "memory/bounce-gives-up",
        "a waiter that gives up, served or not, passes its turn on",
        3,
        || {
            let bounce = Bounce::new(1);
            let all = get(&bounce, 1);
            let first = bounce.take(1);
            let quitter = thread::spawn(move || {
                let Err(mut wait) = first else {
                    panic!("granted over what there is")
                };
                // Asked once, then dropped, whatever the answer was.
                let mut cx = Context::from_waker(Waker::noop());
                drop(Pin::new(&mut wait).poll(&mut cx));
            });
            let waiter = {
                let bounce = bounce.clone();
                thread::spawn(move || drop(get(&bounce, 1)))
            };
            drop(all);
            quitter.join().unwrap();
            waiter.join().unwrap();
            assert_eq!(bounce.used(), 0);
        },
    );
}

#[test]
fn model_iommu() {
    explore(
        "memory/iommu",
        "an invalidation is complete only when no DMA through the old translation is left",
        4,
        || {
            let domain = Arc::new(Translations::default());
            let mapped = Arc::new(AtomicBool::new(true));
            let page = Page::new();
            let devices: Vec<_> = (0..2)
                .map(|_| {
                    let (domain, mapped) = (Arc::clone(&domain), Arc::clone(&mapped));
                    let page = Arc::clone(&page);
                    thread::spawn(move || {
                        // The table has a lock of its own in real life; acquire does here.
                        let look = || mapped.load(Ordering::Acquire);
                        let (flight, found) = domain.dma(0..1, look);
                        if found {
                            page.touch();
                        }
                        drop(flight);
                    })
                })
                .collect();
            mapped.store(false, Ordering::Release);
            block_on(domain.unmap(0..1));
            page.poison();
            for device in devices {
                device.join().unwrap();
            }
        },
    );
}
