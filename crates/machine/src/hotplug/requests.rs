// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What management wants: devices to come, to go, to stay after all.

use ebbtide_device::{GuestEject, NodeId, Phase, RemoveError};
use ebbtide_qmp::schema::Event;
use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::ebbtide::WaitPhase;
use ebbtide_qmp::types::qom::ObjectAdd;
use ebbtide_qmp::{Properties, QmpError};

use super::drivers::Make;
use super::{Devices, MEMORY_BACKENDS, Slot, announcing, blocks, dimm, drivers, netdevs, shared};
use crate::Error;
use crate::config::MachineConfig;

impl Devices {
    /// Makes what is there from the start.
    ///
    /// # Errors
    /// Names the one that can't be had.
    pub(crate) async fn add_cold(&self, config: &MachineConfig) -> Result<(), Error> {
        for object in &config.objects {
            let added = self.add_object(object.clone()).await;
            added.map_err(|e| Error::part(format!("--object {}", object.id), e.desc))?;
        }
        for netdev in &config.netdevs {
            let added = netdevs::add(self, netdev.clone()).await;
            added.map_err(|e| Error::part(format!("--netdev {}", netdev.id), e.desc))?;
        }
        for chardev in &config.chardevs {
            let added = self.add_chardev(chardev.clone()).await;
            added.map_err(|e| Error::part(format!("--chardev {}", chardev.id), e.desc))?;
        }
        for node in &config.block_nodes {
            let name = node.node_name.clone().unwrap_or_default();
            let failures = &self.news.disk;
            let added = blocks::add(&self.blocks, self.opener(), failures, node.clone()).await;
            added.map_err(|e| Error::part(format!("--blockdev {name}"), e.desc))?;
        }
        for device in &config.devices {
            let name = device.id.as_ref().unwrap_or(&device.driver).clone();
            let added = self.device_add(device.clone(), true).await;
            added.map_err(|e| Error::part(format!("--device {name}"), e.desc))?;
        }
        Ok(())
    }

    /// Makes an object.
    ///
    /// # Errors
    /// What is wrong with it, or why the host can't.
    pub(crate) async fn add_object(&self, args: ObjectAdd) -> Result<(), QmpError> {
        drivers::check_id(&args.id)?;
        let taken = self.memory_objects().get(&args.id).is_some();
        if taken || self.objects().get(&args.id).is_some() {
            return Err(QmpError::duplicate_object_id(&args.id));
        }
        if MEMORY_BACKENDS.contains(&&*args.qom_type) {
            return self.add_memory_object(args).await;
        }
        shared::add(self, args).await
    }

    /// Takes an object away.
    ///
    /// # Errors
    /// There is none, or a device uses it.
    pub(crate) async fn remove_object(&self, id: &str) -> Result<(), QmpError> {
        if self.memory_objects().get(id).is_some() {
            return self.remove_memory_object(id).await;
        }
        shared::remove(self, id).await
    }

    /// Makes and plugs a device. Unless it is `cold` the guest is told.
    ///
    /// # Errors
    /// What is wrong with the arguments, or why the host can't; nothing has changed.
    pub(crate) async fn device_add(&self, args: DeviceAdd, cold: bool) -> Result<NodeId, QmpError> {
        if args.driver == dimm::DRIVER {
            self.check_id(args.id.as_deref())?;
            return self.add_dimm(args, cold).await;
        }
        let driver = drivers::find(&args.driver)?;
        self.check_id(args.id.as_deref())?;
        let mut properties = args.properties;
        let name = args.id.clone().unwrap_or_else(|| driver.name.to_owned());
        self.back_memory(&properties, &name).await?;
        let policy = policy(&mut properties)?;
        let (id, bus) = (args.id.as_deref(), args.bus.as_deref());
        match driver.make {
            Make::Pci(make) => {
                let announced = announcing::take(&mut properties, cold)?;
                let mut place = self.place(driver, bus, &mut properties, cold)?;
                announced.check(&place)?;
                self.take_instance(&mut place, &mut properties)?;
                let made = make(self, &name, &mut properties)?;
                properties.finish_device(driver.name)?;
                self.plug(id, driver.name, made, place, policy, announced)
            }
            Make::Below(make) => {
                let below = make(self, &name, bus, properties)?;
                self.plug_below(id, driver.name, below, policy)
            }
        }
    }

    /// Whether a new device may have this id.
    fn check_id(&self, id: Option<&str>) -> Result<(), QmpError> {
        let Some(id) = id else { return Ok(()) };
        drivers::check_id(id)?;
        let free = self.tree.borrow().check_id(id);
        free.map_err(|e| super::plug_error(&e))
    }

    /// Asks the guest to let go of a device.
    ///
    /// # Errors
    /// It is going already, it can't go, or the guest can't be asked now.
    pub(crate) fn request_removal(&self, node: NodeId) -> Result<(), QmpError> {
        if self.is_out_of_sight(node) {
            return self.remove_unseen(node);
        }
        let asked_before = self.is_requested(node);
        let requested = self.tree.borrow_mut().request(node, self.local.now());
        requested.map_err(|e| refuse(&e))?;
        let slot = {
            let tree = self.tree.borrow();
            tree.get(node).and_then(|node| node.info.slot.clone())
        };
        let Some(slot) = slot else {
            // It has no hot-plug hardware that could ask: the device it is below of tells the guest when it is gone.
            drop(self.remove(node));
            return Ok(());
        };
        if self.is_asked_above(node) {
            return Ok(());
        }
        match slot.request() {
            Ok(true) => {
                self.each_asked_below(node, |slot| {
                    slot.cancel();
                });
                Ok(())
            }
            // The guest does not use it: there is nobody to wait for.
            Ok(false) => {
                drop(self.remove(node));
                Ok(())
            }
            // The guest may be busy with the first time it was asked.
            Err(refused) => {
                if !asked_before {
                    self.tree.borrow_mut().cancel(node, self.local.now());
                }
                Err(refused)
            }
        }
    }

    fn is_requested(&self, node: NodeId) -> bool {
        let tree = self.tree.borrow();
        let eject = tree.get(node).and_then(|node| node.eject());
        eject.is_some_and(|eject| eject.is_requested())
    }

    /// Whether the guest is asked for something that `node` is below, and so for it. It is not asked twice: Linux takes what
    /// is below a port away with its driver for that slot, which waits for itself if it is at work there.
    fn is_asked_above(&self, node: NodeId) -> bool {
        let tree = self.tree.borrow();
        let parent = |of: &NodeId| tree.get(*of)?.parent();
        let above: Vec<NodeId> = std::iter::successors(parent(&node), parent).collect();
        drop(tree);
        above.into_iter().any(|node| self.is_requested(node))
    }

    /// Does something with the slot of each device below `node` that is asked for, but for those that are asked for with
    /// another one in between.
    fn each_asked_below(&self, node: NodeId, act: impl Fn(&Slot)) {
        let mut below = self.tree.borrow().children(node);
        while let Some(child) = below.pop() {
            if !self.is_requested(child) {
                below.extend(self.tree.borrow().children(child));
                continue;
            }
            let tree = self.tree.borrow();
            let slot = tree.get(child).and_then(|child| child.info.slot.clone());
            drop(tree);
            slot.iter().for_each(&act);
        }
    }

    /// Withdraws a request. False: there is none, or it is too late.
    pub(crate) fn cancel_removal(&self, node: NodeId) -> bool {
        let slot = {
            let tree = self.tree.borrow();
            let Some(entry) = tree.get(node) else {
                return false;
            };
            if !entry.eject().is_some_and(|eject| eject.is_requested()) {
                return false;
            }
            entry.info.slot.clone()
        };
        let cancelled = slot.is_some_and(|slot| slot.cancel())
            && self.tree.borrow_mut().cancel(node, self.local.now());
        if cancelled && !self.is_asked_above(node) {
            // What was asked for before, or meanwhile, is to go all the same.
            self.each_asked_below(node, |slot| {
                if let Err(e) = slot.request() {
                    tracing::warn!("a device below stays for now: {}", e.desc);
                }
            });
        }
        cancelled
    }

    /// Takes a device away without asking the guest again: a removal that waits for the guest goes on without it, one
    /// that waits for a backend gives that up.
    ///
    /// # Errors
    /// No removal was asked for, or nothing is left that could be forced.
    pub(crate) fn force(&self, node: NodeId) -> Result<(), QmpError> {
        let phase = self
            .tree
            .borrow()
            .get(node)
            .map(|n| (n.phase(), n.identity.path.clone()));
        match phase {
            None => Ok(()),
            Some((Phase::Plugged, path)) => Err(QmpError::generic(format!(
                "Device '{path}' is not being removed: use device_del first"
            ))),
            Some((Phase::Requested | Phase::GuestOfflining, _)) => {
                self.taken_by_surprise(node);
                drop(self.remove(node));
                Ok(())
            }
            Some((_, path)) => match self.tree.borrow_mut().force(node) {
                true => Ok(()),
                false => Err(QmpError::generic(format!(
                    "Device '{path}': nothing is left to force, that was done before or the drain has ended"
                ))),
            },
        }
    }

    /// Resolves when a removal has come as far as `phase`, with how far it is; None: the device stays plugged in.
    pub(crate) async fn arrival(&self, node: NodeId, phase: WaitPhase) -> Option<WaitPhase> {
        let wanted = match phase {
            WaitPhase::Isolated => Some(Phase::Draining),
            // The phase that begins when the drain ends.
            WaitPhase::Drained | WaitPhase::Detached => Some(Phase::Detached),
            WaitPhase::Deleted => None,
        };
        self.when(node, |now| match now {
            None => Some(Some(WaitPhase::Deleted)),
            Some(Phase::Plugged) => Some(None),
            Some(now) if wanted.is_some_and(|wanted| now >= wanted) => {
                let detached = now >= Phase::Detached;
                Some(Some(if detached {
                    WaitPhase::Detached
                } else {
                    WaitPhase::Isolated
                }))
            }
            Some(_) => None,
        })
        .await
    }

    /// Sends an event, once somebody is there to send it.
    pub(crate) fn emit(&self, event: Event) {
        if let Some(sink) = self.events.get() {
            sink.emit(event);
        }
    }
}

pub(super) fn refuse(error: &RemoveError) -> QmpError {
    QmpError::generic(error.to_string())
}

/// The property `guest-eject` of every device that can be taken out.
pub(super) fn policy(properties: &mut Properties) -> Result<GuestEject, QmpError> {
    match properties.take_string("guest-eject")?.as_deref() {
        None | Some("requested") => Ok(GuestEject::Requested),
        Some("on") => Ok(GuestEject::On),
        Some("off") => Ok(GuestEject::Off),
        Some(other) => Err(QmpError::generic(format!(
            "Parameter 'guest-eject' does not accept value '{other}': on, off and requested are accepted"
        ))),
    }
}
