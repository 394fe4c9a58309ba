// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way out of a device that is isolated, or about to be: one future that sees it through to the end.

use std::any::Any;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant};

use ebbtide_iothread::oneshot;
use ebbtide_models::seeded;

use crate::model::Holder;
use crate::subtree::{
    Bus, Detached, Drain, Drained, Gone, GuestNotice, Identity, Isolated, Subtree,
};
use crate::tree::{Leaving, NodeId, Phase, Taken, Tree};

/// A future of the control thread.
pub type Pending<T> = Pin<Box<dyn Future<Output = T>>>;

/// What a removal needs of the machine around it.
pub trait Surroundings<T> {
    /// Forgets devices on the buses.
    type Bus: Bus;

    /// The devices.
    fn tree(&self) -> &RefCell<Tree<T>>;
    /// The time.
    fn now(&self) -> Instant;
    /// Resolves after `duration`.
    fn sleep(&self, duration: Duration) -> Pending<()>;
    /// How long a drain may take until it is reported, and how long it may go on after it was forced until the devices
    /// are [`Phase::Quarantined`].
    fn patience(&self) -> Duration;
    /// The buses.
    fn bus(&self) -> Self::Bus;
    /// Resolves when this removal may change them: where that takes a while, one does it after the other, and what else
    /// there is to do comes in between. What it resolves to is kept meanwhile.
    fn turn(&self) -> Pending<Box<dyn Any>> {
        Box::pin(std::future::ready(Box::new(()) as Box<dyn Any>))
    }
    /// A drain takes long: who keeps which device. Called every [`patience`](Self::patience).
    fn stalled(&self, top: &Identity, age: Duration, undrained: &[(Identity, Vec<Holder>)]);
    /// The slot of `top` is empty: tell the guest.
    fn tell_guest(&self, top: NodeId, notice: GuestNotice);
    /// Drops the devices where blocking is allowed.
    fn destroy(&self, subtree: Subtree<Detached>) -> Pending<Vec<Gone>>;
    /// A device is no more, and its id is free. Children come before what they were below of.
    fn deleted(&self, gone: Gone, info: T);
}

/// Removes `top` and everything below it: isolates what is not isolated yet, drains, detaches, tells the guest,
/// destroys, tells management. False at once when there is nothing to do: another removal has it.
pub async fn remove<T, S: Surroundings<T>>(around: &S, top: NodeId) -> bool {
    let taken = around.tree().borrow_mut().take(top, around.now());
    let Some(taken) = taken else {
        return false;
    };
    let Taken {
        subtree,
        nodes,
        leaving,
        force,
    } = taken;
    let drained = drain(around, subtree.isolate(), &nodes, force).await;
    // Those below that were on their way before are not in this sub-tree, but they are below it.
    let mut below = Vec::new();
    for Leaving { detached, gone } in leaving {
        if !seeded!("detach_before_those_below") {
            detached.await;
        }
        below.push(gone);
    }
    let turn = around.turn().await;
    let (subtree, notice) = drained.detach(&mut around.bus());
    let note = |phase| {
        let mut tree = around.tree().borrow_mut();
        tree.note_phase(&nodes, phase, around.now());
    };
    note(Phase::Detached);
    around.tell_guest(top, notice);
    drop(turn);
    let destroyed = around.destroy(subtree).await;
    for gone in below {
        gone.await;
    }
    for gone in destroyed {
        let node = around.tree().borrow_mut().forget(&gone);
        if let Some(node) = node {
            around.deleted(gone, node.info);
        }
    }
    true
}

/// Waits for the drain as long as it takes, reporting; the first force is passed on.
async fn drain<T, S: Surroundings<T>>(
    around: &S,
    subtree: Subtree<Isolated>,
    nodes: &[NodeId],
    mut force: oneshot::Receiver<()>,
) -> Subtree<Drained> {
    let began = around.now();
    let top = subtree.identity().clone();
    let mut drain = subtree.drain();
    let (mut listening, mut forced) = (true, false);
    note_holders(around, drain.undrained());
    loop {
        match wait(around, &mut drain, &mut force, listening).await {
            Waited::Drained(subtree) => return *subtree,
            Waited::Force => {
                listening = false;
                forced = drain.force() || forced;
                if !forced {
                    tracing::warn!("{}: nothing can be forced", top.path);
                }
                note_holders(around, drain.undrained());
            }
            Waited::Unforced => listening = false,
            Waited::Long => {
                let undrained = drain.undrained();
                let age = around.now().saturating_duration_since(began);
                around.stalled(&top, age, &undrained);
                note_holders(around, undrained);
                if forced {
                    let mut tree = around.tree().borrow_mut();
                    tree.note_phase(nodes, Phase::Quarantined, around.now());
                }
            }
        }
    }
}

/// What keeps the devices, for whoever asks: they are not in the tree while they drain.
fn note_holders<T, S: Surroundings<T>>(around: &S, undrained: Vec<(Identity, Vec<Holder>)>) {
    let mut tree = around.tree().borrow_mut();
    for (identity, holders) in undrained {
        tree.note_holders(&identity, holders);
    }
}

enum Waited {
    Drained(Box<Subtree<Drained>>),
    Force,
    /// Nobody can ask for force any more.
    Unforced,
    Long,
}

async fn wait<T, S: Surroundings<T>>(
    around: &S,
    drain: &mut Drain,
    force: &mut oneshot::Receiver<()>,
    listening: bool,
) -> Waited {
    let mut sleep = around.sleep(around.patience());
    let mut drain = pin!(drain);
    poll_fn(|cx| {
        if let Poll::Ready(subtree) = drain.as_mut().poll(cx) {
            return Poll::Ready(Waited::Drained(Box::new(subtree)));
        }
        if listening && let Poll::Ready(asked) = Pin::new(&mut *force).poll(cx) {
            return Poll::Ready(asked.map_or(Waited::Unforced, |()| Waited::Force));
        }
        sleep.as_mut().poll(cx).map(|()| Waited::Long)
    })
    .await
}
