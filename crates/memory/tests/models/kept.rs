// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rows that threads keep of memories which they only know by views (`DmaView`): until the thread
//! ends, or the memory does.

use std::sync::Arc;

use ebbtide_memory::modelled::{Core, Home, Keepsakes, ViewPointer, play};
use loom::thread;

use super::{Page, View, explore, look, take, unplug};

/// As a `DmaView` does: by the row that the thread keeps, or by one it registers for.
fn with_row<T>(kept: &Keepsakes, core: &Core, f: impl FnOnce(&Home) -> T) -> T {
    match kept.row(core) {
        Some(home) => f(&home),
        None => f(&core.register()),
    }
}

#[test]
fn model_kept_end() {
    explore(
        "memory/kept-end",
        "a row that an ended thread has kept is another's, and the pins from it are counted on",
        3,
        || {
            let core = Core::default();
            let slot = core.slot();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let ending = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || {
                    let kept = Keepsakes::default();
                    let pinned = with_row(&kept, &core, |home| take(home, &view, slot));
                    kept.end();
                    if let Some((pin, page)) = pinned {
                        page.touch();
                        drop(pin);
                    }
                    // What goes after the keepsakes may look, too.
                    with_row(&kept, &core, |home| look(home, &view));
                })
            };
            let other = {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || {
                    let kept = Keepsakes::default();
                    with_row(&kept, &core, |home| look(home, &view));
                    kept.end();
                })
            };
            unplug(&core, &view, slot);
            ending.join().unwrap();
            other.join().unwrap();
        },
    );
}

#[test]
fn model_kept_gone() {
    explore(
        "memory/kept-gone",
        "a row is given up once, by the thread that ends or by the memory that goes",
        4,
        || {
            let core = Core::default();
            let kept = Keepsakes::default();
            play(1);
            assert!(kept.row(&core).is_some());
            let ending = thread::spawn(move || kept.end());
            core.next_memory();
            play(2);
            let next = Keepsakes::default();
            let home = next.row(&core).unwrap();
            ending.join().unwrap();
            assert!(home.is_own(), "its row is free for another thread");
            next.end();
        },
    );
}

#[test]
fn model_kept_next() {
    explore(
        "memory/kept-next",
        "a row kept from a memory that is gone is not used for the next one",
        3,
        || {
            let core = Core::default();
            let threads = [1, 2].map(|number| (number, Keepsakes::default()));
            // Each keeps a row of the first memory, which is then nobody's or the other's.
            for (number, kept) in &threads {
                play(*number);
                assert!(kept.row(&core).is_some_and(|home| home.is_own()));
            }
            core.next_memory();
            let slot = core.slot();
            let view = Arc::new(ViewPointer::<View>::new(Some(Page::new())));
            let threads = threads.map(|(number, kept)| {
                let (core, view) = (core.clone(), Arc::clone(&view));
                thread::spawn(move || {
                    play(number);
                    with_row(&kept, &core, |home| look(home, &view));
                    kept.end();
                })
            });
            unplug(&core, &view, slot);
            threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
        },
    );
}
