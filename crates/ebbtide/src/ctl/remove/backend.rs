// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which backend a device has.

use ebbtide_qmp::commands::{QOM_GET, QUERY_BLOCK, QUERY_MEMORY_DEVICES};
use ebbtide_qmp::schema::{Command, Empty, Qapi};
use ebbtide_qmp::types::memory::MemoryDeviceInfo;
use ebbtide_qmp::types::qom::QomGet;
use ebbtide_qmp::{Error, ErrorClass};

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
    let devices = ask(session, &QUERY_MEMORY_DEVICES, Empty {})?.unwrap_or_default();
    let has = devices.iter().any(|device| {
        let (found, memdev) = match device {
            MemoryDeviceInfo::Dimm(dimm) => (&dimm.id, &dimm.memdev),
            MemoryDeviceInfo::VirtioMem(device) => (&device.id, &device.memdev),
        };
        found.as_deref() == Some(id) && *memdev == path
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
    let disks = ask(session, &QUERY_BLOCK, Empty {})?.unwrap_or_default();
    let node = disks.into_iter().find_map(|disk| {
        let qdev = disk.qdev?;
        let same = qdev == id || qdev == path || qdev.starts_with(&below);
        disk.inserted.filter(|_| same)?.node_name
    });
    Ok(match node {
        Some(node) => Behind::Known(Backend::Node(node)),
        None => Behind::Guessed(Backend::node(id)),
    })
}

/// Of a network device: what its property says.
pub(super) fn of_net(session: &mut Session<'_>, id: &str) -> Result<Behind, Failure> {
    let arguments = QomGet {
        path: format!("/machine/peripheral/{id}"),
        property: "netdev".to_owned(),
    };
    let netdev = ask(session, &QOM_GET, arguments)?;
    Ok(match netdev.as_ref().and_then(|value| value.as_str()) {
        Some(netdev) if !netdev.is_empty() => Behind::Known(Backend::Network(netdev.to_owned())),
        _ => Behind::Guessed(Backend::network(id)),
    })
}

/// A question whose refusal means that there is nothing to know.
fn ask<A: Qapi, R: Qapi>(
    session: &mut Session<'_>,
    command: &Command<A, R>,
    arguments: A,
) -> Result<Option<R>, Failure> {
    match session.client.call(command, arguments) {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Command { error, .. })
            if matches!(
                error.class,
                ErrorClass::CommandNotFound | ErrorClass::DeviceNotFound | ErrorClass::GenericError
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
