// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that come and go: the tree of all devices, what they stand on, and the machine's part in their removal.
//!
//! ```text
//!   device_add ─▶ drivers: make ─▶ attach to bus ─▶ tree ─▶ slot tells the guest
//!   device_del ─▶ tree: requested ─▶ slot asks the guest
//!   eject (vCPU) ─▶ Ejector: gates shut ─▶ channel ─▶ ebbtide_device::remove ─▶ slot empty ─▶ DEVICE_DELETED
//! ```

mod backends;
mod ejector;
mod ending;
mod pci;
mod removal;

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Weak as ArcWeak};
use std::time::Duration;

use ebbtide_bus::pci::{Devfn, HostBridge};
use ebbtide_device::{Eject, GuestEject, GuestNotice, Identity, NodeId, PlugError, Tree};
use ebbtide_iothread::{Blocking, IoThread, Local, Receiver, Remote, channel};
use ebbtide_qmp::EventSink;

pub(crate) use backends::{AnyUse, Shelf, Use};
pub(crate) use ejector::{Ejector, SlotKey};
pub(crate) use pci::{PciModel, Removable};

/// A place that a guest can be asked to give up and told of.
pub(crate) trait Slot {
    /// Asks the guest to let go of what is in the slot.
    ///
    /// # Errors
    /// Why it cannot be asked now, for people.
    fn request(&self) -> Result<(), String>;
    /// Takes the question back as far as the guest has not heard it.
    fn cancel(&self);
    /// Tells the guest that something is in the slot.
    fn occupied(&self);
    /// Tells the guest that the slot is empty.
    fn vacated(&self, notice: GuestNotice);
}

/// What the machine keeps with each device.
pub(crate) struct Info {
    /// The model's name.
    pub(crate) driver: &'static str,
    /// Where it is on PCI.
    pub(crate) at: Option<Devfn>,
    /// Its function; the model in the tree keeps it alive.
    pub(crate) function: Option<ArcWeak<dyn Removable>>,
    /// The slot it is in, where that can change while the guest runs.
    pub(crate) slot: Option<(SlotKey, Rc<dyn Slot>)>,
    /// What it stands on, until it is gone.
    pub(crate) uses: Vec<Box<dyn AnyUse>>,
}

/// All devices of a machine. Belongs to the control thread.
pub(crate) struct Devices {
    tree: RefCell<Tree<Info>>,
    bridge: Arc<HostBridge>,
    ejector: Arc<Ejector>,
    /// Ejected devices, until [`Devices::serve`] takes it.
    ejected: RefCell<Option<Receiver<NodeId>>>,
    /// Threads that serve queues, by name. They end with the machine.
    threads: RefCell<BTreeMap<String, IoThread>>,
    blocking: Arc<Blocking>,
    local: Local,
    events: OnceCell<EventSink>,
    drain_timeout: Duration,
    this: Weak<Devices>,
}

impl Devices {
    /// No device yet.
    pub(crate) fn new(
        bridge: &Arc<HostBridge>,
        threads: BTreeMap<String, IoThread>,
        blocking: &Arc<Blocking>,
        local: &Local,
        drain_timeout: Duration,
    ) -> Rc<Devices> {
        let (sender, ejected) = channel();
        Rc::new_cyclic(|this| Devices {
            tree: RefCell::default(),
            bridge: Arc::clone(bridge),
            ejector: Ejector::new(sender),
            ejected: RefCell::new(Some(ejected)),
            threads: RefCell::new(threads),
            blocking: Arc::clone(blocking),
            local: local.clone(),
            events: OnceCell::new(),
            drain_timeout,
            this: Weak::clone(this),
        })
    }

    /// The tree.
    pub(crate) fn tree(&self) -> &RefCell<Tree<Info>> {
        &self.tree
    }

    /// What guests eject by.
    pub(crate) fn ejector(&self) -> &Arc<Ejector> {
        &self.ejector
    }

    /// Begins to serve what guests eject; events go to `events`.
    pub(crate) fn serve(&self, events: &EventSink) {
        let _ = self.events.set(events.clone());
        let (Some(mut ejected), Some(this)) =
            (self.ejected.borrow_mut().take(), self.this.upgrade())
        else {
            return;
        };
        let this = Rc::downgrade(&this);
        self.local
            .spawn(async move {
                while let Some(node) = ejected.recv().await {
                    let Some(devices) = this.upgrade() else {
                        return;
                    };
                    devices.remove(node);
                }
            })
            .detach();
    }

    /// The thread of this name, started if there is none yet.
    ///
    /// # Errors
    /// The host gives no thread.
    pub(crate) fn thread(&self, name: &str) -> Result<Remote, ebbtide_iothread::Error> {
        let mut threads = self.threads.borrow_mut();
        if let Some(thread) = threads.get(name) {
            return Ok(thread.remote());
        }
        let thread = IoThread::spawn(name)?;
        let remote = thread.remote();
        threads.insert(name.to_owned(), thread);
        Ok(remote)
    }

    /// Puts a function that is on the bus into the tree. Unless it is `cold` the guest is told.
    ///
    /// # Errors
    /// Its id is taken, or what it is plugged into is going. It has been taken off the bus again.
    pub(crate) fn plug(
        &self,
        id: Option<&str>,
        function: Arc<dyn Removable>,
        at: Devfn,
        policy: GuestEject,
        info: Info,
        cold: bool,
    ) -> Result<NodeId, PlugError> {
        let gate = Arc::clone(function.config().gate());
        let model = PciModel::new(function, &self.bridge, at);
        let eject = info.slot.is_some().then(|| Eject::new(policy, &gate));
        let slot = info.slot.clone();
        let identity = self.identity(id);
        let plugged = self.tree.borrow_mut().plug(
            None,
            identity.clone(),
            Box::new(model),
            eject.clone(),
            info,
            self.local.now(),
        );
        match plugged {
            Ok(node) => {
                if let (Some((key, slot)), Some(eject)) = (slot, eject) {
                    self.ejector.occupy(key, &eject, node);
                    if !cold {
                        slot.occupied();
                    }
                }
                Ok(node)
            }
            Err((error, model)) => {
                removal::unwind(self, identity, model);
                Err(error)
            }
        }
    }

    fn identity(&self, id: Option<&str>) -> Identity {
        let path = match id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => format!("/machine/peripheral-anon/device[{}]", self.anonymous()),
        };
        Identity {
            id: id.map(str::to_owned),
            path,
        }
    }

    /// The lowest number no device without an id has.
    fn anonymous(&self) -> usize {
        let tree = self.tree.borrow();
        let taken = |n: &usize| {
            let path = format!("/machine/peripheral-anon/device[{n}]");
            tree.iter().any(|(_, node)| node.identity.path == path)
        };
        (0..).find(|n| !taken(n)).unwrap_or_default()
    }
}
