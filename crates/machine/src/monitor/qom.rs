// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The object tree as QMP shows it: `/machine/peripheral/ID` are devices, `/objects/ID` memory
//! backends.

use std::rc::Rc;

use ebbtide_qmp::hmp::QomValue;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::qom::ObjectPropertyInfo;
use ebbtide_qmp::{CommandTable, ErrorClass, QmpError, commands};
use serde_json::{Value, json};

use crate::hotplug::{Face, MemoryObject, Site};
use crate::machine::{Machine, MemorySlot};

/// Adds the `qom-` commands to `table`.
pub(super) fn add(table: CommandTable<Machine>) -> CommandTable<Machine> {
    table
        .on(commands::QOM_LIST, async |m, _, args| list(&m, &args.path))
        .on(commands::QOM_GET, async |m, _, args| {
            get(&m, &args.path, &args.property)
        })
        .on(commands::QOM_SET, async |m, _, args| {
            resolve(&m, &args.path)?.set(&args.property, &args.value)
        })
}

/// Sets a property as people type it: sizes may have a suffix.
pub(super) fn set_typed(
    machine: &Machine,
    path: &str,
    property: &str,
    value: &QomValue,
) -> Result<Empty, QmpError> {
    let object = resolve(machine, path)?;
    let value = match (object.type_of(property).as_deref(), value) {
        (Some("size"), typed) => json!(typed.to_size(property)?),
        (_, QomValue::Json(value)) => value.clone(),
        (_, QomValue::Text(text)) => json!(text),
    };
    object.set(property, &value)
}

/// A property's value.
pub(super) fn get(machine: &Machine, path: &str, property: &str) -> Result<Value, QmpError> {
    resolve(machine, path)?.get(property)
}

/// The properties of an object.
pub(super) fn list(machine: &Machine, path: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    Ok(resolve(machine, path)?.properties())
}

/// Where what is no peripheral has its paths: vCPUs.
pub(super) const UNATTACHED: &str = "/machine/unattached";
const CPU: &str = "host-x86_64-cpu";

/// A node of the tree.
enum Object<'m> {
    Root,
    Machine,
    Unattached(&'m Machine),
    Cpu,
    Peripheral(&'m Machine),
    Objects(&'m Machine),
    Memory(&'m MemorySlot),
    Backend(&'m MemorySlot),
    Device(Device),
    Ram(Rc<MemoryObject>),
}

/// A device of the tree.
struct Device {
    driver: &'static str,
    /// The property that names what it stands on, and that.
    stands_on: Option<(&'static str, String)>,
}

impl Device {
    fn find(machine: &Machine, id: &str) -> Option<Device> {
        let tree = machine.devices.tree().borrow();
        let node = tree.get(tree.by_id(id)?)?;
        let stands_on = match &node.info.face {
            Face::Disk { node } => Some(("drive", node.clone())),
            Face::Net { netdev, .. } => Some(("netdev", netdev.clone())),
            _ => match &node.info.site {
                Site::Dimm(site) => Some(("memdev", format!("/objects/{}", site.info().memdev))),
                _ => None,
            },
        };
        Some(Device {
            driver: node.info.driver,
            stands_on,
        })
    }
}

/// Finds the object an absolute path, or the unambiguous end of one, names.
fn resolve<'m>(machine: &'m Machine, path: &str) -> Result<Object<'m>, QmpError> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let slots = machine.memory_slots();
    let device = |id: &str| {
        let slot = slots.iter().find(|s| s.config.id == id);
        slot.map(Object::Memory)
            .or_else(|| Device::find(machine, id).map(Object::Device))
    };
    let backend = |id: &str| {
        let slot = slots.iter().find(|s| s.config.memdev == id);
        let object = || machine.devices.memory_objects().get(id);
        slot.map(Object::Backend)
            .or_else(|| object().map(Object::Ram))
    };
    let found = match (path.starts_with('/'), parts.as_slice()) {
        (true, []) => Some(Object::Root),
        (_, ["machine"]) => Some(Object::Machine),
        (true, ["machine", "peripheral"]) | (false, ["peripheral"]) => {
            Some(Object::Peripheral(machine))
        }
        (_, ["objects"]) => Some(Object::Objects(machine)),
        (true, ["machine", "unattached"]) | (false, ["unattached"]) => {
            Some(Object::Unattached(machine))
        }
        (true, ["machine", "unattached", name]) | (false, ["unattached", name]) => {
            let is_it = |index: &u64| format!("device[{index}]") == *name;
            (0..machine.vcpus()).find(is_it).map(|_| Object::Cpu)
        }
        (true, ["machine", "peripheral", id]) | (false, ["peripheral", id]) => device(id),
        (_, ["objects", id]) => backend(id),
        (false, [id]) => device(id).or_else(|| backend(id)),
        _ => None,
    };
    found.ok_or_else(|| QmpError::device_not_found(path))
}

impl Object<'_> {
    fn type_name(&self) -> &str {
        match self {
            Object::Root | Object::Peripheral(_) | Object::Unattached(_) | Object::Objects(_) => {
                "container"
            }
            Object::Cpu => CPU,
            Object::Machine => "ebbtide-machine",
            Object::Memory(_) => "virtio-mem-pci",
            Object::Backend(slot) => slot.backend_type(),
            Object::Device(device) => device.driver,
            Object::Ram(object) => object.qom_type(),
        }
    }

    fn properties(&self) -> Vec<ObjectPropertyInfo> {
        let mut list = vec![ObjectPropertyInfo::new("type", "string")];
        let mut add = |name: &str, kind: &str| list.push(ObjectPropertyInfo::new(name, kind));
        match self {
            Object::Root => {
                add("machine", "child<ebbtide-machine>");
                add("objects", "child<container>");
            }
            Object::Machine => {
                add("peripheral", "child<container>");
                add("unattached", "child<container>");
            }
            Object::Unattached(machine) => {
                for index in 0..machine.vcpus() {
                    add(&format!("device[{index}]"), &format!("child<{CPU}>"));
                }
            }
            Object::Cpu => {}
            Object::Peripheral(machine) => {
                let tree = machine.devices.tree().borrow();
                for (_, node) in tree.iter() {
                    if let Some(id) = &node.identity.id {
                        add(id, &format!("child<{}>", node.info.driver));
                    }
                }
            }
            Object::Objects(machine) => {
                for slot in machine.memory_slots() {
                    add(
                        &slot.config.memdev,
                        &format!("child<{}>", slot.backend_type()),
                    );
                }
                for (id, object, _) in machine.devices.memory_objects().list() {
                    add(&id, &format!("child<{}>", object.qom_type()));
                }
            }
            Object::Memory(_) => {
                add("requested-size", "size");
                add("size", "size");
                add("block-size", "size");
                add("memaddr", "uint64");
                add("node", "uint32");
                add("memdev", "link<memory-backend>");
                add("prealloc", "bool");
            }
            Object::Backend(_) | Object::Ram(_) => add("size", "int"),
            Object::Device(device) => {
                if let Some((name, _)) = &device.stands_on {
                    add(name, "str");
                }
            }
        }
        list
    }

    /// The declared type of a property, if there is one of this name.
    fn type_of(&self, property: &str) -> Option<String> {
        let found = self.properties().into_iter().find(|p| p.name == property);
        found.map(|p| p.type_name)
    }

    fn get(&self, property: &str) -> Result<Value, QmpError> {
        if property == "type" {
            return Ok(json!(self.type_name()));
        }
        let value = match self {
            Object::Memory(slot) => memory_property(slot, property),
            Object::Backend(slot) if property == "size" => Some(json!(slot.config.size_bytes)),
            Object::Ram(object) if property == "size" => Some(json!(object.size_bytes())),
            Object::Device(device) => match &device.stands_on {
                Some((name, value)) if *name == property => Some(json!(value)),
                _ => None,
            },
            _ => None,
        };
        match value {
            Some(value) => Ok(value),
            None if self.properties().iter().any(|p| p.name == property) => {
                // A child or link: QMP gives its path.
                Ok(json!(self.child_path(property)))
            }
            None => Err(QmpError::property_not_found(self.type_name(), property)),
        }
    }

    fn child_path(&self, property: &str) -> String {
        match self {
            Object::Machine => format!("/machine/{property}"),
            Object::Peripheral(_) => format!("/machine/peripheral/{property}"),
            Object::Unattached(_) => format!("{UNATTACHED}/{property}"),
            Object::Objects(_) => format!("/objects/{property}"),
            _ => format!("/{property}"),
        }
    }

    fn set(&self, property: &str, value: &Value) -> Result<Empty, QmpError> {
        match (self, property) {
            (Object::Memory(slot), "requested-size") => {
                let bytes = value.as_u64().ok_or_else(|| {
                    QmpError::generic(format!(
                        "Invalid parameter type for '{property}', expected: uint64"
                    ))
                })?;
                slot.set_requested(bytes)
                    .map_err(|e| QmpError::generic(e.to_string()))?;
                Ok(Empty {})
            }
            _ if self.properties().iter().any(|p| p.name == property) => Err(QmpError::new(
                ErrorClass::GenericError,
                format!("Property '{}.{property}' is not writable", self.type_name()),
            )),
            _ => Err(QmpError::property_not_found(self.type_name(), property)),
        }
    }
}

fn memory_property(slot: &MemorySlot, property: &str) -> Option<Value> {
    let status = slot.status();
    match property {
        "requested-size" => Some(json!(status.requested_bytes)),
        "size" => Some(json!(status.plugged_bytes)),
        "block-size" => Some(json!(slot.config.block_size_bytes)),
        "memaddr" => Some(json!(slot.range.start)),
        "node" => Some(json!(slot.config.node)),
        "memdev" => Some(json!(format!("/objects/{}", slot.config.memdev))),
        "prealloc" => Some(json!(slot.config.prefault)),
        _ => None,
    }
}
