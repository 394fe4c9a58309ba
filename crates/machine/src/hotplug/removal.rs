// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine around a removal: buses that forget, slots that tell, events.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebbtide_device::{
    Bus, Detached, Gone, GuestNotice, Holder, Identity, Model, NodeId, Pending, Phase, Subtree,
    Surroundings, Tree, remove,
};
use ebbtide_iothread::oneshot;
use ebbtide_qmp::types::events;

use super::{Devices, Info};

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

/// Takes a device back that could not be plugged; nobody has seen it.
pub(super) fn unwind(devices: &Devices, identity: Identity, model: Box<dyn Model>) {
    let subtree = Subtree::new(identity, model, Vec::new()).isolate();
    let Some(this) = devices.this.upgrade() else {
        return;
    };
    let around = Around(this);
    let undo = async move {
        let (detached, _) = subtree.drain().await.detach(&mut around.bus());
        drop(around.destroy(detached).await);
    };
    devices.local.spawn(undo).detach();
}

struct Around(Rc<Devices>);

/// The buses.
struct Buses {
    devices: Rc<Devices>,
}

impl Bus for Buses {
    fn forget(&mut self, identity: &Identity, _device: &dyn Model) {
        let tree = self.devices.tree.borrow();
        let mut nodes = tree.iter().map(|(_, node)| node);
        let Some(node) = nodes.find(|node| node.identity == *identity) else {
            return;
        };
        if let Some((key, _)) = &node.info.slot {
            self.devices.ejector.vacate(*key);
        }
        if let Some(at) = node.info.at
            && let Err(e) = self.devices.bridge.detach_at(at)
        {
            tracing::error!("{}: stays on its bus: {e}", identity.path);
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
        if let Some((_, slot)) = slot {
            slot.vacated(notice);
        }
    }

    fn destroy(&self, subtree: Subtree<Detached>) -> Pending<Vec<Gone>> {
        let blocking = Arc::clone(&self.0.blocking);
        Box::pin(async move { subtree.destroy(&blocking).await })
    }

    fn deleted(&self, gone: Gone, info: Info) {
        // What it stood on is free before anybody hears that it is gone.
        drop(info);
        let identity = gone.identity();
        tracing::info!("{}: removed", identity.path);
        if let Some(sink) = self.0.events.get() {
            sink.emit(events::DEVICE_DELETED.with(events::DeviceGone {
                device: identity.id.clone(),
                path: identity.path.clone(),
            }));
        }
    }
}

impl Devices {
    /// Resolves when `node` has come as far as `phase`, or is gone. None for `phase`: when it is gone.
    pub(crate) async fn reached(&self, node: NodeId, phase: Option<Phase>) {
        std::future::poll_fn(|cx| {
            let mut tree = self.tree.borrow_mut();
            let there = match (tree.get(node), phase) {
                (None, _) => true,
                (Some(node), Some(phase)) => node.phase() >= phase,
                (Some(_), None) => false,
            };
            if there {
                return std::task::Poll::Ready(());
            }
            tree.watch(cx.waker());
            std::task::Poll::Pending
        })
        .await;
    }
}
