// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that come and go: the tree of all devices, what they stand on, and the machine's part in their removal.
//!
//! ```text
//!   device_add ─▶ drivers: make ─▶ attach to bus ─▶ tree ─▶ slot tells the guest
//!   device_del ─▶ tree: requested ─▶ slot asks the guest
//!   eject (vCPU) ─▶ Ejector: gates shut ─▶ wake-up ─▶ ebbtide_device::remove ─▶ slot empty ─▶ DEVICE_DELETED
//! ```

mod announcing;
mod backends;
pub(crate) mod blocks;
mod chardevs;
pub(crate) mod dimm;
pub(crate) mod drivers;
mod ejector;
mod ending;
mod instance;
pub(crate) mod netdevs;
mod news;
mod objects;
mod opener;
mod pci;
mod places;
mod removal;
mod requests;
pub(crate) mod shared;
mod turns;

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Weak as ArcWeak};
use std::time::{Duration, Instant};

use ebbtide_bus::acpi::PciHotplug;
use ebbtide_bus::irq::MsiController;
use ebbtide_bus::log_limit::LogLimit;
use ebbtide_bus::pci::{Bus, Devfn, HostBridge, HotplugSlot, Port, Removal};
use ebbtide_device::{Eject, GuestEject, GuestNotice, Identity, NodeId, PlugError, Tree};
use ebbtide_devices::dimm::DimmBank;
use ebbtide_devices::i6300esb::SharedAction;
use ebbtide_iothread::{Blocking, IoThread, LaterEvent, Local, Remote};
use ebbtide_memory::AddressSpace;
use ebbtide_net::{Launcher, Netdev};
use ebbtide_qmp::{EventSink, QmpError};

use crate::confine::Confinement;
use crate::lifecycle::Requests;

pub(crate) use announcing::Announced;
pub(crate) use backends::{AnyUse, Shelf, Use};
pub(crate) use blocks::BlockNode;
pub(crate) use chardevs::CharNode;
pub(crate) use dimm::DimmSite;
use drivers::Below;
pub(crate) use drivers::{Driver, Face, Made};
use ejector::OstReport;
pub(crate) use ejector::{Ejector, SlotKey};
use news::News;
pub(crate) use objects::MemoryObject;
pub use objects::{MEMORY_BACKENDS, memory_backing};
pub(crate) use opener::Opener;
pub(crate) use pci::{PciModel, Removable};
pub(crate) use places::Place;
pub(crate) use shared::Object;
use turns::Turns;

/// How long a vCPU has to get out of its register write before the control thread is woken for it.
const AFTER_THE_VCPU: Duration = Duration::from_millis(1);
/// Uninvited ejects of one device are answered no more often.
const UNINVITED: Duration = Duration::from_secs(1);

/// What the machine keeps with each device.
pub(crate) struct Info {
    /// The model's name.
    pub(crate) driver: &'static str,
    /// Where it is.
    pub(crate) site: Site,
    /// What commands about its kind do with it.
    pub(crate) face: Face,
    /// The slot it is in, where that can change while the guest runs.
    pub(crate) slot: Option<Slot>,
    /// What it stands on, until it is gone.
    pub(crate) uses: Vec<Box<dyn AnyUse>>,
    /// How the guest hears of it.
    pub(crate) announced: Announced,
}

/// Where a device is.
pub(crate) enum Site {
    /// On a PCI bus.
    Pci {
        /// The bus.
        bus: Arc<Bus>,
        /// Where on that.
        at: Devfn,
        /// Its function; the model in the tree keeps it alive.
        function: ArcWeak<dyn Removable>,
        /// It, where it is a bridge.
        port: Option<ArcWeak<Port>>,
    },
    /// In a DIMM slot.
    Dimm(Arc<DimmSite>),
    /// On the bus of the device it is below of, which knows the rest.
    Below,
}

impl Site {
    /// The bridge it is.
    pub(crate) fn port(&self) -> Option<Arc<Port>> {
        match self {
            Site::Pci { port, .. } => port.as_ref()?.upgrade(),
            Site::Dimm(_) | Site::Below => None,
        }
    }

    /// The function it is.
    pub(crate) fn function(&self) -> Option<Arc<dyn Removable>> {
        match self {
            Site::Pci { function, .. } => function.upgrade(),
            Site::Dimm(_) | Site::Below => None,
        }
    }
}

/// A slot that a guest can be asked to give up.
#[derive(Clone)]
pub(crate) enum Slot {
    /// Of a PCI bus.
    Pci(Arc<dyn HotplugSlot>),
    /// Of a DIMM.
    Dimm(Arc<DimmSite>),
}

impl Slot {
    /// How the guest's eject names it.
    pub(crate) fn key(&self) -> SlotKey {
        match self {
            Slot::Pci(slot) => SlotKey::Pci(slot.address().clone()),
            Slot::Dimm(dimm) => SlotKey::Dimm(dimm.info().slot),
        }
    }

    /// Asks the guest to let go of what is in it. False: the guest does not use it, there is nobody to wait for.
    ///
    /// # Errors
    /// Why it can't be asked now.
    pub(crate) fn request(&self) -> Result<bool, QmpError> {
        match self {
            Slot::Pci(slot) => match slot.request_removal() {
                Ok(asked) => Ok(asked == Removal::Asked),
                Err(reason) => Err(QmpError::generic(reason.to_string())),
            },
            Slot::Dimm(dimm) => dimm.request().map(|()| true),
        }
    }

    /// Takes a request back before the tree does. False: it is too late.
    pub(crate) fn cancel(&self) -> bool {
        match self {
            Slot::Pci(slot) => {
                slot.cancel();
                true
            }
            Slot::Dimm(dimm) => dimm.cancel(),
        }
    }

    /// Tells the guest that what it has ejected uninvited is still there.
    pub(crate) fn still_occupied(&self) {
        match self {
            Slot::Pci(slot) => slot.plugged(),
            // The registers have told it by themselves.
            Slot::Dimm(_) => {}
        }
    }

    /// Tells the guest that the slot is empty.
    pub(crate) fn vacated(&self, _notice: GuestNotice) {
        match self {
            Slot::Pci(slot) => slot.detached(),
            Slot::Dimm(dimm) => dimm.detach(),
        }
    }
}

/// What devices are made of and connected to.
pub(crate) struct Surface {
    pub(crate) bridge: Arc<HostBridge>,
    pub(crate) system: Arc<AddressSpace>,
    pub(crate) msi: Arc<dyn MsiController>,
    pub(crate) blocking: Arc<Blocking>,
    pub(crate) requests: Requests,
    pub(crate) confinement: Arc<Confinement>,
    pub(crate) launcher: Option<Arc<Launcher>>,
}

/// All devices of a machine. Belongs to the control thread.
pub(crate) struct Devices {
    tree: RefCell<Tree<Info>>,
    blocks: Shelf<BlockNode>,
    chardevs: Shelf<CharNode>,
    memory_objects: Shelf<MemoryObject>,
    netdevs: Shelf<Arc<Netdev>>,
    objects: Shelf<Object>,
    news: News,
    dimms: OnceCell<Arc<DimmBank>>,
    /// What the guest said last about each DIMM slot.
    ost: RefCell<BTreeMap<u16, OstReport>>,
    surface: Surface,
    /// What watchdogs do that have no action of their own.
    watchdog_action: Arc<SharedAction>,
    ejector: Arc<Ejector>,
    /// When an uninvited eject of a device was last answered.
    answered: RefCell<BTreeMap<NodeId, Instant>>,
    uninvited: LogLimit,
    root_slots: OnceCell<Arc<PciHotplug>>,
    /// Signalled when a guest has ejected something, until [`Devices::serve`] takes it.
    ejected: RefCell<Option<LaterEvent>>,
    /// Whose removal changes the buses.
    turns: Turns,
    /// Threads that serve queues, by name. They end with the machine.
    threads: RefCell<BTreeMap<String, IoThread>>,
    local: Local,
    events: OnceCell<EventSink>,
    drain_timeout: Duration,
    this: Weak<Devices>,
}

impl Devices {
    /// No device yet.
    ///
    /// # Errors
    /// The host gives no eventfd.
    pub(crate) fn new(
        surface: Surface,
        threads: BTreeMap<String, IoThread>,
        local: &Local,
        drain_timeout: Duration,
    ) -> std::io::Result<Rc<Devices>> {
        let (ejected, notifier) = LaterEvent::new(AFTER_THE_VCPU)?;
        Ok(Rc::new_cyclic(|this| Devices {
            tree: RefCell::default(),
            blocks: Shelf::new("Node"),
            chardevs: Shelf::new("Chardev"),
            memory_objects: Shelf::new("object"),
            netdevs: Shelf::new("Netdev"),
            objects: Shelf::new("object"),
            news: News::new(),
            dimms: OnceCell::new(),
            ost: RefCell::default(),
            surface,
            watchdog_action: Arc::default(),
            ejector: Ejector::new(notifier),
            answered: RefCell::default(),
            uninvited: LogLimit::default(),
            root_slots: OnceCell::new(),
            ejected: RefCell::new(Some(ejected)),
            turns: Turns::default(),
            threads: RefCell::new(threads),
            local: local.clone(),
            events: OnceCell::new(),
            drain_timeout,
            this: Weak::clone(this),
        }))
    }

    /// The tree.
    pub(crate) fn tree(&self) -> &RefCell<Tree<Info>> {
        &self.tree
    }

    /// The block nodes.
    pub(crate) fn blocks(&self) -> &Shelf<BlockNode> {
        &self.blocks
    }

    /// The character devices.
    pub(crate) fn chardevs(&self) -> &Shelf<CharNode> {
        &self.chardevs
    }

    /// The memory backends.
    pub(crate) fn memory_objects(&self) -> &Shelf<MemoryObject> {
        &self.memory_objects
    }

    /// The DIMM slots, if the machine has any.
    pub(crate) fn dimms(&self) -> Option<&Arc<DimmBank>> {
        self.dimms.get()
    }

    /// Gives the machine its DIMM slots. Once, before anything is plugged.
    pub(crate) fn set_dimms(&self, bank: Arc<DimmBank>) {
        let _ = self.dimms.set(bank);
    }

    /// What watchdogs do that have no action of their own.
    pub(crate) fn watchdog_action(&self) -> &Arc<SharedAction> {
        &self.watchdog_action
    }

    /// Where changes of the run state are asked for.
    pub(crate) fn requests(&self) -> &Requests {
        &self.surface.requests
    }

    /// The network backends.
    pub(crate) fn netdevs(&self) -> &Shelf<Arc<Netdev>> {
        &self.netdevs
    }

    /// The objects that devices share.
    pub(crate) fn objects(&self) -> &Shelf<Object> {
        &self.objects
    }

    /// Where devices say what management is to hear.
    pub(crate) fn news(&self) -> &News {
        &self.news
    }

    /// Threads for what may block.
    pub(crate) fn blocking(&self) -> &Arc<Blocking> {
        &self.surface.blocking
    }

    /// What threads may do.
    pub(crate) fn confinement(&self) -> &Arc<Confinement> {
        &self.surface.confinement
    }

    /// Who starts programs, if anybody does.
    pub(crate) fn launcher(&self) -> Option<&Arc<Launcher>> {
        self.surface.launcher.as_ref()
    }

    /// The way to open what management names.
    pub(crate) fn opener(&self) -> Opener<'_> {
        Opener {
            blocking: &self.surface.blocking,
            confinement: &self.surface.confinement,
        }
    }

    /// What guests eject by.
    pub(crate) fn ejector(&self) -> &Arc<Ejector> {
        &self.ejector
    }

    /// The slots of bus 0. Set once, before anything is plugged.
    pub(crate) fn set_root_slots(&self, slots: &Arc<PciHotplug>) {
        let _ = self.root_slots.set(Arc::clone(slots));
    }

    /// The host bridge.
    pub(crate) fn bridge(&self) -> &Arc<HostBridge> {
        &self.surface.bridge
    }

    /// The memory that devices access.
    pub(crate) fn system(&self) -> &Arc<AddressSpace> {
        &self.surface.system
    }

    /// Where interrupts come from.
    pub(crate) fn msi(&self) -> &dyn MsiController {
        &*self.surface.msi
    }

    /// Begins to serve what guests eject and to tell `events` what devices say. `ram_bytes` is how much memory the guest
    /// has without a balloon.
    pub(crate) fn serve(&self, events: &EventSink, ram_bytes: impl Fn() -> u64 + 'static) {
        let _ = self.events.set(events.clone());
        self.news.serve(&self.local, events, ram_bytes, &self.this);
        let Some(mut ejected) = self.ejected.borrow_mut().take() else {
            return;
        };
        let (this, local) = (Weak::clone(&self.this), self.local.clone());
        self.local
            .spawn(async move {
                while ejected.wait(&local).await.is_ok() {
                    let Some(devices) = this.upgrade() else {
                        return;
                    };
                    devices.answer_ejects().await;
                }
            })
            .detach();
    }

    /// Sees to what guests have ejected and said since the last time. Between two removals others have their turn: each
    /// changes the memory map, which takes the host a while.
    async fn answer_ejects(&self) {
        // Before the refusal that follows from one: it is the reason.
        for (report, is_told) in self.ejector.take_reports(self.local.now()) {
            self.report(&report, is_told);
        }
        for occupant in self.ejector.occupants() {
            let node = occupant.node;
            if occupant.take_refused() && !occupant.eject.is_isolated() {
                self.answer_uninvited(node);
            }
            if occupant.take_let_go() {
                self.guest_let_go(node);
            }
            let refused = occupant.take_guest_refused();
            let taken = match self.tree.borrow().get(node) {
                Some(entry) => entry.model().is_none(),
                None => continue,
            };
            if occupant.eject.is_isolated() && !taken {
                drop(self.remove(node));
                self.local.yield_now().await;
            } else if refused {
                self.tree.borrow_mut().cancel(node, self.local.now());
                self.refused(node);
            }
        }
    }

    /// The guest has ejected what it may not: it is told that the device is still there. Not at once again, for a guest
    /// that fails to turn a slot on turns it off, and would be told, and try, for ever.
    fn answer_uninvited(&self, node: NodeId) {
        let now = self.local.now();
        let last = self.answered.borrow_mut().insert(node, now);
        if last.is_some_and(|last| now.saturating_duration_since(last) < UNINVITED) {
            return;
        }
        let tree = self.tree.borrow();
        let Some(entry) = tree.get(node) else { return };
        if let Some(suppressed) = self.uninvited.allow() {
            let path = &entry.identity.path;
            tracing::warn!(
                suppressed,
                "{path}: the guest ejects it uninvited; it stays"
            );
        }
        if let Some(slot) = &entry.info.slot {
            slot.still_occupied();
        }
    }

    /// The thread of this name, started if there is none yet.
    ///
    /// # Errors
    /// The host gives no thread.
    pub(crate) fn thread(&self, name: &str) -> Result<Remote, QmpError> {
        let mut threads = self.threads.borrow_mut();
        if let Some(thread) = threads.get(name) {
            return Ok(thread.remote());
        }
        let thread = self
            .surface
            .confinement
            .iothread(name)
            .map_err(|e| QmpError::generic(e.to_string()))?;
        let remote = thread.remote();
        threads.insert(name.to_owned(), thread);
        Ok(remote)
    }

    /// Puts what was made at its place and into the tree, and tells the guest if that is to be.
    ///
    /// # Errors
    /// The bus does not take it, or what it is plugged into is going; it is taken off again.
    pub(crate) fn plug(
        &self,
        id: Option<&str>,
        driver: &'static str,
        made: Made,
        place: Place,
        policy: GuestEject,
        announced: Announced,
    ) -> Result<NodeId, QmpError> {
        let Made {
            function,
            port,
            face,
            uses,
        } = made;
        let gate = Arc::clone(function.config().gate());
        let enumerated = Arc::clone(function.config().enumerated());
        let attach = match announced {
            Announced::Later => Bus::attach_hidden_at,
            Announced::Now | Announced::AtBoot => Bus::attach_at,
        };
        attach(&place.bus, place.at, Arc::clone(&function) as _)
            .map_err(|e| QmpError::generic(e.to_string()))?;
        let info = Info {
            driver,
            site: Site::Pci {
                bus: Arc::clone(&place.bus),
                at: place.at,
                function: Arc::downgrade(&function),
                port,
            },
            face,
            slot: place.slot.clone().map(Slot::Pci),
            uses,
            announced,
        };
        let key = info.slot.as_ref().map(Slot::key);
        let eject = key.is_some().then(|| Eject::new(policy, &gate));
        let identity = self.identity(id);
        let model = Box::new(PciModel::new(function, &place.bus, place.at));
        let plugged = self.tree.borrow_mut().plug(
            place.parent,
            identity.clone(),
            model,
            eject.clone(),
            info,
            self.local.now(),
        );
        let node = plugged.map_err(|(error, model)| {
            removal::unwind(self, identity, model, Some(&place));
            plug_error(&error)
        })?;
        if let (Some(key), Some(eject)) = (key, eject) {
            self.ejector.occupy(key, &eject, node, Some(&enumerated));
        }
        self.set_instance(&place);
        if let Some(slot) = place.slot.filter(|_| announced == Announced::Now) {
            slot.plugged();
        }
        Ok(node)
    }

    /// Puts what was made below another device into the tree. The device it is below of tells the guest of it.
    ///
    /// # Errors
    /// What it is below of is going; it is taken off again.
    pub(crate) fn plug_below(
        &self,
        id: Option<&str>,
        driver: &'static str,
        below: Below,
        policy: GuestEject,
    ) -> Result<NodeId, QmpError> {
        let Below {
            parent,
            model,
            face,
            uses,
        } = below;
        let info = Info {
            driver,
            site: Site::Below,
            face,
            slot: None,
            uses,
            announced: Announced::Now,
        };
        let eject = Eject::new(policy, model.gate());
        let identity = self.identity(id);
        let plugged = self.tree.borrow_mut().plug(
            Some(parent),
            identity.clone(),
            model,
            Some(eject),
            info,
            self.local.now(),
        );
        plugged.map_err(|(error, model)| {
            removal::unwind(self, identity, model, None);
            plug_error(&error)
        })
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

fn plug_error(error: &PlugError) -> QmpError {
    match error {
        PlugError::IdTaken(id) => QmpError::duplicate_device_id(id),
        PlugError::IdLeaving(_) | PlugError::ParentLeaving(_) => {
            QmpError::generic(error.to_string())
        }
    }
}
