// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which backend a device has. Of the server's answers only that is read: other servers tell more, or less, of the rest.

use ebbtide_qmp::Error;
use ebbtide_qmp::commands::{QOM_GET, QOM_LIST, QUERY_BLOCK, QUERY_MEMORY_DEVICES};
use serde_json::{Value, json};

use super::super::backend::Backend;
use super::super::{Failure, Session};

/// The backend of a device.
pub(super) enum Behind {
    /// The device has it, and nobody else.
    Known(Backend),
    /// What it would be called, had it been made here.
    Guessed(Backend),
}

impl Behind {
    pub(super) fn backend(&self) -> &Backend {
        match self {
            Self::Known(backend) | Self::Guessed(backend) => backend,
        }
    }
}

/// Of any device: memory, if it is a memory device whose backend is named after it. Another name is somebody's own
/// choice, and so is what becomes of it.
pub(super) fn of_memory(session: &mut Session<'_>, id: &str) -> Result<Behind, Failure> {
    let named = Backend::memory(id);
    let path = format!("/objects/{}", named.name());
    let devices = ask(session, QUERY_MEMORY_DEVICES.name(), Value::Null)?;
    let has = items(&devices).any(|device| {
        let data = device.get("data");
        let text = |name| data.and_then(|data| text(data, name));
        text("id") == Some(id) && text("memdev") == Some(&path)
    });
    Ok(match has {
        true => Behind::Known(named),
        false => Behind::Guessed(named),
    })
}

/// Of a disk: the node that is in it.
pub(super) fn of_disk(session: &mut Session<'_>, id: &str) -> Result<Behind, Failure> {
    let path = format!("/machine/peripheral/{id}");
    // QEMU names the part of the device that does the work.
    let below = format!("{path}/");
    let disks = ask(session, QUERY_BLOCK.name(), Value::Null)?;
    let node = items(&disks).find_map(|disk| {
        let qdev = text(disk, "qdev")?;
        let same = qdev == id || qdev == path || qdev.starts_with(&below);
        let inserted = disk.get("inserted").filter(|_| same)?;
        text(inserted, "node-name").map(str::to_owned)
    });
    if let Some(node) = node {
        return Ok(Behind::Known(Backend::Node(node)));
    }
    refuse_without(session, id, "drive", "disk")?;
    Ok(Behind::Guessed(Backend::node(id)))
}

/// Of a network device: what its property says.
pub(super) fn of_net(session: &mut Session<'_>, id: &str) -> Result<Behind, Failure> {
    let path = format!("/machine/peripheral/{id}");
    let arguments = json!({"path": path, "property": "netdev"});
    let netdev = ask(session, QOM_GET.name(), arguments)?;
    if let Some(netdev) = netdev.as_str().filter(|netdev| !netdev.is_empty()) {
        return Ok(Behind::Known(Backend::Network(netdev.to_owned())));
    }
    refuse_without(session, id, "netdev", "network device")?;
    Ok(Behind::Guessed(Backend::network(id)))
}

/// Whoever means a disk is not to lose a port with all that is behind it: refuses a device that is there and lacks the
/// property that names the backend of its kind.
fn refuse_without(
    session: &mut Session<'_>,
    id: &str,
    property: &str,
    kind: &str,
) -> Result<(), Failure> {
    let path = format!("/machine/peripheral/{id}");
    let properties = ask(session, QOM_LIST.name(), json!({ "path": path }))?;
    let mut names = items(&properties).filter_map(|property| text(property, "name"));
    if properties.is_null() || names.any(|name| name == property) {
        return Ok(());
    }
    let arguments = json!({"path": path, "property": "type"});
    let model = ask(session, QOM_GET.name(), arguments)?;
    let model = model.as_str().unwrap_or("another device");
    Err(Failure::Remove(format!(
        "{id} is no {kind}: it is a {model}; `unplug {id}` removes whatever it is"
    )))
}

/// A question whose refusal means that there is nothing to know.
fn ask(session: &mut Session<'_>, command: &str, arguments: Value) -> Result<Value, Failure> {
    match session.client.execute(command, arguments) {
        Ok(answer) => Ok(answer),
        Err(Error::Command { .. }) => Ok(Value::Null),
        Err(error) => Err(error.into()),
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text<'v>(value: &'v Value, name: &str) -> Option<&'v str> {
    value.get(name)?.as_str()
}
