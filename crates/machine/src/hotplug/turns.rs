// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One after the other, in the order of asking, on the control thread.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use ebbtide_iothread::oneshot;

/// Gives out one [`Turn`] at a time.
#[derive(Default)]
pub(super) struct Turns(Rc<State>);

#[derive(Default)]
struct State {
    taken: Cell<bool>,
    waiting: RefCell<VecDeque<oneshot::Sender<Turn>>>,
}

/// Somebody's turn, until it is dropped.
pub(super) struct Turn(Rc<State>);

impl Turns {
    /// Waits for the turns of all who have asked before.
    pub(super) async fn next(&self) -> Turn {
        if !self.0.taken.replace(true) {
            return Turn(Rc::clone(&self.0));
        }
        let (sender, turn) = oneshot::channel();
        self.0.waiting.borrow_mut().push_back(sender);
        // There is always somebody to hand it on: who has it holds the state.
        turn.await.unwrap_or_else(|| Turn(Rc::clone(&self.0)))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = self.0.waiting.borrow_mut().pop_front();
        let Some(next) = next else {
            self.0.taken.set(false);
            return;
        };
        // Who waits no more gives it back, and so on.
        drop(next.send(Turn(Rc::clone(&self.0))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_come_in_order_one_at_a_time_and_who_gave_up_is_left_out() {
        let came = ebbtide_iothread::run("test", |local| async move {
            let (turns, came) = (Rc::new(Turns::default()), Rc::new(RefCell::new(Vec::new())));
            let tasks: Vec<_> = (0..5)
                .map(|number| {
                    let (turns, came, timer) = (Rc::clone(&turns), Rc::clone(&came), local.clone());
                    local.spawn(async move {
                        let _turn = turns.next().await;
                        came.borrow_mut().push(number);
                        timer.yield_now().await;
                        came.borrow_mut().push(number);
                    })
                })
                .collect();
            local.yield_now().await;
            for (number, task) in tasks.into_iter().enumerate() {
                if number == 2 {
                    task.cancel().await;
                } else {
                    task.await;
                }
            }
            assert!(!turns.0.taken.get());
            came.take()
        });
        assert_eq!(came.unwrap(), [0, 0, 1, 1, 3, 3, 4, 4]);
    }
}
