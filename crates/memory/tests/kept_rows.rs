// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a thread keeps of a memory that it only knows by views, and when it must not.
#![cfg(not(loom))]

mod setup;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use ebbtide_memory::{DmaSpace, DmaView, Phase, Region, Ticket};
use setup::Map;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

/// Hubs and rows serve one memory after the other: in a process in which others come and go, it is
/// chance which.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

const DIMM: u64 = 1 << 30;

fn with_dimm() -> (Map, Arc<Region>) {
    let map = Map::new();
    let dimm = map.ram("dimm", 1 << 20);
    map.add(&dimm, DIMM);
    (map, dimm)
}

/// Looks the DIMM up, which pins it.
fn touch(view: &DmaView) {
    let mut slices = view
        .get_slices(GuestAddress(DIMM), 64, Permissions::Write)
        .unwrap();
    assert_eq!(slices.next().unwrap().unwrap().len(), 64);
}

fn unplug(map: &Map, dimm: &Arc<Region>) -> Ticket {
    let ticket = map.change(|t| t.unplug(dimm));
    // Grace periods are over in order.
    map.memory.synchronize();
    ticket
}

fn named<T: Send + 'static>(name: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(f);
    thread.unwrap().join().unwrap()
}

#[test]
fn a_pin_is_counted_where_it_was_taken_after_the_thread_has_ended() {
    let _alone = alone();
    let (map, dimm) = with_dimm();
    let space = DmaSpace::new(&map.space, None);
    let view = named("first", move || {
        let view = space.memory();
        touch(&view);
        touch(&view);
        view
    });
    // Goes on with the row of the thread that has ended.
    let other = DmaSpace::new(&map.space, None);
    named("second", move || touch(&other.memory()));
    let ticket = unplug(&map, &dimm);
    assert_eq!(ticket.phase(), Phase::Draining);
    assert_eq!(ticket.holders()[0].count, 1, "{:?}", ticket.holders());
    drop(view);
    map.end(ticket);
}

#[test]
fn a_view_holds_what_each_of_its_threads_has_looked_up() {
    let _alone = alone();
    let (map, dimm) = with_dimm();
    let view = Arc::new(DmaView::new(&map.space, None));
    touch(&view);
    let (shared, again) = (Arc::clone(&view), DmaSpace::new(&map.space, None).memory());
    named("other", move || touch(&shared));
    touch(&again);
    let clone = again.clone();
    let ticket = unplug(&map, &dimm);
    let count = |ticket: &Ticket| ticket.holders().iter().map(|h| h.count).sum::<u64>();
    assert_eq!(count(&ticket), 3, "{:?}", ticket.holders());
    // The clone holds nothing.
    drop(again);
    assert_eq!(count(&ticket), 2);
    drop(clone);
    assert_eq!(count(&ticket), 2);
    drop(view);
    map.end(ticket);
}

/// The next memory has the hub of the last one, and its first thread the row that this thread
/// has kept from then.
#[test]
fn a_row_kept_from_a_memory_that_is_gone_is_not_used() {
    let _alone = alone();
    for _ in 0..3 {
        named("old hand", || {
            let (gone, _) = with_dimm();
            touch(&DmaSpace::new(&gone.space, None).memory());
            drop(gone);
            let (map, dimm) = with_dimm();
            let ((ready, is_ready), (end, may_end)) = (channel(), channel::<()>());
            let theirs = DmaSpace::new(&map.space, None);
            let newcomer = thread::Builder::new()
                .name("newcomer".into())
                .spawn(move || {
                    let view = theirs.memory();
                    touch(&view);
                    ready.send(()).unwrap();
                    may_end.recv().unwrap_err();
                });
            is_ready.recv().unwrap();
            let view = DmaSpace::new(&map.space, None).memory();
            touch(&view);
            let ticket = unplug(&map, &dimm);
            let mut holders: Vec<_> = ticket.holders().iter().map(|h| h.what.clone()).collect();
            holders.sort();
            assert_eq!(holders, ["pins of newcomer", "pins of old hand"]);
            drop((view, end));
            newcomer.unwrap().join().unwrap();
            map.end(ticket);
        });
    }
}

/// A thread that has both ends in whatever order.
#[test]
fn a_reader_and_a_kept_row_are_one() {
    let _alone = alone();
    let (map, dimm) = with_dimm();
    let (memory, space) = (Arc::clone(&map.memory), Arc::clone(&map.space));
    named("both", move || {
        touch(&DmaSpace::new(&space, None).memory());
        let reader = memory.register();
        let guard = space.read(&reader);
        touch(&DmaSpace::new(&space, None).memory());
        assert!(reader.in_section());
        drop(guard);
        drop(reader);
        touch(&DmaSpace::new(&space, None).memory());
    });
    let ticket = unplug(&map, &dimm);
    map.end(ticket);
}
