// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocols under loom. Each model is listed in `models.toml` with the bugs it must find.
//!
//! Guest memory is a cell that complains when it is used and poisoned at the same time. A wake-up
//! that gets lost shows as a deadlock: the worker sleeps for ever.
#![cfg(loom)]

#[path = "models/dma.rs"]
mod dma;
#[path = "models/kept.rs"]
mod kept;
#[path = "models/mapper.rs"]
mod mapper;
#[path = "models/unplug.rs"]
mod unplug;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebbtide_memory::modelled::{Core, Home, PinToken, ViewPointer};
use ebbtide_models::explore;
use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::thread;

/// Guest memory, or a view: valid until poisoned.
struct Page(UnsafeCell<u32>);

// SAFETY: loom checks that the cell is never used by two threads without order between them.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn new() -> Arc<Page> {
        Arc::new(Page(UnsafeCell::new(1)))
    }

    fn touch(&self) {
        // SAFETY: loom checks it.
        self.0
            .with(|value| assert_eq!(unsafe { *value }, 1, "used after it was given back"));
    }

    fn poison(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|value| unsafe { *value = 0xdead });
    }
}

type View = Option<Arc<Page>>;

/// Looks a page up and touches it inside a section.
fn look(thread: &Home, view: &ViewPointer<View>) {
    thread.enter();
    // SAFETY: inside the section.
    if let Some(page) = unsafe { view.get() } {
        page.touch();
    }
    thread.leave();
}

#[test]
fn model_section() {
    explore(
        "memory/section",
        "no section uses a view after its grace period",
        6,
        || {
            let core = Core::default();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let reader = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || {
                    let thread = core.register();
                    look(&thread, &view);
                    look(&thread, &view);
                })
            };
            let mut worker = core.worker();
            let freed = Arc::new(AtomicU64::new(0));
            let (old, done) = (view.replace(None), Arc::clone(&freed));
            core.published(move || {
                old.iter().for_each(|page| page.poison());
                done.store(1, Ordering::Relaxed);
            });
            core.work_while(&mut worker, || freed.load(Ordering::Relaxed) == 0);
            reader.join().unwrap();
        },
    );
}

#[test]
fn model_section_nested() {
    explore(
        "memory/section-nested",
        "a grace period waits for the outermost of two readers' sections",
        4,
        || {
            let core = Core::default();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let (core, view) = (core.clone(), Arc::clone(&view));
                    thread::spawn(move || {
                        let thread = core.register();
                        thread.enter();
                        look(&thread, &view);
                        // SAFETY: still inside the outer section.
                        if let Some(page) = unsafe { view.get() } {
                            page.touch();
                        }
                        thread.leave();
                    })
                })
                .collect();
            let mut worker = core.worker();
            let freed = Arc::new(AtomicU64::new(0));
            let (old, done) = (view.replace(None), Arc::clone(&freed));
            core.published(move || {
                old.iter().for_each(|page| page.poison());
                done.store(1, Ordering::Relaxed);
            });
            core.work_while(&mut worker, || freed.load(Ordering::Relaxed) == 0);
            readers
                .into_iter()
                .for_each(|reader| reader.join().unwrap());
        },
    );
}

#[test]
fn model_section_wake() {
    explore(
        "memory/section-wake",
        "the end of each section a grace period waits for wakes the worker",
        4,
        || {
            let core = Core::default();
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let core = core.clone();
                    thread::spawn(move || {
                        let thread = core.register();
                        thread.enter();
                        thread.leave();
                    })
                })
                .collect();
            let passed = core.grace();
            core.work_until(&mut core.worker(), &passed);
            readers
                .into_iter()
                .for_each(|reader| reader.join().unwrap());
        },
    );
}

/// Pins what the view shows, if it shows something.
fn take(thread: &Home, view: &ViewPointer<View>, slot: u32) -> Option<(PinToken, Arc<Page>)> {
    thread.enter();
    // SAFETY: inside the section.
    let found = unsafe { view.get() }
        .as_ref()
        .map(|page| (thread.pin(slot, 0), Arc::clone(page)));
    thread.leave();
    found
}

/// The unplug of a page: no view shows it, then the worker waits for its pins.
fn unplug(core: &Core, view: &ViewPointer<View>, slot: u32) {
    let old = view.replace(None);
    let drained = core.unplug(slot);
    core.work_until(&mut core.worker(), &drained);
    old.iter().for_each(|page| page.poison());
}

#[test]
fn model_pin() {
    explore(
        "memory/pin",
        "memory is not given back while one of two readers holds a pin",
        3,
        || {
            let core = Core::default();
            let slot = core.slot();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let (core, view) = (core.clone(), Arc::clone(&view));
                    thread::spawn(move || {
                        let thread = core.register();
                        if let Some((pin, page)) = take(&thread, &view, slot) {
                            page.touch();
                            drop(pin);
                        }
                    })
                })
                .collect();
            unplug(&core, &view, slot);
            readers
                .into_iter()
                .for_each(|reader| reader.join().unwrap());
        },
    );
}

#[test]
fn model_pin_remote() {
    explore(
        "memory/pin-remote",
        "a pin let go on another thread counts until then",
        6,
        || {
            let core = Core::default();
            let slot = core.slot();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let passed = Arc::new(Mutex::new(None));
            let (pinning, dropping) = (Arc::clone(&passed), Arc::clone(&passed));
            let home = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || {
                    let thread = core.register();
                    let taken = take(&thread, &view, slot);
                    *pinning.lock().unwrap() = taken;
                })
            };
            let away = thread::spawn(move || {
                let taken = dropping.lock().unwrap().take();
                if let Some((pin, page)) = taken {
                    page.touch();
                    drop(pin);
                }
            });
            // Whoever comes last lets go.
            let finish = move || {
                let taken = passed.lock().unwrap().take();
                if let Some((pin, page)) = taken {
                    page.touch();
                    drop(pin);
                }
            };
            home.join().unwrap();
            away.join().unwrap();
            let unplugger = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || unplug(&core, &view, slot))
            };
            finish();
            unplugger.join().unwrap();
        },
    );
}

#[test]
fn model_pin_clone() {
    explore(
        "memory/pin-clone",
        "a clone counts although its original is let go at once",
        5,
        || {
            let core = Core::default();
            let slot = core.slot();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let thread = core.register();
            let (pin, page) = take(&thread, &view, slot).unwrap();
            let away = thread::spawn(move || {
                let clone = pin.clone();
                drop(pin);
                page.touch();
                drop(clone);
            });
            unplug(&core, &view, slot);
            away.join().unwrap();
        },
    );
}

#[test]
fn model_drain_wake() {
    explore(
        "memory/drain-wake",
        "the last unpin ends the unplug, or wakes the worker to do it",
        4,
        || {
            let core = Core::default();
            let slot = core.slot();
            let home = {
                let core = core.clone();
                let view = ViewPointer::<View>::new(Some(Page::new()));
                move || {
                    let thread = core.register();
                    let (first, _) = take(&thread, &view, slot).unwrap();
                    let (second, _) = take(&thread, &view, slot).unwrap();
                    drop(first);
                    drop(second);
                }
            };
            let pinner = thread::spawn(home);
            let drained = core.unplug(slot);
            core.work_until(&mut core.worker(), &drained);
            pinner.join().unwrap();
        },
    );
}

#[test]
fn model_fence() {
    explore(
        "memory/fence",
        "a sealed range is not given back while an earlier pin of it is held",
        5,
        || {
            let core = Core::default();
            let slot = core.slot();
            let sparse = Arc::new(core.sparse(slot, 2));
            let page = Page::new();
            let pinner = {
                let (core, sparse, page) = (core.clone(), Arc::clone(&sparse), Arc::clone(&page));
                thread::spawn(move || {
                    let thread = core.register();
                    thread.enter();
                    let pin = sparse.admit(0).map(|bank| thread.pin(slot, bank));
                    thread.leave();
                    if pin.is_some() {
                        page.touch();
                    }
                })
            };
            let drained = sparse.seal(0..1);
            core.work_until(&mut core.worker(), &drained);
            page.poison();
            pinner.join().unwrap();
        },
    );
}

#[test]
fn model_fence_batch() {
    explore(
        "memory/fence-batch",
        "seals that come while a fence runs get their own bank",
        3,
        || {
            let core = Core::default();
            let slot = core.slot();
            let sparse = Arc::new(core.sparse(slot, 2));
            let pages = [Page::new(), Page::new()];
            let sealer = {
                let sparse = Arc::clone(&sparse);
                thread::spawn(move || sparse.seal(1..2))
            };
            let pinner = {
                let (core, sparse, page) =
                    (core.clone(), Arc::clone(&sparse), Arc::clone(&pages[1]));
                thread::spawn(move || {
                    let thread = core.register();
                    thread.enter();
                    let pin = sparse.admit(1).map(|bank| thread.pin(slot, bank));
                    thread.leave();
                    if pin.is_some() {
                        page.touch();
                    }
                })
            };
            let mut worker = core.worker();
            let first = sparse.seal(0..1);
            core.work_until(&mut worker, &first);
            pages[0].poison();
            let second = sealer.join().unwrap();
            core.work_until(&mut worker, &second);
            pages[1].poison();
            pinner.join().unwrap();
        },
    );
}

#[test]
fn model_fence_slot() {
    explore(
        "memory/fence-slot",
        "a fence that outlives its block turns over no other block's banks",
        4,
        || {
            let core = Core::default();
            let old = core.sparse(core.slot(), 1);
            // Taken back at once: the block can go before the fence has begun.
            let fence = old.seal(0..1);
            let owner = {
                let core = core.clone();
                thread::spawn(move || {
                    old.give_up_slot();
                    let slot = core.slot();
                    let next = core.sparse(slot, 1);
                    let thread = core.register();
                    thread.enter();
                    let pin = next.admit(0).map(|bank| thread.pin(slot, bank));
                    thread.leave();
                    let seal = next.seal(0..1);
                    assert!(!seal.is_over(), "drained under a pin");
                    thread::yield_now();
                    assert!(!seal.is_over(), "drained under a pin");
                    drop(pin);
                    seal
                })
            };
            let mut worker = core.worker();
            core.work_until(&mut worker, &fence);
            core.work_once(&mut worker);
            let seal = owner.join().unwrap();
            core.work_until(&mut worker, &seal);
        },
    );
}

#[test]
fn model_cached() {
    explore(
        "memory/cached",
        "a cached translation is not used after a seal drained",
        6,
        || {
            let core = Core::default();
            let slot = core.slot();
            let sparse = Arc::new(core.sparse(slot, 1));
            let page = Page::new();
            let generation = core.generation();
            let user = {
                let (core, page) = (core.clone(), Arc::clone(&page));
                thread::spawn(move || {
                    let thread = core.register();
                    thread.enter();
                    if core.generation() == generation {
                        page.touch();
                    }
                    thread.leave();
                })
            };
            let drained = sparse.seal(0..1);
            core.work_until(&mut core.worker(), &drained);
            page.poison();
            user.join().unwrap();
        },
    );
}
