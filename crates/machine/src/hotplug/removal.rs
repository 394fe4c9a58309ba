// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine around a removal: buses that forget, slots that tell, events.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use ebbtide_bus::pci;
use ebbtide_device::{
    Bus, Detached, Gone, GuestNotice, Holder, Identity, Model, NodeId, Pending, Phase, Subtree,
    Surroundings, Tree, Watcher, remove,
};
use ebbtide_iothread::oneshot;
use ebbtide_qmp::types::device::DevicePath;
use ebbtide_qmp::types::events;

use super::{Devices, Info, Place, Removable, Site};

impl Devices {
    /// Removes a device and what is below it, isolating it where the guest has not. The answer comes when management
    /// has been told; whoever does not wait for it drops it.
    pub(crate) fn remove(&self, node: NodeId) -> oneshot::Receiver<()> {
        let (done, gone) = oneshot::channel();
        if let Some(devices) = self.this.upgrade() {
            let removal = async move {
                remove(&Around(devices), node).await;
                // Nobody may be waiting.
                let _ = done.send(());
            };
            self.local.spawn(removal).detach();
        }
        gone
    }
}

impl Devices {
    /// The guest has ejected `node`, and what is below with it: their drivers ask for nothing more.
    pub(super) fn guest_let_go(&self, node: NodeId) {
        self.each_function(node, |function| {
            function.config().keep_identity(false);
            function.guest_let_go();
        });
    }

    /// `node`, and what is below with it, is about to be isolated without the guest, whose drivers may be at work: the
    /// devices are found on their buses until they are detached, so that the drivers wait for what is still answered.
    pub(super) fn taken_by_surprise(&self, node: NodeId) {
        self.each_function(node, |function| function.config().keep_identity(true));
    }

    fn each_function(&self, top: NodeId, act: impl Fn(&dyn Removable)) {
        let tree = self.tree.borrow();
        let mut nodes = vec![top];
        while let Some(node) = nodes.pop() {
            nodes.extend(tree.children(node));
            let function = tree.get(node).and_then(|entry| entry.info.site.function());
            function.iter().for_each(|function| act(&**function));
        }
    }
}

/// Takes a device back that could not be plugged: its bridge went while it came. The guest may have seen it.
pub(super) fn unwind(
    devices: &Devices,
    identity: Identity,
    model: Box<dyn Model>,
    place: Option<&Place>,
) {
    let subtree = Subtree::new(identity, model, Vec::new()).isolate();
    let mut bus = Unplugged(place.cloned());
    let blocking = Arc::clone(devices.blocking());
    let undo = async move {
        let (detached, _) = subtree.drain().await.detach(&mut bus);
        let _ = detached.destroy(&blocking).await;
    };
    devices.local.spawn(undo).detach();
}

/// The bus of a device that never came into the tree.
struct Unplugged(Option<Place>);

impl Bus for Unplugged {
    fn forget(&mut self, identity: &Identity, _device: &dyn Model) {
        if let Some(place) = &self.0 {
            forget(&place.bus, place.at, identity);
        }
    }
}

fn forget(bus: &pci::Bus, at: pci::Devfn, identity: &Identity) {
    if let Err(e) = bus.detach_at(at) {
        tracing::error!("{}: stays on its bus: {e}", identity.path);
    }
}

struct Around(Rc<Devices>);

/// The buses.
struct Buses {
    devices: Rc<Devices>,
}

impl Bus for Buses {
    fn forget(&mut self, identity: &Identity, _device: &dyn Model) {
        let tree = self.devices.tree.borrow();
        let Some((id, node)) = tree.iter().find(|(_, node)| node.identity == *identity) else {
            return;
        };
        self.devices.answered.borrow_mut().remove(&id);
        if let Some(slot) = &node.info.slot {
            self.devices.ejector.vacate(&slot.key(), id);
        }
        if let Some(port) = node.info.site.port() {
            self.devices.ejector.forget_bus(port.bus().name());
        }
        if let Site::Pci { bus, at, .. } = &node.info.site {
            forget(bus, *at, identity);
        }
    }
}

impl Surroundings<Info> for Around {
    type Bus = Buses;

    fn tree(&self) -> &RefCell<Tree<Info>> {
        &self.0.tree
    }

    fn now(&self) -> Instant {
        self.0.local.now()
    }

    fn sleep(&self, duration: Duration) -> Pending<()> {
        Box::pin(self.0.local.sleep(duration))
    }

    fn patience(&self) -> Duration {
        self.0.drain_timeout.max(Duration::from_secs(1))
    }

    fn bus(&self) -> Buses {
        Buses {
            devices: Rc::clone(&self.0),
        }
    }

    fn turn(&self) -> Pending<Box<dyn Any>> {
        let devices = Rc::clone(&self.0);
        Box::pin(async move {
            let turn = devices.turns.next().await;
            // A monitor that has asked something meanwhile comes first.
            devices.local.yield_now().await;
            Box::new(turn) as Box<dyn Any>
        })
    }

    fn stalled(&self, top: &Identity, age: Duration, undrained: &[(Identity, Vec<Holder>)]) {
        for (device, holders) in undrained {
            let held: Vec<&str> = holders.iter().map(|h| h.what.as_str()).collect();
            tracing::warn!(
                "{}: its removal waits for {} for {} s: {}",
                top.path,
                device.path,
                age.as_secs(),
                held.join(", ")
            );
        }
    }

    fn tell_guest(&self, top: NodeId, notice: GuestNotice) {
        let slot = self
            .0
            .tree
            .borrow()
            .get(top)
            .and_then(|node| node.info.slot.clone());
        if let Some(slot) = slot {
            slot.vacated(notice);
        }
    }

    fn destroy(&self, subtree: Subtree<Detached>) -> Pending<Vec<Gone>> {
        let devices = Rc::clone(&self.0);
        Box::pin(async move {
            let gone = subtree.destroy(devices.blocking()).await;
            for device in &gone {
                devices.released(device.identity()).await;
            }
            gone
        })
    }

    fn deleted(&self, gone: Gone, info: Info) {
        // What it stood on is free before anybody hears that it is gone.
        drop(info);
        let identity = gone.identity();
        tracing::info!("{}: removed", identity.path);
        self.0.emit(events::DEVICE_DELETED.with(DevicePath {
            device: identity.id.clone(),
            path: identity.path.clone(),
        }));
    }
}

/// Waits for a change of the tree, until this is dropped.
struct Waiting<'d> {
    tree: &'d RefCell<Tree<Info>>,
    watcher: Option<Watcher>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Whoever drops it while the tree changes has one more be woken in vain.
        if let (Some(watcher), Ok(mut tree)) = (self.watcher, self.tree.try_borrow_mut()) {
            tree.unwatch(watcher);
        }
    }
}

/// How often a backend is looked at that a device has left.
const LOOK: Duration = Duration::from_millis(1);

impl Devices {
    /// Resolves when nothing of a device that is gone is at its backends any more: a task that has nothing left to do
    /// ends on its own thread, and takes a moment.
    async fn released(&self, device: &Identity) {
        loop {
            let released = {
                let tree = self.tree.borrow();
                let mut nodes = tree.iter().map(|(_, node)| node);
                let node = nodes.find(|node| node.identity == *device);
                node.is_none_or(|node| node.info.uses.iter().all(|it| it.is_released()))
            };
            if released {
                return;
            }
            self.local.sleep(LOOK).await;
        }
    }

    /// Resolves to what `look` finds in the phase `node` is in, once it finds something. No phase: the device is gone.
    pub(crate) async fn when<R>(
        &self,
        node: NodeId,
        look: impl Fn(Option<Phase>) -> Option<R>,
    ) -> R {
        let mut waiting = Waiting {
            tree: &self.tree,
            watcher: None,
        };
        std::future::poll_fn(|cx| {
            let mut tree = waiting.tree.borrow_mut();
            let found = look(tree.get(node).map(|entry| entry.phase()));
            if found.is_none() {
                waiting.watcher = Some(tree.watch(waiting.watcher, cx.waker()));
            }
            found.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
