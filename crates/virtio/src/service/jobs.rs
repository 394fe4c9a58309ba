// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The jobs of a queue that are under way: futures in places that are used again, so that a job costs no allocation, no
//! task of its own and, if it is done at once, no wake-up.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Futures of one kind, polled by one task.
pub(super) struct Jobs<F: Future> {
    places: Vec<Place<F>>,
    free: Vec<usize>,
    shared: Arc<Shared>,
    /// The places that are being polled; empty in between.
    due: Vec<usize>,
}

struct Place<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// What wakers, on whatever thread, tell the task.
#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    /// Places that were woken, each once.
    woken: Vec<usize>,
    /// For each place whether it is among them.
    is_woken: Vec<bool>,
    /// The task, if it waits.
    task: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct JobWaker {
    place: usize,
    shared: Arc<Shared>,
}

impl Wake for JobWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = self.shared.lock();
        match state.is_woken.get_mut(self.place) {
            Some(woken) if !*woken => *woken = true,
            _ => return,
        }
        state.woken.push(self.place);
        let task = state.task.take();
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl<F: Future> Jobs<F> {
    pub(super) fn new() -> Jobs<F> {
        Jobs {
            places: Vec::new(),
            free: Vec::new(),
            shared: Arc::default(),
            due: Vec::new(),
        }
    }

    /// How many are under way.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Begins a job: polls it now. Its result if that was all.
    pub(super) fn start(&mut self, future: F) -> Option<F::Output> {
        let at = self.free.pop().unwrap_or_else(|| self.add_place());
        if let Some(place) = self.places.get_mut(at) {
            place.future.set(Some(future));
        }
        self.poll(at)
    }

    /// Polls those that were woken, once each, and passes on the results. `task` is woken when this is worth calling again.
    pub(super) fn poll_woken(&mut self, task: Option<&Waker>, mut done: impl FnMut(F::Output)) {
        let mut due = std::mem::take(&mut self.due);
        {
            let mut state = self.shared.lock();
            std::mem::swap(&mut state.woken, &mut due);
            for &at in &due {
                // Before it is polled: a wake-up from now on is for the next time.
                if let Some(woken) = state.is_woken.get_mut(at) {
                    *woken = false;
                }
            }
        }
        for at in due.drain(..) {
            if let Some(output) = self.poll(at) {
                done(output);
            }
        }
        self.due = due;
        if let Some(task) = task {
            self.wait(task);
        }
    }

    fn wait(&self, task: &Waker) {
        let mut state = self.shared.lock();
        let again = !state.woken.is_empty();
        let noted = state
            .task
            .as_ref()
            .is_some_and(|noted| noted.will_wake(task));
        let replaced = (!again && !noted).then(|| state.task.replace(task.clone()));
        drop(state);
        drop(replaced);
        if again {
            task.wake_by_ref();
        }
    }

    /// The result of the job at `at`, which is then over. A place may be woken that has none any more, or another one.
    fn poll(&mut self, at: usize) -> Option<F::Output> {
        let place = self.places.get_mut(at)?;
        let future = place.future.as_mut().as_pin_mut()?;
        let Poll::Ready(output) = future.poll(&mut Context::from_waker(&place.waker)) else {
            return None;
        };
        place.future.set(None);
        self.free.push(at);
        Some(output)
    }

    fn add_place(&mut self) -> usize {
        let at = self.places.len();
        self.shared.lock().is_woken.push(false);
        let waker = JobWaker {
            place: at,
            shared: Arc::clone(&self.shared),
        };
        self.places.push(Place {
            future: Box::pin(None),
            waker: Waker::from(Arc::new(waker)),
        });
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A job that ends when `left` is 0, and where its waker is found.
    type Remote = (Rc<Cell<u32>>, Rc<Cell<Option<Waker>>>);

    fn job(number: u32, (left, waker): Remote) -> impl Future<Output = u32> {
        poll_fn(move |cx| {
            if left.get() == 0 {
                return Poll::Ready(number);
            }
            left.set(left.get() - 1);
            waker.set(Some(cx.waker().clone()));
            Poll::Pending
        })
    }

    fn remote(polls: u32) -> Remote {
        (Rc::new(Cell::new(polls)), Rc::default())
    }

    #[test]
    fn what_is_done_at_once_takes_no_wake_up() {
        let mut jobs = Jobs::new();
        for number in 0..3 {
            assert_eq!(jobs.start(job(number, remote(0))), Some(number));
        }
        assert_eq!((jobs.len(), jobs.places.len()), (0, 1));
    }

    #[test]
    fn those_that_are_woken_are_polled_and_their_places_used_again() {
        let (count, mut jobs) = (Arc::new(Count::default()), Jobs::new());
        let task = Waker::from(Arc::clone(&count));
        let remotes = [remote(1), remote(2), remote(1)];
        for (number, remote) in (0..).zip(&remotes) {
            assert_eq!(jobs.start(job(number, remote.clone())), None);
        }
        let woken = |jobs: &mut Jobs<_>| {
            let mut done = Vec::new();
            jobs.poll_woken(Some(&task), |number| done.push(number));
            done
        };
        assert!(woken(&mut jobs).is_empty());
        let wake = |at: usize| remotes[at].1.take().unwrap().wake();
        let again = remotes[2].1.take().unwrap();
        again.wake_by_ref();
        again.wake_by_ref();
        wake(1);
        assert_eq!(count.0.load(Ordering::SeqCst), 1, "one wake-up for both");
        assert_eq!(woken(&mut jobs), [2]);
        assert_eq!(jobs.len(), 2);
        // A waker of a job that is over.
        again.wake();
        assert!(woken(&mut jobs).is_empty());
        wake(1);
        assert_eq!(woken(&mut jobs), [1]);
        assert_eq!(jobs.start(job(7, remote(1))), None);
        assert_eq!((jobs.len(), jobs.places.len()), (2, 3));
    }

    #[test]
    fn a_job_that_wakes_itself_is_polled_again_and_holds_up_nothing() {
        let (count, mut jobs) = (Arc::new(Count::default()), Jobs::new());
        let task = Waker::from(Arc::clone(&count));
        let mut left = 3;
        let eager = poll_fn(move |cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert!(jobs.start(eager).is_none());
        for turn in 1..=2 {
            jobs.poll_woken(Some(&task), |()| panic!("too early"));
            assert_eq!(count.0.load(Ordering::SeqCst), turn);
        }
        let mut done = 0;
        jobs.poll_woken(Some(&task), |()| done += 1);
        assert_eq!((done, jobs.len()), (1, 0));
    }
}
