// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults on order: a disk that is slow, fails, answers in another order or never.
//!
//! [`Faults`] is a shared list of [`Rule`]s for a disk made with [`Disk::with_faults`](crate::Disk::with_faults). An
//! operation takes the first rule that matches it and still has uses left; without one it goes straight through.
//! [`Disk::behind`](crate::Disk::behind) puts faults in front of a disk that others use, and a rule has a spelling
//! (`text.rs`): that is the node `x-ebbtide-fault` of the monitor.

mod text;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use ebbtide_iothread::Local;

use crate::op::{Op, OpKind};

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not done and fails with this errno.
    Fail(i32),
    /// It takes this much longer.
    Delay(Duration),
    /// It takes longer by a random time below this: operations overtake each other. The same times in the same order of
    /// operations.
    Jitter(Duration),
    /// It waits until [`Faults::release`], which may be never.
    Hold,
}

/// On which side of the real operation a delay or hold is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Point {
    /// Memory and image are touched after the wait: what a slow medium does, and what shows late DMA.
    #[default]
    Before,
    /// The same, but the operation is the medium's already: giving the disk up does not take it back, and memory is touched
    /// when the wait is over.
    Begun,
    /// All is done and only the answer waits: the order of releases is the order of answers.
    After,
}

/// Which operations meet which fault.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Only this kind; `None`: every kind.
    pub kind: Option<OpKind>,
    /// So many matching operations go through first.
    pub skip: u64,
    /// So many operations meet the fault after that.
    pub count: u64,
    /// The fault.
    pub fault: Fault,
    /// Where it waits; of no meaning for [`Fault::Fail`].
    pub point: Point,
}

impl Rule {
    /// The fault for every operation from now on.
    pub fn always(fault: Fault) -> Rule {
        Rule {
            kind: None,
            skip: 0,
            count: u64::MAX,
            fault,
            point: Point::Before,
        }
    }

    /// The fault for the next operation only.
    pub fn once(fault: Fault) -> Rule {
        Rule {
            count: 1,
            ..Rule::always(fault)
        }
    }

    /// The same for one kind of operation.
    pub fn only(self, kind: OpKind) -> Rule {
        Rule {
            kind: Some(kind),
            ..self
        }
    }

    /// The same, with the wait at `point`.
    pub fn at(self, point: Point) -> Rule {
        Rule { point, ..self }
    }
}

/// In which order held operations are let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they came.
    Arrival,
    /// The last one first.
    Reverse,
    /// At random, the same way for the same seed.
    Shuffled {
        /// The seed.
        seed: u64,
    },
}

/// The faults of one disk. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    held: VecDeque<Arc<Held>>,
    jitter: Random,
}

#[derive(Debug, Default)]
struct Held {
    state: Mutex<HeldState>,
}

#[derive(Debug, Default)]
struct HeldState {
    released: bool,
    waker: Option<Waker>,
}

impl Faults {
    /// None yet.
    pub fn new() -> Faults {
        Faults::default()
    }

    /// Adds a rule behind those there are.
    pub fn inject(&self, rule: Rule) {
        self.lock().rules.push(rule);
    }

    /// Forgets all rules. What is held stays held.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// How many operations are held now.
    pub fn held(&self) -> usize {
        self.lock().held.len()
    }

    /// Lets all held operations go; returns how many there were.
    pub fn release(&self, order: Order) -> usize {
        let mut held: Vec<_> = self.lock().held.drain(..).collect();
        match order {
            Order::Arrival => {}
            Order::Reverse => held.reverse(),
            Order::Shuffled { seed } => shuffle(&mut held, seed),
        }
        for one in &held {
            one.release();
        }
        held.len()
    }

    /// Lets the one go that has been held longest. False: there is none.
    pub fn release_one(&self) -> bool {
        let one = self.lock().held.pop_front();
        one.inspect(|held| held.release()).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens to this operation; a use of the rule is spent.
    pub(crate) fn meet(&self, op: &Op) -> Option<(Fault, Point)> {
        let mut state = self.lock();
        let kind = op.kind();
        let mut matching = state
            .rules
            .iter_mut()
            .filter(|rule| rule.kind.is_none_or(|k| k == kind) && rule.count > 0);
        let rule = matching.next()?;
        if rule.skip > 0 {
            rule.skip -= 1;
            return None;
        }
        rule.count -= 1;
        // What fails is not done, and does not wait.
        let point = match rule.fault {
            Fault::Fail(_) => Point::Before,
            Fault::Delay(_) | Fault::Jitter(_) | Fault::Hold => rule.point,
        };
        Some((rule.fault, point))
    }

    /// Lives through the fault.
    pub(crate) async fn suffer(&self, local: &Local, fault: Fault) -> io::Result<()> {
        match fault {
            Fault::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
            Fault::Delay(duration) => {
                local.sleep(duration).await;
                Ok(())
            }
            Fault::Jitter(below) => {
                let random = self.lock().jitter.next();
                local.sleep(part_of(below, random)).await;
                Ok(())
            }
            Fault::Hold => {
                self.hold().await;
                Ok(())
            }
        }
    }

    async fn hold(&self) {
        let held = Arc::new(Held::default());
        self.lock().held.push_back(Arc::clone(&held));
        let _forget = Forget {
            faults: self,
            held: &held,
        };
        poll_fn(|cx| {
            let mut state = held.lock();
            if state.released {
                return Poll::Ready(());
            }
            state.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// An operation that is cancelled is not held any more.
struct Forget<'a> {
    faults: &'a Faults,
    held: &'a Arc<Held>,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.faults
            .lock()
            .held
            .retain(|one| !Arc::ptr_eq(one, self.held));
    }
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, HeldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self) {
        let mut state = self.lock();
        state.released = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A splitmix64 generator: no dependency for a test aid.
#[derive(Debug, Default)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// `whole` * `random` / 2^64.
fn part_of(whole: Duration, random: u64) -> Duration {
    let whole_ns = u64::try_from(whole.as_nanos()).unwrap_or(u64::MAX);
    let part = (u128::from(whole_ns) * u128::from(random)) >> 64;
    Duration::from_nanos(u64::try_from(part).unwrap_or(whole_ns))
}

/// Fisher-Yates.
fn shuffle<T>(list: &mut [T], seed: u64) {
    let mut random = Random(seed);
    for last in (1..list.len()).rev() {
        let chosen = (random.next() % (last as u64 + 1)) as usize;
        list.swap(last, chosen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Op = Op::Read { offset: 0 };

    #[test]
    fn rules_are_used_up() {
        let faults = Faults::new();
        let rule = Rule {
            skip: 1,
            count: 2,
            ..Rule::always(Fault::Fail(5)).only(OpKind::Read)
        };
        faults.inject(rule);
        assert_eq!(faults.meet(&Op::Flush), None);
        assert_eq!(faults.meet(&READ), None);
        assert_eq!(faults.meet(&READ), Some((Fault::Fail(5), Point::Before)));
        assert_eq!(faults.meet(&READ), Some((Fault::Fail(5), Point::Before)));
        assert_eq!(faults.meet(&READ), None);
    }

    #[test]
    fn the_first_rule_that_is_left_counts() {
        let faults = Faults::new();
        faults.inject(Rule::once(Fault::Hold).at(Point::After));
        faults.inject(Rule::once(Fault::Fail(28)).at(Point::After));
        assert_eq!(faults.meet(&READ), Some((Fault::Hold, Point::After)));
        assert_eq!(faults.meet(&READ), Some((Fault::Fail(28), Point::Before)));
        faults.inject(Rule::always(Fault::Hold));
        faults.clear();
        assert_eq!(faults.meet(&READ), None);
    }

    #[test]
    fn jitter_stays_below_and_differs() {
        let mut random = Random::default();
        let below = Duration::from_secs(20);
        let times: Vec<_> = (0..100).map(|_| part_of(below, random.next())).collect();
        assert!(times.iter().all(|time| *time < below));
        assert!(times.iter().any(|time| *time > below / 2));
        assert!(times.windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(
            part_of(Duration::MAX, u64::MAX).as_nanos(),
            u128::from(u64::MAX) - 1
        );
    }

    #[test]
    fn shuffling_keeps_all_and_depends_on_the_seed_only() {
        let shuffled = |seed| {
            let mut list: Vec<u32> = (0..64).collect();
            shuffle(&mut list, seed);
            list
        };
        assert_eq!(shuffled(7), shuffled(7));
        assert_ne!(shuffled(7), shuffled(8));
        let mut sorted = shuffled(7);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..64).collect::<Vec<_>>());
    }
}
