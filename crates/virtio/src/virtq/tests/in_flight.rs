// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chains between pop and push.

use super::*;
use crate::virtq::heads::Heads;

#[test]
fn more_chains_than_the_queue_has_are_refused() {
    let mut rings = Rings::new(0);
    (0..SIZE).for_each(|index| rings.direct(index, 0x8000, 1, 0, 0));
    rings.make_available(&[0, 1, 2, 3, 4, 5, 6, 7], SIZE);
    for head in 0..SIZE {
        assert_eq!(rings.pop().unwrap().unwrap().head, head);
    }
    // None was given back, and the driver goes on.
    rings.make_available(&[0], SIZE + 1);
    assert!(matches!(
        rings.error(),
        QueueError::TooManyInFlight { size: SIZE }
    ));
}

#[test]
fn only_chains_that_were_taken_can_be_given_back() {
    for wrong in [0, 1, SIZE - 1, SIZE, 0xffff] {
        let mut rings = Rings::new(0);
        rings.direct(0, 0x8000, 1, 0, 0);
        rings.direct(2, 0x8000, 1, 0, 0);
        rings.make_available(&[0, 2], 2);
        (0..2).for_each(|_| assert!(rings.pop().unwrap().is_some()));
        let guard = rings.space.read(&rings.reader);
        rings.queue.push_used(&guard, 0, 0).unwrap();
        assert!(
            matches!(
                rings.queue.push_used(&guard, wrong, 0),
                Err(QueueError::NotInFlight { head, in_flight: 1, .. }) if head == wrong
            ),
            "{wrong}"
        );
        drop(guard);
        assert_eq!(rings.get_u16(CONFIG.used.0 + 2), 1, "{wrong}");
    }
}

/// A chain is the device's until it is given back, in whatever order that is.
#[test]
fn a_chain_that_is_in_flight_cannot_be_made_available_again() {
    let mut rings = Rings::new(0);
    (0..3).for_each(|index| rings.direct(index, 0x8000, 1, 0, 0));
    rings.make_available(&[0, 1, 2], 3);
    (0..3).for_each(|_| assert!(rings.pop().unwrap().is_some()));
    for (head, available) in [(1, 4), (0, 5)] {
        rings.make_available(&[0, 1, 2, 1, 0], available);
        let guard = rings.space.read(&rings.reader);
        rings.queue.push_used(&guard, head, 0).unwrap();
        assert_eq!(rings.queue.pop(&guard).unwrap().unwrap().head, head);
    }
    rings.make_available(&[0, 1, 2, 1, 0, 2], 6);
    assert!(matches!(
        rings.error(),
        QueueError::HeadInFlight { head: 2 }
    ));
    assert_eq!(rings.get_u16(CONFIG.used.0 + 2), 2);
}

#[test]
fn every_head_of_a_large_queue_is_told_apart() {
    let mut heads = Heads::new(MAX_SIZE, 0);
    for head in (0..MAX_SIZE).rev() {
        assert!(heads.insert(head), "{head}");
    }
    for head in 0..MAX_SIZE {
        assert!(!heads.insert(head), "{head}");
        assert!(heads.remove(head) && !heads.remove(head), "{head}");
        assert!(heads.insert(head), "{head}");
    }
    assert!(!heads.insert(MAX_SIZE) && !heads.remove(MAX_SIZE));
}

#[test]
fn a_restored_queue_gets_back_as_many_chains_as_were_in_flight() {
    let mut rings = Rings::new(0);
    (0..4).for_each(|index| rings.direct(index, 0x8000, 1, 0, 0));
    rings.make_available(&[0, 1, 2, 3], 3);
    (0..3).for_each(|_| assert!(rings.pop().unwrap().is_some()));
    let state = rings.queue.save();
    rings.queue = Queue::restore(&rings.space, &state).unwrap();
    rings.make_available(&[0, 1, 2, 3], 4);
    let guard = rings.space.read(&rings.reader);
    assert_eq!(rings.queue.pop(&guard).unwrap().unwrap().head, 3);
    for head in [2, 3, 0, 1] {
        rings.queue.push_used(&guard, head, 0).unwrap();
    }
    assert_eq!(rings.queue.in_flight(), 0);
    assert!(matches!(
        rings.queue.push_used(&guard, 1, 0),
        Err(QueueError::NotInFlight { in_flight: 0, .. })
    ));
}

#[test]
fn used_entries_show_when_they_are_published() {
    let mut rings = Rings::new(0);
    (0..3).for_each(|index| rings.direct(index, 0x8000, 1, 0, 0));
    rings.make_available(&[0, 1, 2], 3);
    (0..3).for_each(|_| assert!(rings.pop().unwrap().is_some()));
    let guard = rings.space.read(&rings.reader);
    for (head, written) in [(2, 11), (0, 12), (1, 13)] {
        rings.queue.add_used(&guard, head, written).unwrap();
    }
    assert_eq!(rings.get_u16(CONFIG.used.0 + 2), 0);
    assert!(
        !rings.queue.needs_interrupt(&guard).unwrap(),
        "nothing to see yet"
    );
    assert_eq!(
        rings.queue.save().next_used,
        0,
        "saved is what the driver can see"
    );
    rings.queue.publish_used(&guard).unwrap();
    assert_eq!(rings.get_u16(CONFIG.used.0 + 2), 3);
    assert!(rings.queue.needs_interrupt(&guard).unwrap());
    assert!(!rings.queue.needs_interrupt(&guard).unwrap(), "once");
}
