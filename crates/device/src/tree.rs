// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices of a machine: who is below whom, which ids are taken, and how far each is on its way out.
//!
//! It belongs to the control thread. A device is in the tree from its plug until it is [`Gone`]: until then its id is
//! taken. While a removal drains, the model itself is in the hands of that removal and only its name is here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use ebbtide_iothread::oneshot;

use crate::eject::Eject;
use crate::model::{Holder, Model};
use crate::subtree::{Gone, Identity, Plugged, Subtree};

/// A device of a tree. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// How far a device is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Working.
    Plugged,
    /// The guest was asked to let go.
    Requested,
    /// The guest says that it is working on that.
    GuestOfflining,
    /// Isolated; what is under way goes on.
    Draining,
    /// Given up: it was forced and does not drain all the same. Its memory is kept for good, or until it drains.
    Quarantined,
    /// The bus has forgotten it; being destroyed.
    Detached,
}

impl Phase {
    /// As the monitor names it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Plugged => "plugged",
            Phase::Requested => "requested",
            Phase::GuestOfflining => "guest-offlining",
            Phase::Draining => "draining",
            Phase::Quarantined => "quarantined",
            Phase::Detached => "detached",
        }
    }
}

/// Why a device could not be plugged. The words are QEMU's, for management matches them.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlugError {
    /// Another device has the id, or had it and is not gone yet.
    #[error("Duplicate device ID '{0}'")]
    IdTaken(String),
    /// The id belongs to a device that is on its way out.
    #[error("Device '{0}' is being removed: its id is free again at its DEVICE_DELETED")]
    IdLeaving(String),
    /// The bus it was to be plugged into is going.
    #[error("Device '{0}', into which it is plugged, is being removed")]
    ParentLeaving(String),
}

/// Why a removal could not begin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RemoveError {
    /// It is isolated already.
    #[error("Device {0} is already in the process of unplug")]
    Leaving(String),
    /// It has no slot that it could be taken out of.
    #[error("Device '{0}' does not support hotplugging")]
    Fixed(String),
}

/// One device.
pub struct Node<T> {
    /// Who it is.
    pub identity: Identity,
    /// What its user keeps with it.
    pub info: T,
    parent: Option<NodeId>,
    /// None while a removal has it.
    model: Option<Box<dyn Model>>,
    eject: Option<Arc<Eject>>,
    phase: Phase,
    /// When it came into each phase so far, the present one last.
    history: Vec<(Phase, Instant)>,
    /// Who keeps it from draining, at the last report.
    holders: Vec<Holder>,
    force: Option<oneshot::Sender<()>>,
    /// Those who wait for it to be detached, and to be gone.
    waiting: Vec<(Option<oneshot::Sender<()>>, oneshot::Sender<()>)>,
}

impl<T> Node<T> {
    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Into which phase it came when.
    pub fn history(&self) -> &[(Phase, Instant)] {
        &self.history
    }

    /// What the guest ejects it with; None: it has no slot of its own.
    pub fn eject(&self) -> Option<&Arc<Eject>> {
        self.eject.as_ref()
    }

    /// What it is plugged into.
    pub fn parent(&self) -> Option<NodeId> {
        self.parent
    }

    /// Who kept it from draining when that was last looked at.
    pub fn holders(&self) -> &[Holder] {
        &self.holders
    }

    /// The device, unless a removal has it.
    pub fn model(&self) -> Option<&dyn Model> {
        self.model.as_deref()
    }

    fn enter(&mut self, phase: Phase, now: Instant) {
        if self.phase != phase {
            self.phase = phase;
            self.history.push((phase, now));
        }
    }

    fn wait(&mut self) -> Leaving {
        let (detached_sender, detached) = oneshot::channel();
        let (gone_sender, gone) = oneshot::channel();
        // One that is detached already has nobody left to tell it: the receiver resolves at once.
        let detached_sender = (self.phase != Phase::Detached).then_some(detached_sender);
        self.waiting.push((detached_sender, gone_sender));
        Leaving { detached, gone }
    }

    fn name(&self) -> String {
        self.identity.name().to_owned()
    }
}

/// A sub-tree that was taken out, and what is to be waited for besides its own drain.
pub struct Taken {
    /// The devices.
    pub subtree: Subtree<Plugged>,
    /// Their nodes; the top one last.
    pub nodes: Vec<NodeId>,
    /// The devices below whose own removal had begun before.
    pub leaving: Vec<Leaving>,
    /// Resolves when somebody asks for force.
    pub force: oneshot::Receiver<()>,
}

/// A device that another removal has.
pub struct Leaving {
    /// Resolves when it is detached.
    pub detached: oneshot::Receiver<()>,
    /// Resolves when it is gone.
    pub gone: oneshot::Receiver<()>,
}

/// All devices. `T` is what its user keeps with each.
pub struct Tree<T> {
    nodes: BTreeMap<NodeId, Node<T>>,
    next: u64,
    watchers: BTreeMap<Watcher, Waker>,
    next_watcher: Watcher,
}

/// Somebody who is to be woken; see [`Tree::watch`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Watcher(u64);

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Tree {
            nodes: BTreeMap::new(),
            next: 0,
            watchers: BTreeMap::new(),
            next_watcher: Watcher::default(),
        }
    }
}

impl<T> Tree<T> {
    /// Whether `id` may be given to a new device.
    ///
    /// # Errors
    /// [`PlugError::IdTaken`], [`PlugError::IdLeaving`].
    pub fn check_id(&self, id: &str) -> Result<(), PlugError> {
        match self.by_id(id).and_then(|node| self.get(node)) {
            None => Ok(()),
            Some(node) if node.phase >= Phase::Draining => Err(PlugError::IdLeaving(id.to_owned())),
            Some(_) => Err(PlugError::IdTaken(id.to_owned())),
        }
    }

    /// Puts a device into the tree, below `parent`. From here on an eject of anything above shuts it, too.
    ///
    /// # Errors
    /// The id is taken, or what it is plugged into is going. The model comes back and its gate may be closed.
    pub fn plug(
        &mut self,
        parent: Option<NodeId>,
        identity: Identity,
        model: Box<dyn Model>,
        eject: Option<Arc<Eject>>,
        info: T,
        now: Instant,
    ) -> Result<NodeId, (PlugError, Box<dyn Model>)> {
        if let Err(e) = identity.id.as_ref().map_or(Ok(()), |id| self.check_id(id)) {
            return Err((e, model));
        }
        let mut above = parent;
        while let Some(node) = above.and_then(|id| self.nodes.get(&id)) {
            let late = node.eject.as_ref().is_some_and(|e| !e.cover(model.gate()));
            if late || node.model.is_none() {
                return Err((PlugError::ParentLeaving(node.name()), model));
            }
            above = node.parent;
        }
        let id = NodeId(self.next);
        self.next += 1;
        self.nodes.insert(
            id,
            Node {
                identity,
                info,
                parent,
                model: Some(model),
                eject,
                phase: Phase::Plugged,
                history: vec![(Phase::Plugged, now)],
                holders: Vec::new(),
                force: None,
                waiting: Vec::new(),
            },
        );
        Ok(id)
    }

    /// Wakes `waker` once, at the next change of any device's phase. Whoever has asked `before` and has not been woken is
    /// remembered once.
    pub fn watch(&mut self, before: Option<Watcher>, waker: &Waker) -> Watcher {
        let watcher = before.unwrap_or(self.next_watcher);
        if before.is_none() {
            self.next_watcher.0 += 1;
        }
        self.watchers.insert(watcher, waker.clone());
        watcher
    }

    /// Forgets who does not wait any more.
    pub fn unwatch(&mut self, watcher: Watcher) {
        self.watchers.remove(&watcher);
    }

    fn changed(&mut self) {
        let watchers = std::mem::take(&mut self.watchers);
        watchers.into_values().for_each(Waker::wake);
    }

    /// The device with this id, on its way out or not.
    pub fn by_id(&self, id: &str) -> Option<NodeId> {
        self.nodes
            .iter()
            .find(|(_, node)| node.identity.id.as_deref() == Some(id))
            .map(|(id, _)| *id)
    }

    /// One device.
    pub fn get(&self, node: NodeId) -> Option<&Node<T>> {
        self.nodes.get(&node)
    }

    /// One device, to change what is kept with it.
    pub fn get_mut(&mut self, node: NodeId) -> Option<&mut Node<T>> {
        self.nodes.get_mut(&node)
    }

    /// All devices, in the order in which they were plugged.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Node<T>)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    /// The devices plugged directly into `node`, on their way out or not.
    pub fn children(&self, node: NodeId) -> Vec<NodeId> {
        self.nodes
            .iter()
            .filter(|(_, child)| child.parent == Some(node))
            .map(|(id, _)| *id)
            .collect()
    }

    /// Notes that the guest is asked to let go of `node`. Asking again is allowed: the first may have got lost.
    ///
    /// # Errors
    /// It is isolated already, itself or with something above it; or has no slot.
    pub fn request(&mut self, node: NodeId, now: Instant) -> Result<(), RemoveError> {
        let Some(node) = self.nodes.get_mut(&node) else {
            return Ok(());
        };
        let name = node.name();
        // Closed without its own eject: that of something above.
        let closed = (node.model.as_ref()).is_none_or(|model| model.gate().is_closed());
        match &node.eject {
            _ if closed => return Err(RemoveError::Leaving(name)),
            None => return Err(RemoveError::Fixed(name)),
            Some(eject) if !eject.request() => return Err(RemoveError::Leaving(name)),
            Some(_) => {}
        }
        if node.phase == Phase::Plugged {
            node.enter(Phase::Requested, now);
        }
        self.changed();
        Ok(())
    }

    /// The guest says that it is at work on a request.
    pub fn guest_works(&mut self, node: NodeId, now: Instant) {
        if let Some(node) = self.nodes.get_mut(&node)
            && node.phase == Phase::Requested
        {
            node.enter(Phase::GuestOfflining, now);
            self.changed();
        }
    }

    /// Takes a request back, or notes that the guest has refused it. False: there is none, or it is too late.
    pub fn cancel(&mut self, node: NodeId, now: Instant) -> bool {
        match self.nodes.get_mut(&node) {
            Some(node) if node.eject.as_ref().is_some_and(|e| e.cancel()) => {
                node.enter(Phase::Plugged, now);
                self.changed();
                true
            }
            _ => false,
        }
    }

    /// Takes `node` and everything below it out for removal. None: it is not there, or another removal has it.
    pub fn take(&mut self, node: NodeId, now: Instant) -> Option<Taken> {
        let (force, forced) = oneshot::channel();
        let top = self.nodes.get_mut(&node)?;
        let model = top.model.take()?;
        top.force = Some(force);
        let (mut nodes, mut leaving) = (Vec::new(), Vec::new());
        let subtree = self.collect(node, model, &mut nodes, &mut leaving, now);
        self.changed();
        Some(Taken {
            subtree,
            nodes,
            leaving,
            force: forced,
        })
    }

    fn collect(
        &mut self,
        node: NodeId,
        model: Box<dyn Model>,
        nodes: &mut Vec<NodeId>,
        leaving: &mut Vec<Leaving>,
        now: Instant,
    ) -> Subtree<Plugged> {
        let mut below = Vec::new();
        for child in self.children(node) {
            let Some(entry) = self.nodes.get_mut(&child) else {
                continue;
            };
            match entry.model.take() {
                Some(model) => below.push(self.collect(child, model, nodes, leaving, now)),
                None => leaving.push(entry.wait()),
            }
        }
        nodes.push(node);
        let identity = match self.nodes.get_mut(&node) {
            Some(entry) => {
                // Also a child without an eject of its own request: nobody asks it any more.
                if let Some(eject) = &entry.eject {
                    eject.isolate();
                }
                entry.enter(Phase::Draining, now);
                entry.identity.clone()
            }
            None => Identity {
                id: None,
                path: String::new(),
            },
        };
        Subtree::new(identity, model, below)
    }

    /// Asks the removal of `node` to give up what it waits for. False: no removal has it, or it was asked before.
    pub fn force(&mut self, node: NodeId) -> bool {
        self.nodes
            .get_mut(&node)
            .and_then(|node| node.force.take())
            .is_some_and(|force| force.send(()).is_ok())
    }

    /// Notes who keeps a device from draining.
    pub fn note_holders(&mut self, of: &Identity, holders: Vec<Holder>) {
        if let Some(node) = self.find(of) {
            node.holders = holders;
        }
    }

    /// Notes that devices came into `phase`.
    pub fn note_phase(&mut self, nodes: &[NodeId], phase: Phase, now: Instant) {
        for node in nodes {
            let Some(node) = self.nodes.get_mut(node) else {
                continue;
            };
            node.enter(phase, now);
            if phase == Phase::Detached {
                node.holders.clear();
                for (detached, _) in &mut node.waiting {
                    // Who waits may have gone.
                    let _ = detached.take().map(|waiting| waiting.send(()));
                }
            }
        }
        self.changed();
    }

    /// Forgets a device: its id is free again, and who waits for its end goes on when what comes back is dropped.
    pub fn forget(&mut self, gone: &Gone) -> Option<Node<T>> {
        let node = self.position(gone.identity())?;
        self.changed();
        self.nodes.remove(&node)
    }

    fn find(&mut self, identity: &Identity) -> Option<&mut Node<T>> {
        let node = self.position(identity)?;
        self.nodes.get_mut(&node)
    }

    fn position(&self, identity: &Identity) -> Option<NodeId> {
        self.nodes
            .iter()
            .find(|(_, node)| node.identity == *identity)
            .map(|(id, _)| *id)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A task is polled for other reasons than a change, however often, and may be dropped.
    #[test]
    fn who_waits_is_remembered_once_and_who_does_not_is_forgotten() {
        let mut tree = Tree::<()>::default();
        let woken = [Arc::new(Woken::default()), Arc::new(Woken::default())];
        let watchers = woken.clone().map(|woken| {
            let waker = Waker::from(woken);
            let first = tree.watch(None, &waker);
            (0..1000).fold(first, |before, _| tree.watch(Some(before), &waker))
        });
        let held = |woken: &Arc<Woken>| Arc::strong_count(woken) - 1;
        assert_eq!(woken.each_ref().map(held), [1, 1]);
        tree.unwatch(watchers[0]);
        assert_eq!(woken.each_ref().map(held), [0, 1]);
        tree.changed();
        tree.changed();
        let times = woken.each_ref().map(|it| it.0.load(Ordering::Relaxed));
        assert_eq!(times, [0, 1]);
        assert_eq!(woken.each_ref().map(held), [0, 0]);
    }
}
