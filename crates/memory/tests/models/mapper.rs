// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! External mappers that hold memory until they acknowledge its removal, views that are retired
//! one after another, and those who change the map one after another.

use std::sync::Arc;

use ebbtide_memory::modelled::{Core, MapLock, ViewPointer};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use super::{Page, View, explore, look, take};

#[test]
fn model_hold() {
    explore(
        "memory/hold",
        "memory is given back once its mappers have acknowledged its removal, and not before",
        3,
        || {
            let core = Core::default();
            let slot = core.slot();
            let mapped = core.mapped();
            let page = Page::new();
            let view = Arc::new(ViewPointer::<View>::new(Some(Arc::clone(&page))));
            // Two sections show the block; the backend acknowledges them one by one.
            let holds = [mapped.hold(), mapped.hold()];
            let backend = thread::spawn(move || {
                for hold in holds {
                    page.touch();
                    drop(hold);
                }
            });
            // A device had a pin besides.
            let reader = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || {
                    let thread = core.register();
                    if let Some((pin, page)) = take(&thread, &view, slot) {
                        page.touch();
                        drop(pin);
                    }
                })
            };
            let old = view.replace(None);
            let drained = core.unplug_mapped(slot, &mapped);
            core.work_until(&mut core.worker(), &drained);
            old.iter().for_each(|page| page.poison());
            backend.join().unwrap();
            reader.join().unwrap();
        },
    );
}

#[test]
fn model_view_retire() {
    explore(
        "memory/view-retire",
        "a view that is replaced while a grace period runs waits for the next",
        3,
        || {
            let core = Core::default();
            let first = Page::new();
            let view = Arc::new(ViewPointer::<View>::new(Some(Arc::clone(&first))));
            // Holds up the first grace period, which has begun when the second view goes.
            let own = core.register();
            own.enter();
            let reader = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || look(&core.register(), &view))
            };
            let mut worker = core.worker();
            let freed = Arc::new(AtomicU64::new(0));
            for next in [Some(Page::new()), None] {
                let (old, done) = (view.replace(next), Arc::clone(&freed));
                core.published(move || {
                    old.iter().for_each(|page| page.poison());
                    done.fetch_add(1, Ordering::Relaxed);
                });
                core.work_once(&mut worker);
            }
            first.touch();
            own.leave();
            core.work_while(&mut worker, || freed.load(Ordering::Relaxed) < 2);
            reader.join().unwrap();
        },
    );
}

#[test]
fn model_view_reclaim() {
    explore(
        "memory/view-reclaim",
        "a view that its writer has back was seen by nobody, and one that it has not is the worker's",
        3,
        || {
            let core = Core::default();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let reader = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || look(&core.register(), &view))
            };
            let freed = Arc::new(AtomicU64::new(0));
            let writer = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                let done = Arc::clone(&freed);
                thread::spawn(move || {
                    let (old, telling) = (view.replace(None), core.clone());
                    core.published(move || {
                        old.iter().for_each(|page| page.poison());
                        done.fetch_add(1, Ordering::Relaxed);
                        telling.tell();
                    });
                    core.reclaim();
                })
            };
            core.work_while(&mut core.worker(), || freed.load(Ordering::Relaxed) == 0);
            writer.join().unwrap();
            reader.join().unwrap();
        },
    );
}

/// The map, as those who change it see it.
struct Map(UnsafeCell<u32>);

// SAFETY: loom checks that two threads never use it without order between them.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn change(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|changes| unsafe { *changes += 1 });
    }
}

#[test]
fn model_turns() {
    explore(
        "memory/turns",
        "whoever waits to change the map gets its turn, alone",
        3,
        || {
            let shared = Arc::new((MapLock::default(), Map(UnsafeCell::new(0))));
            let writers: Vec<_> = (0..2)
                .map(|_| {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || {
                        let _turn = shared.0.take();
                        shared.1.change();
                    })
                })
                .collect();
            let turn = shared.0.take();
            shared.1.change();
            assert!(shared.0.try_take().is_none());
            drop(turn);
            if let Some(_turn) = shared.0.try_take() {
                shared.1.change();
            }
            writers
                .into_iter()
                .for_each(|writer| writer.join().unwrap());
        },
    );
}
