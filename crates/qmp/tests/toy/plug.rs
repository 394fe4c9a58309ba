// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The toy's devices that come and go: disks, DIMMs and network devices on backends, and a guest that lets go of them,
//! refuses, or says nothing.

use std::cell::{Ref, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use ebbtide_qmp::commands::*;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::acpi::{AcpiDeviceOst, AcpiOstInfo, AcpiSlotType};
use ebbtide_qmp::types::block::{
    BlockDeviceInfo, BlockInfo, BlockdevCacheInfo, BlockdevDetectZeroes, BlockdevOptions, ImageInfo,
};
use ebbtide_qmp::types::device::{DeviceAdd, DevicePath};
use ebbtide_qmp::types::ebbtide::{Removal, RemovalHolder, RemovalPhase, RemovalStep};
use ebbtide_qmp::types::events;
use ebbtide_qmp::types::memory::{MemoryDeviceInfo, PcDimmDeviceInfo};
use ebbtide_qmp::types::qom::{ObjectAdd, ObjectPropertyInfo};
use ebbtide_qmp::{CommandTable, QmpError};
use serde_json::Value;

use super::Toy;

/// What the guest does when it is asked to let go.
#[derive(Debug, Clone, Copy)]
pub enum Guest {
    /// It lets go after some time; the device's requests take some more.
    LetsGo { after: Duration, drain: Duration },
    /// It says no, with this `_OST` status.
    Refuses { status: i64 },
    /// Nothing.
    Silent,
}

impl Default for Guest {
    fn default() -> Self {
        Self::LetsGo {
            after: Duration::from_millis(20),
            drain: Duration::from_millis(20),
        }
    }
}

/// A backend; names of one kind are unique.
#[derive(Debug, Clone, PartialEq)]
struct Backend {
    kind: &'static str,
    name: String,
    size: u64,
}

struct Device {
    id: String,
    driver: String,
    backend: Backend,
    removal: Option<Under>,
}

/// A removal under way.
struct Under {
    since: Instant,
    history: Vec<RemovalStep>,
}

impl Under {
    fn phase(&self) -> RemovalPhase {
        self.history
            .last()
            .map_or(RemovalPhase::Plugged, |step| step.phase)
    }

    fn enter(&mut self, now: Instant, phase: RemovalPhase) {
        let ms = now.duration_since(self.since).as_millis() as u64;
        self.history.push(RemovalStep { phase, ms });
    }
}

/// What is plugged in, and what could be.
#[derive(Default)]
pub struct Plugged {
    backends: RefCell<Vec<Backend>>,
    devices: RefCell<Vec<Device>>,
}

fn id_of(path: &str) -> &str {
    path.strip_prefix("/machine/peripheral/").unwrap_or(path)
}

fn path_of(id: &str) -> String {
    format!("/machine/peripheral/{id}")
}

impl Plugged {
    fn find(&self, path: &str) -> Option<Ref<'_, Device>> {
        let found = |devices: &Vec<Device>| devices.iter().position(|d| d.id == id_of(path));
        let index = found(&self.devices.borrow())?;
        Some(Ref::map(self.devices.borrow(), |devices| &devices[index]))
    }

    pub fn has(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    /// The property that names the backend of the device at `path`.
    pub fn property(&self, path: &str) -> Option<ObjectPropertyInfo> {
        let id = path.strip_prefix("/machine/peripheral/").unwrap_or(path);
        let devices = self.devices.borrow();
        let device = devices.iter().find(|device| device.id == id)?;
        let property = match device.backend.kind {
            "node" => "drive",
            "object" => "memdev",
            kind => kind,
        };
        Some(ObjectPropertyInfo::new(property, "str"))
    }

    pub fn children(&self) -> Vec<ObjectPropertyInfo> {
        let child = |device: &Device| {
            ObjectPropertyInfo::new(device.id.as_str(), format!("child<{}>", device.driver))
        };
        self.devices.borrow().iter().map(child).collect()
    }

    pub fn get(&self, path: &str, property: &str) -> Option<Result<Value, QmpError>> {
        let device = self.find(path)?;
        Some(match property {
            "type" => Ok(device.driver.as_str().into()),
            "netdev" if device.backend.kind == "netdev" => Ok(device.backend.name.as_str().into()),
            _ => Err(QmpError::property_not_found(&device.driver, property)),
        })
    }

    pub fn dimms(&self) -> Vec<MemoryDeviceInfo> {
        let devices = self.devices.borrow();
        let dimms = devices.iter().filter(|device| device.driver == "pc-dimm");
        let info = |device: &Device| {
            MemoryDeviceInfo::Dimm(PcDimmDeviceInfo {
                id: Some(device.id.clone()),
                addr: 8 << 32,
                size: device.backend.size as i64,
                slot: 0,
                node: 0,
                memdev: format!("/objects/{}", device.backend.name),
                hotplugged: true,
                hotpluggable: true,
            })
        };
        dimms.map(info).collect()
    }

    fn make(&self, kind: &'static str, name: String, size: u64) -> Result<Empty, QmpError> {
        let mut backends = self.backends.borrow_mut();
        if backends.iter().any(|b| b.kind == kind && b.name == name) {
            return Err(match kind {
                "object" => QmpError::duplicate_object_id(&name),
                "node" => QmpError::duplicate_node(&name),
                _ => QmpError::duplicate_netdev(&name),
            });
        }
        backends.push(Backend { kind, name, size });
        Ok(Empty {})
    }

    fn close(&self, kind: &'static str, name: &str) -> Result<Empty, QmpError> {
        let is_it = |backend: &Backend| backend.kind == kind && backend.name == name;
        let used = self.devices.borrow().iter().any(|d| is_it(&d.backend));
        let mut backends = self.backends.borrow_mut();
        match (backends.iter().position(is_it), kind) {
            (Some(_), "object") if used => Err(QmpError::object_in_use(name)),
            (Some(_), "node") if used => Err(QmpError::node_in_use(name)),
            (Some(index), _) => {
                backends.remove(index);
                Ok(Empty {})
            }
            (None, "object") => Err(QmpError::object_not_found(name)),
            (None, "node") => Err(QmpError::node_not_found(name)),
            (None, _) => Err(QmpError::device_not_found(name)),
        }
    }

    fn plug(&self, device: DeviceAdd, taken: impl Fn(&str) -> bool) -> Result<Empty, QmpError> {
        let DeviceAdd {
            driver,
            bus: _,
            id,
            mut properties,
        } = device;
        let (kind, property) = match driver.as_str() {
            "virtio-blk-pci" => ("node", "drive"),
            "pc-dimm" => ("object", "memdev"),
            "virtio-net-pci" => ("netdev", "netdev"),
            _ => return Err(QmpError::invalid_driver(&driver)),
        };
        let id = id.ok_or_else(|| QmpError::missing_parameter("id"))?;
        if taken(&id) || self.has(&id) {
            return Err(QmpError::duplicate_device_id(&id));
        }
        let name = properties.need_string(property)?;
        let backends = self.backends.borrow();
        let backend = backends.iter().find(|b| b.kind == kind && b.name == name);
        let backend = backend
            .cloned()
            .ok_or_else(|| QmpError::no_such_backend(&driver, property, &name))?;
        properties.take_string("serial")?;
        properties.take_string("mac")?;
        if properties
            .take_uint::<u32>("node")?
            .is_some_and(|node| node > 0)
        {
            return Err(QmpError::generic("this machine has node 0 only"));
        }
        properties.finish_device(&driver)?;
        self.devices.borrow_mut().push(Device {
            id,
            driver,
            backend,
            removal: None,
        });
        Ok(Empty {})
    }

    fn disks(&self) -> Vec<BlockInfo> {
        let devices = self.devices.borrow();
        let disks = devices.iter().filter(|d| d.driver == "virtio-blk-pci");
        let cache = BlockdevCacheInfo {
            writeback: true,
            direct: false,
            no_flush: false,
        };
        let info = |device: &Device| {
            let image = ImageInfo {
                filename: "toy".into(),
                format: "raw".into(),
                actual_size: None,
                virtual_size: 0,
            };
            let name = Some(device.backend.name.clone());
            let node = BlockDeviceInfo::new(name, image, false, cache, BlockdevDetectZeroes::Off);
            BlockInfo::fixed(path_of(&device.id), node)
        };
        disks.map(info).collect()
    }

    fn removals(&self, now: Instant) -> Vec<Removal> {
        let one = |device: &Device| {
            let under = device.removal.as_ref()?;
            let age_ms = now.duration_since(under.since).as_millis() as u64;
            let holders = match under.phase() {
                RemovalPhase::Draining => vec![RemovalHolder {
                    what: "1 request".into(),
                    age_ms: Some(age_ms),
                }],
                _ => Vec::new(),
            };
            Some(Removal {
                id: Some(device.id.clone()),
                path: path_of(&device.id),
                phase: under.phase(),
                age_ms,
                holders,
                history: under.history.clone(),
            })
        };
        self.devices.borrow().iter().filter_map(one).collect()
    }
}

impl Toy {
    fn ask_guest(self: Rc<Self>, path: &str) -> Result<Empty, QmpError> {
        let mut devices = self.plugged.devices.borrow_mut();
        let found = devices.iter_mut().find(|device| device.id == id_of(path));
        let device = found.ok_or_else(|| QmpError::device_not_found(path))?;
        if device.removal.is_some() {
            return Err(QmpError::unplug_pending(&device.id));
        }
        let now = self.local.now();
        let under = device.removal.insert(Under {
            since: now,
            history: Vec::new(),
        });
        under.enter(now, RemovalPhase::Requested);
        let answer = answer(Rc::downgrade(&self), self.config.guest, device.id.clone());
        self.local.spawn(answer).detach();
        Ok(Empty {})
    }

    /// False when the removal is over, one way or another.
    fn enter(&self, id: &str, phase: RemovalPhase) -> bool {
        let mut devices = self.plugged.devices.borrow_mut();
        let device = devices.iter_mut().find(|device| device.id == id);
        match device.and_then(|device| device.removal.as_mut()) {
            Some(under) => {
                under.enter(self.local.now(), phase);
                true
            }
            None => false,
        }
    }

    fn withdraw(&self, path: &str) -> Result<Empty, QmpError> {
        let mut devices = self.plugged.devices.borrow_mut();
        let device = devices.iter_mut().find(|device| device.id == id_of(path));
        let device = device.ok_or_else(|| QmpError::device_not_found(path))?;
        device.removal = None;
        let (device, path) = (Some(device.id.clone()), path_of(&device.id));
        self.events
            .emit(events::DEVICE_UNPLUG_GUEST_ERROR.with(DevicePath { device, path }));
        Ok(Empty {})
    }

    fn delete(&self, path: &str) -> Result<Empty, QmpError> {
        let mut devices = self.plugged.devices.borrow_mut();
        let at = devices.iter().position(|device| device.id == id_of(path));
        let device = devices.remove(at.ok_or_else(|| QmpError::device_not_found(path))?);
        let path = path_of(&device.id);
        // As QEMU tells it: a part of the device first.
        for (device, path) in [
            (None, format!("{path}/virtio-backend")),
            (Some(device.id), path),
        ] {
            self.events
                .emit(events::DEVICE_DELETED.with(DevicePath { device, path }));
        }
        Ok(Empty {})
    }

    fn refuse(&self, id: &str, status: i64) {
        let info = AcpiOstInfo {
            device: Some(id.to_owned()),
            slot: "0".into(),
            slot_type: AcpiSlotType::Dimm,
            source: 3,
            status,
        };
        self.events
            .emit(events::ACPI_DEVICE_OST.with(AcpiDeviceOst { info }));
        // It may have gone meanwhile.
        let _ = self.withdraw(id);
    }
}

async fn answer(toy: Weak<Toy>, guest: Guest, id: String) {
    let Some(local) = toy.upgrade().map(|toy| toy.local.clone()) else {
        return;
    };
    match guest {
        Guest::Silent => {}
        Guest::Refuses { status } => {
            local.sleep(Duration::from_millis(20)).await;
            if let Some(toy) = toy.upgrade() {
                toy.refuse(&id, status);
            }
        }
        Guest::LetsGo { after, drain } => {
            local.sleep(after).await;
            let goes = toy
                .upgrade()
                .is_some_and(|toy| toy.enter(&id, RemovalPhase::Draining));
            if goes {
                local.sleep(drain).await;
                if let Some(toy) = toy.upgrade() {
                    // Forced meanwhile: it is gone already.
                    let _ = toy.delete(&id);
                }
            }
        }
    }
}

/// The commands about devices that come and go.
pub fn add(table: CommandTable<Toy>) -> CommandTable<Toy> {
    table
        .on(OBJECT_ADD, async |toy, _, object: ObjectAdd| {
            let ObjectAdd {
                qom_type,
                id,
                mut properties,
            } = object;
            if !qom_type.starts_with("memory-backend-") {
                return Err(QmpError::invalid_object_type(&qom_type));
            }
            let size = properties.need_size("size")?;
            properties.take_string("mem-path")?;
            properties.take_bool("share")?;
            properties.finish()?;
            toy.plugged.make("object", id, size)
        })
        .on(OBJECT_DEL, async |toy, _, args| {
            toy.plugged.close("object", &args.id)
        })
        .on(BLOCKDEV_ADD, async |toy, _, mut node: BlockdevOptions| {
            node.take_source()?;
            let name = node.node_name.ok_or_else(QmpError::unnamed_node)?;
            toy.plugged.make("node", name, 0)
        })
        .on(BLOCKDEV_DEL, async |toy, _, args| {
            toy.plugged.close("node", &args.node_name)
        })
        .on(NETDEV_ADD, async |toy, _, args| match args.kind.as_str() {
            "tap" | "passt" => toy.plugged.make("netdev", args.id, 0),
            other => Err(QmpError::invalid_value("type", other)),
        })
        .on(NETDEV_DEL, async |toy, _, args| {
            toy.plugged.close("netdev", &args.id)
        })
        .on(QUERY_BLOCK, async |toy, _, Empty {}| {
            Ok(toy.plugged.disks())
        })
        .on(DEVICE_ADD, async |toy, _, device| {
            let taken = |id: &str| toy.devices.iter().any(|device| device.config.id == id);
            toy.plugged.plug(device, taken)
        })
        .on(DEVICE_DEL, async |toy, _, args| toy.ask_guest(&args.id))
        .on(EBBTIDE_QUERY_REMOVALS, async |toy, _, Empty {}| {
            match toy.config.without_removals {
                true => Err(QmpError::command_not_found(EBBTIDE_QUERY_REMOVALS.name())),
                false => Ok(toy.plugged.removals(toy.local.now())),
            }
        })
        .on(EBBTIDE_DEVICE_FORCE, async |toy, _, args| {
            toy.delete(&args.id)
        })
        .on(EBBTIDE_DEVICE_CANCEL, async |toy, _, args| {
            toy.withdraw(&args.id)
        })
}
