// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DIMMs as the lifecycle of devices sees them. A DIMM has no registers: its gate stands for the right to begin its
//! removal, what is waited for are the pins on its memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::acpi::{Arrival, GuestEject as RegisterPolicy, SlotState};
use ebbtide_device::{Draining, Eject, GuestEject, Holder, Identity, Model, NodeId};
use ebbtide_devices::dimm::{DetachedDimm, Dimm, DimmInfo, DimmSpec, IsolatedDimm};
use ebbtide_gate::Gate;
use ebbtide_memory::{RamBlock, Ticket};
use ebbtide_qmp::types::acpi::{AcpiDeviceOst, AcpiOstInfo, AcpiSlotType};
use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::events;
use ebbtide_qmp::{Properties, QmpError};

use super::ejector::OstReport;
use super::objects::MemoryObject;
use super::{Announced, AnyUse, Devices, Face, Info, Site, Slot};

/// The name of the driver.
pub(crate) const DRIVER: &str = "pc-dimm";
/// Its properties.
pub(crate) const PROPERTIES: &[(&str, &str)] = &[
    ("memdev", "link<memory-backend>"),
    ("node", "uint32"),
    ("slot", "int32"),
    ("addr", "uint64"),
    ("guest-eject", "str"),
];

/// A DIMM, shared by its model and by who asks about it.
pub(crate) struct DimmSite {
    gate: Arc<Gate>,
    info: DimmInfo,
    state: Mutex<State>,
}

enum State {
    Plugged(Dimm),
    Isolated(IsolatedDimm),
    Detached(DetachedDimm),
    /// Between two of these, or gone.
    None,
}

impl DimmSite {
    fn new(dimm: Dimm) -> Arc<DimmSite> {
        Arc::new(DimmSite {
            gate: Gate::new(&*dimm.info().id),
            info: dimm.info().clone(),
            state: Mutex::new(State::Plugged(dimm)),
        })
    }

    /// What it is and where.
    pub(crate) fn info(&self) -> &DimmInfo {
        &self.info
    }

    /// Asks the guest to let go.
    pub(crate) fn request(&self) -> Result<(), QmpError> {
        match &*self.lock() {
            State::Plugged(dimm) => dimm
                .request_removal()
                .map_err(|e| QmpError::generic(e.to_string())),
            _ => Err(QmpError::unplug_pending(&self.info.id)),
        }
    }

    /// Takes the request back. False when the guest was faster.
    pub(crate) fn cancel(&self) -> bool {
        match &*self.lock() {
            State::Plugged(dimm) => dimm.cancel_removal().is_ok(),
            _ => false,
        }
    }

    /// Empties the slot.
    pub(crate) fn detach(&self) {
        let mut state = self.lock();
        *state = match std::mem::replace(&mut *state, State::None) {
            State::Isolated(dimm) => match dimm.detach() {
                Ok(dimm) => State::Detached(dimm),
                Err((dimm, error)) => {
                    tracing::error!("{error}: the slot stays occupied");
                    State::Isolated(*dimm)
                }
            },
            other => other,
        };
    }

    /// Its memory while it is the guest's.
    pub(crate) fn block(&self) -> Option<Arc<RamBlock>> {
        match &*self.lock() {
            State::Plugged(dimm) => dimm.block().cloned(),
            State::Isolated(_) | State::Detached(_) | State::None => None,
        }
    }

    /// Gives the next guest `block` in its place.
    pub(crate) fn renew(&self, block: &Arc<RamBlock>) -> Result<Ticket, String> {
        match &mut *self.lock() {
            State::Plugged(dimm) => dimm.renew(block).map_err(|e| e.to_string()),
            State::Isolated(_) | State::Detached(_) | State::None => {
                Err(format!("{} is on its way out", self.info.id))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The DIMM for the lifecycle. Dropping it gives the memory back once it is detached, and may block.
struct DimmModel(Arc<DimmSite>);

impl Model for DimmModel {
    fn gate(&self) -> &Arc<Gate> {
        &self.0.gate
    }

    fn drain(&mut self) -> Draining {
        let mut state = self.0.lock();
        let State::Plugged(dimm) = std::mem::replace(&mut *state, State::None) else {
            return Box::pin(std::future::pending());
        };
        if dimm.state() != SlotState::Ejected
            && let Err(error) = dimm.withdraw()
        {
            tracing::debug!("the guest was faster: {error}");
        }
        match dimm.isolate() {
            Ok(dimm) => {
                let drained = dimm.drained();
                *state = State::Isolated(dimm);
                Box::pin(drained)
            }
            Err((dimm, error)) => {
                // Something shows the memory elsewhere: it can't go under it.
                tracing::error!("{error}");
                *state = State::Plugged(*dimm);
                Box::pin(std::future::pending())
            }
        }
    }

    fn holders(&self) -> Vec<Holder> {
        let State::Isolated(dimm) = &*self.0.lock() else {
            return Vec::new();
        };
        let holder = |holder: ebbtide_memory::Holder| Holder {
            what: format!("{} ({})", holder.what, holder.count),
            age: Some(holder.age),
        };
        dimm.ticket().holders().into_iter().map(holder).collect()
    }
}

impl Drop for DimmModel {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut *self.0.lock(), State::None);
        match state {
            State::Detached(dimm) => {
                if let Err((_kept, error)) = dimm.destroy() {
                    tracing::error!("{error}");
                }
            }
            // With the whole machine: its memory goes with it.
            other => drop(other),
        }
    }
}

impl Devices {
    /// Makes and plugs a DIMM.
    ///
    /// # Errors
    /// What is wrong with the arguments, or why the host can't; nothing has changed.
    pub(crate) async fn add_dimm(&self, args: DeviceAdd, cold: bool) -> Result<NodeId, QmpError> {
        if let Some(bus) = &args.bus {
            return Err(QmpError::generic(format!(
                "Device '{DRIVER}' can't go on bus '{bus}'"
            )));
        }
        let bank = self
            .dimms()
            .ok_or_else(|| QmpError::generic("memory hotplug is not enabled: the machine has no DIMM slots (--memory ...,slots=N)"))?;
        let id = args
            .id
            .clone()
            .unwrap_or_else(|| format!("dimm{}", self.anonymous()));
        let mut properties = args.properties;
        let policy = super::requests::policy(&mut properties)?;
        let (memdev, spec) = spec(&id, policy, &mut properties, cold)?;
        properties.finish_device(DRIVER)?;
        let object = self.memory_objects().take(&memdev, &id)?;
        let block = MemoryObject::block(object.value(), self.opener()).await?;
        let plugged = Dimm::plug(bank, &spec, &block);
        let dimm = match plugged {
            Ok(dimm) => dimm,
            Err(error) => {
                object.value().put_back(block);
                return Err(QmpError::generic(error.to_string()));
            }
        };
        drop(block);
        self.plug_dimm(args.id.as_deref(), DimmSite::new(dimm), Box::new(object))
    }

    fn plug_dimm(
        &self,
        id: Option<&str>,
        site: Arc<DimmSite>,
        object: Box<dyn AnyUse>,
    ) -> Result<NodeId, QmpError> {
        // The slot's registers decide what the guest may do.
        let eject = Eject::new(GuestEject::On, &site.gate);
        let slot = Slot::Dimm(Arc::clone(&site));
        let key = slot.key();
        let info = Info {
            driver: DRIVER,
            site: Site::Dimm(Arc::clone(&site)),
            face: Face::Plain,
            slot: Some(slot),
            uses: vec![object],
            announced: Announced::Now,
        };
        let identity: Identity = self.identity(id);
        let model = Box::new(DimmModel(site));
        let plugged = self.tree.borrow_mut().plug(
            None,
            identity,
            model,
            Some(Arc::clone(&eject)),
            info,
            self.local.now(),
        );
        match plugged {
            Ok(node) => {
                self.ejector.occupy(key, &eject, node, None);
                Ok(node)
            }
            // The id was free when this began, and nothing was awaited since.
            Err((error, _model)) => Err(super::plug_error(&error)),
        }
    }

    /// The DIMMs, with their memory.
    pub(crate) fn dimm_sites(&self) -> Vec<Arc<DimmSite>> {
        let tree = self.tree.borrow();
        let site = |node: &ebbtide_device::Node<Info>| match &node.info.site {
            Site::Dimm(site) => Some(Arc::clone(site)),
            Site::Pci { .. } | Site::Below => None,
        };
        tree.iter().filter_map(|(_, node)| site(node)).collect()
    }

    /// The DIMMs, in the order of their addresses.
    pub(crate) fn dimm_infos(&self) -> Vec<DimmInfo> {
        let tree = self.tree.borrow();
        let mut infos: Vec<DimmInfo> = tree
            .iter()
            .filter_map(|(_, node)| match &node.info.site {
                Site::Dimm(site) => Some(site.info().clone()),
                _ => None,
            })
            .collect();
        infos.sort_by_key(|info| info.addr);
        infos
    }
}

fn spec(
    id: &str,
    policy: GuestEject,
    properties: &mut Properties,
    cold: bool,
) -> Result<(String, DimmSpec), QmpError> {
    let memdev = properties
        .take_string("memdev")?
        .ok_or_else(|| QmpError::generic("'memdev' property is not set"))?;
    let node = properties.take_uint::<u32>("node")?.unwrap_or(0);
    if node != 0 {
        return Err(QmpError::property_value(DRIVER, "node", &node.to_string()));
    }
    // -1 and 0 are "any" to clients that write what they mean by leaving it out.
    let slot = match properties.take_int("slot")? {
        None | Some(-1) => None,
        Some(slot) => Some(
            u16::try_from(slot)
                .map_err(|_| QmpError::property_value(DRIVER, "slot", &slot.to_string()))?,
        ),
    };
    let addr = properties.take_size("addr")?.filter(|addr| *addr != 0);
    let spec = DimmSpec {
        id: id.to_owned(),
        memdev: memdev.clone(),
        node,
        slot,
        addr,
        guest_eject: match policy {
            GuestEject::On => RegisterPolicy::On,
            GuestEject::Off => RegisterPolicy::Off,
            GuestEject::Requested => RegisterPolicy::Requested,
        },
        arrival: if cold { Arrival::AtBoot } else { Arrival::Hot },
    };
    Ok((memdev, spec))
}

/// `_OST`'s event number of an eject request, and its status "in progress" (ACPI 6.5, 6.3.5).
const EJECT_REQUEST: u32 = 3;
const IN_PROGRESS: u32 = 0x84;

impl Devices {
    /// The guest has said something about a DIMM slot.
    pub(super) fn report(&self, report: &OstReport, is_told: bool) {
        self.ost.borrow_mut().insert(report.slot, *report);
        let working = (report.source, report.status) == (EJECT_REQUEST, IN_PROGRESS);
        let node = self.dimm_in(report.slot).map(|(node, _)| node);
        if let Some(node) = node.filter(|_| working) {
            self.tree.borrow_mut().guest_works(node, self.local.now());
        }
        if is_told {
            self.emit(events::ACPI_DEVICE_OST.with(AcpiDeviceOst {
                info: self.ost_info(report),
            }));
        }
    }

    fn dimm_in(&self, slot: u16) -> Option<(NodeId, String)> {
        let tree = self.tree.borrow();
        tree.iter().find_map(|(id, node)| match &node.info.site {
            Site::Dimm(site) if site.info().slot == slot => Some((id, site.info().id.clone())),
            _ => None,
        })
    }

    fn ost_info(&self, report: &OstReport) -> AcpiOstInfo {
        AcpiOstInfo {
            device: self.dimm_in(report.slot).map(|(_, id)| id),
            slot: report.slot.to_string(),
            slot_type: AcpiSlotType::Dimm,
            source: report.source.into(),
            status: report.status.into(),
        }
    }

    /// What guests have said last about each DIMM slot.
    pub(crate) fn ospm_status(&self) -> Vec<AcpiOstInfo> {
        let slots = self.dimms().map_or(0, |bank| bank.registers().slots());
        let last = |slot: u16| {
            let said = self.ost.borrow().get(&slot).copied();
            said.unwrap_or(OstReport {
                slot,
                source: 0,
                status: 0,
            })
        };
        (0..slots).map(|slot| self.ost_info(&last(slot))).collect()
    }
}
