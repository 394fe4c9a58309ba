// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of operations in flight: what the kernel may still touch, and who waits for it.
//!
//! ```text
//!             CQE                poll
//!   Awaited ───────► Done(res) ───────► free
//!      │ future dropped   │ future dropped
//!      ▼                  └───────────► free
//!   Abandoned ──CQE──► free
//! ```
//!
//! A standing operation has many CQEs: it stays `Standing` to its last one, which makes it `Done`.
//!
//! An operation's `keep` leaves the table only with its last CQE, or before the kernel has seen the operation.

use std::any::Any;
use std::task::Waker;

/// What the kernel may still use.
pub(crate) type Keep = Box<dyn Any>;

/// Names one operation: the slot's generation makes a late CQE for an earlier one harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

/// The `user_data` of what nobody waits for: cancel requests, withdrawn entries.
pub(crate) const NOBODY: u64 = u64::MAX;

impl Phase {
    /// Whether the kernel may still use the operation's memory. Of a time-out it takes a copy when it sees it.
    fn is_pending(&self) -> bool {
        !matches!(self, Phase::Done(_) | Phase::Alarm)
    }
}

impl Key {
    pub fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub fn from_user_data(user_data: u64) -> Key {
        Key {
            index: user_data as u32,
            generation: (user_data >> 32) as u32,
        }
    }
}

/// Who an operation belongs to.
#[derive(Debug)]
pub(crate) enum Phase {
    /// A future that is to be woken (none until it was polled).
    Awaited(Option<Waker>),
    /// A stream, which is to be woken for each CQE; whether there was one since it last looked.
    Standing { waker: Option<Waker>, news: bool },
    /// Nobody any more.
    Abandoned,
    /// The ring: its read of the wake-up eventfd.
    Bell,
    /// The ring: a time-out, where the wait itself can have none.
    Alarm,
    /// Its future, which has not fetched the result yet. The kernel is through with it.
    Done(i32),
}

pub(crate) struct InFlight {
    pub keep: Keep,
    pub phase: Phase,
    /// Its number in the order of staging: tells whether the kernel has seen it.
    pub staged: u64,
    /// The result of a CQE that announced another one.
    first_result: Option<i32>,
}

struct Slot {
    generation: u32,
    operation: Option<InFlight>,
}

/// What a CQE means for its operation.
pub(crate) enum Completion {
    /// Its future has it now; wake it.
    Wake(Option<Waker>),
    /// Nobody waited: the memory is free.
    Free(Keep),
    /// The eventfd was read: read it again.
    Bell(Keep),
    /// A time-out passed.
    Alarm(Keep),
    /// More CQEs will come.
    NotYet,
    /// No such operation (a cancel request's own answer).
    Unknown,
}

#[derive(Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Operations the kernel is not through with.
    in_flight: usize,
}

impl Slots {
    pub fn insert(&mut self, keep: Keep, phase: Phase, staged: u64) -> Key {
        self.in_flight += usize::from(phase.is_pending());
        let operation = Some(InFlight {
            keep,
            phase,
            staged,
            first_result: None,
        });
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.operation = operation;
            return Key {
                index,
                generation: slot.generation,
            };
        }
        let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 operations");
        self.slots.push(Slot {
            generation: 0,
            operation,
        });
        Key {
            index,
            generation: 0,
        }
    }

    pub fn get_mut(&mut self, key: Key) -> Option<&mut InFlight> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        slot.operation.as_mut()
    }

    /// Frees a slot. For an operation that the kernel may know of, only when it is through with it.
    pub fn remove(&mut self, key: Key) -> Option<InFlight> {
        self.get_mut(key)?;
        let slot = &mut self.slots[key.index as usize];
        let operation = slot.operation.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(key.index);
        self.in_flight -= usize::from(operation.phase.is_pending());
        Some(operation)
    }

    /// Operations the kernel may still be working on.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The keys of those.
    pub fn keys_in_flight(&self) -> impl Iterator<Item = Key> {
        self.slots.iter().zip(0..).filter_map(|(slot, index)| {
            let operation = slot.operation.as_ref()?;
            let key = Key {
                index,
                generation: slot.generation,
            };
            operation.phase.is_pending().then_some(key)
        })
    }

    /// Books one CQE.
    pub fn complete(&mut self, user_data: u64, result: i32, more: bool) -> Completion {
        let key = Key::from_user_data(user_data);
        let Some(operation) = self.get_mut(key) else {
            return Completion::Unknown;
        };
        match &mut operation.phase {
            Phase::Standing { waker, news } if more => {
                *news = true;
                return Completion::Wake(waker.take());
            }
            _ if more => {
                operation.first_result.get_or_insert(result);
                return Completion::NotYet;
            }
            Phase::Awaited(waker) | Phase::Standing { waker, .. } => {
                let waker = waker.take();
                operation.phase = Phase::Done(operation.first_result.unwrap_or(result));
                self.in_flight -= 1;
                return Completion::Wake(waker);
            }
            _ => {}
        }
        match self.remove(key) {
            Some(InFlight {
                phase: Phase::Bell,
                keep,
                ..
            }) => Completion::Bell(keep),
            Some(InFlight {
                phase: Phase::Alarm,
                keep,
                ..
            }) => Completion::Alarm(keep),
            Some(InFlight { keep, .. }) => Completion::Free(keep),
            None => Completion::Unknown,
        }
    }

    /// Gives up on everything in flight: its memory is never freed. Returns how many that were.
    pub fn leak_in_flight(&mut self) -> usize {
        let keys: Vec<Key> = self.keys_in_flight().collect();
        for &key in &keys {
            if let Some(operation) = self.get_mut(key) {
                let keep = std::mem::replace(&mut operation.keep, Box::new(()));
                // On purpose: the kernel may write there at any time.
                std::mem::forget(keep);
            }
        }
        keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn a_late_completion_does_not_reach_the_next_operation_of_its_slot() {
        let mut slots = Slots::default();
        let first = slots.insert(Box::new(1), Phase::Abandoned, 0);
        assert!(matches!(
            slots.complete(first.user_data(), 0, false),
            Completion::Free(_)
        ));
        let second = slots.insert(Box::new(2), Phase::Awaited(None), 1);
        assert_ne!(first, second);
        assert!(matches!(
            slots.complete(first.user_data(), 7, false),
            Completion::Unknown
        ));
        assert_eq!(slots.in_flight(), 1);
        assert!(matches!(
            slots.complete(second.user_data(), 9, false),
            Completion::Wake(None)
        ));
        assert!(matches!(
            slots.remove(second),
            Some(InFlight {
                phase: Phase::Done(9),
                ..
            })
        ));
        assert_eq!(slots.in_flight(), 0);
        assert!(matches!(
            slots.complete(NOBODY, 0, false),
            Completion::Unknown
        ));
    }

    #[test]
    fn memory_is_kept_until_the_last_of_several_completions() {
        let mut slots = Slots::default();
        let keep = Rc::new(());
        let key = slots.insert(Box::new(Rc::clone(&keep)), Phase::Awaited(None), 0);
        assert!(matches!(
            slots.complete(key.user_data(), 42, true),
            Completion::NotYet
        ));
        assert_eq!(slots.in_flight(), 1);
        assert!(matches!(
            slots.complete(key.user_data(), 0, false),
            Completion::Wake(None)
        ));
        assert!(matches!(slots.get_mut(key).unwrap().phase, Phase::Done(42)));
        drop(slots.remove(key));
        assert_eq!(Rc::strong_count(&keep), 1);
    }

    #[test]
    fn a_standing_operation_wakes_for_each_completion_and_keeps_its_memory_to_the_last() {
        let mut slots = Slots::default();
        let keep = Rc::new(());
        let standing = Phase::Standing {
            waker: None,
            news: false,
        };
        let key = slots.insert(Box::new(Rc::clone(&keep)), standing, 0);
        for _ in 0..2 {
            assert!(matches!(
                slots.complete(key.user_data(), 1, true),
                Completion::Wake(None)
            ));
            let phase = &slots.get_mut(key).unwrap().phase;
            assert!(matches!(phase, Phase::Standing { news: true, .. }));
            assert_eq!(slots.in_flight(), 1);
        }
        assert!(matches!(
            slots.complete(key.user_data(), -9, false),
            Completion::Wake(None)
        ));
        assert!(matches!(slots.get_mut(key).unwrap().phase, Phase::Done(-9)));
        assert_eq!((slots.in_flight(), Rc::strong_count(&keep)), (0, 2));
        drop(slots.remove(key));
        assert_eq!(Rc::strong_count(&keep), 1);
    }

    #[test]
    fn what_never_answers_is_leaked_and_the_rest_is_not() {
        let mut slots = Slots::default();
        let (lost, done) = (Rc::new(()), Rc::new(()));
        slots.insert(Box::new(Rc::clone(&lost)), Phase::Abandoned, 0);
        let key = slots.insert(Box::new(Rc::clone(&done)), Phase::Awaited(None), 1);
        assert!(matches!(
            slots.complete(key.user_data(), 0, false),
            Completion::Wake(None)
        ));
        assert_eq!(slots.leak_in_flight(), 1);
        drop(slots);
        assert_eq!((Rc::strong_count(&lost), Rc::strong_count(&done)), (2, 1));
    }
}
