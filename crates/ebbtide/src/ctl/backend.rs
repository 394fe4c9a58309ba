// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What stands behind a device and is made before it and closed after it: memory, a disk's medium, a network.
//!
//! A device and its backend have names of their own. Those made here are named after the device, so that whoever removes
//! the device finds its backend, also when the device is gone already.

use std::fmt;

use ebbtide_qmp::client::Client;
use ebbtide_qmp::commands::{BLOCKDEV_DEL, NETDEV_DEL, OBJECT_DEL};
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::block::BlockdevDel;
use ebbtide_qmp::types::net::NetdevDel;
use ebbtide_qmp::types::qom::ObjectDel;
use ebbtide_qmp::{Error, QmpError};

/// The name of a backend, by its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backend {
    Memory(String),
    Node(String),
    Network(String),
}

impl Backend {
    /// The memory behind the device `id`, by the name it gets here.
    pub(super) fn memory(id: &str) -> Self {
        Self::Memory(format!("mem-{id}"))
    }

    /// The medium of the disk `id`, by the name it gets here.
    pub(super) fn node(id: &str) -> Self {
        Self::Node(format!("node-{id}"))
    }

    /// The network of the device `id`, by the name it gets here.
    pub(super) fn network(id: &str) -> Self {
        Self::Network(format!("net-{id}"))
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Self::Memory(name) | Self::Node(name) | Self::Network(name) => name,
        }
    }

    /// What a server says that has one of this name already.
    pub(super) fn is_there_already(&self) -> QmpError {
        match self {
            Self::Memory(name) => QmpError::duplicate_object_id(name),
            Self::Node(name) => QmpError::duplicate_node(name),
            Self::Network(name) => QmpError::duplicate_netdev(name),
        }
    }

    /// Closes it. The server refuses that while something uses it.
    pub(super) fn close(&self, client: &mut Client) -> Result<(), Error> {
        let name = self.name().to_owned();
        let Empty {} = match self {
            Self::Memory(_) => client.call(&OBJECT_DEL, ObjectDel { id: name }),
            Self::Node(_) => client.call(&BLOCKDEV_DEL, BlockdevDel { node_name: name }),
            Self::Network(_) => client.call(&NETDEV_DEL, NetdevDel { id: name }),
        }?;
        Ok(())
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Memory(_) => "memory",
            Self::Node(_) => "block node",
            Self::Network(_) => "network backend",
        };
        write!(f, "{kind} {}", self.name())
    }
}
