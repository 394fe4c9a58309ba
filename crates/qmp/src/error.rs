// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong: [`QmpError`] is an answer on the wire, [`Error`] is a failure of the crate itself.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The `class` of an error answer, as QMP spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// The command does not exist, or may not be used before or after the negotiation.
    CommandNotFound,
    /// The named device or object path does not exist.
    DeviceNotFound,
    /// The named device exists and is not active.
    DeviceNotActive,
    /// The command needs a KVM capability this host lacks.
    KVMMissingCap,
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// An error answer: `{"class": …, "desc": …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{class}: {desc}")]
pub struct QmpError {
    /// What kind of error it is; programs look at this.
    pub class: ErrorClass,
    /// What happened, for people.
    pub desc: String,
}

impl QmpError {
    /// An error of the given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self {
            class,
            desc: desc.into(),
        }
    }

    /// A `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// The answer to a command nobody knows.
    pub fn command_not_found(command: &str) -> Self {
        Self::new(
            ErrorClass::CommandNotFound,
            format!("The command {command} has not been found"),
        )
    }

    /// The answer when `device` (an id or an object path) does not exist.
    pub fn device_not_found(device: &str) -> Self {
        Self::new(
            ErrorClass::DeviceNotFound,
            format!("Device '{device}' not found"),
        )
    }

    /// The answer when an object of type `type_name` has no property `property`.
    pub fn property_not_found(type_name: &str, property: &str) -> Self {
        Self::generic(format!("Property '{type_name}.{property}' not found"))
    }

    /// The answer when a parameter is not there.
    pub fn missing_parameter(name: &str) -> Self {
        Self::generic(format!("Parameter '{name}' is missing"))
    }

    /// The answer when a parameter has a value of another JSON type.
    pub fn invalid_type(name: &str, expected: &str) -> Self {
        Self::generic(format!(
            "Invalid parameter type for '{name}', expected: {expected}"
        ))
    }

    /// The answer when a parameter has a value it does not take.
    pub fn invalid_value(name: &str, value: &str) -> Self {
        Self::generic(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    /// The answer when a property of a device or object has a value it does not take.
    pub fn property_value(type_name: &str, property: &str, value: &str) -> Self {
        Self::generic(format!(
            "Property '{type_name}.{property}' doesn't take value '{value}'"
        ))
    }

    /// The answer when a property can only be read.
    pub fn property_not_writable(type_name: &str, property: &str) -> Self {
        Self::generic(format!("Property '{type_name}.{property}' is not writable"))
    }

    /// The answer to `device_add` when the id is taken.
    pub fn duplicate_device_id(id: &str) -> Self {
        Self::generic(format!("Duplicate device ID '{id}'"))
    }

    /// The answer when a text cannot be an id: a letter, then letters, digits, `-`, `.`, `_`.
    pub fn invalid_id(name: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects an identifier"))
    }

    /// The answer when there is no device of this type.
    pub fn invalid_driver(driver: &str) -> Self {
        Self::generic(format!("'{driver}' is not a valid device model name"))
    }

    /// The answer when devices of this type are only made by the machine itself.
    pub fn not_pluggable() -> Self {
        Self::generic("Parameter 'driver' expects a pluggable device type")
    }

    /// The answer to `qom-list-properties` when there is no such type. `device-list-properties` answers
    /// [`QmpError::device_not_found`].
    pub fn class_not_found(type_name: &str) -> Self {
        Self::new(
            ErrorClass::DeviceNotFound,
            format!("Class '{type_name}' not found"),
        )
    }

    /// The answer when a device of this type cannot come or go while the machine runs.
    pub fn not_hotpluggable(driver: &str) -> Self {
        Self::generic(format!("Device '{driver}' does not support hotplugging"))
    }

    /// The answer when there is no such bus.
    pub fn bus_not_found(bus: &str) -> Self {
        Self::generic(format!("Bus '{bus}' not found"))
    }

    /// The answer when nothing can come or go on a bus while the machine runs.
    pub fn bus_not_hotpluggable(bus: &str) -> Self {
        Self::generic(format!("Bus '{bus}' does not support hotplugging"))
    }

    /// The answer when a device does not fit a bus; `bus_type` is such as `PCI`.
    pub fn bad_bus(driver: &str, bus_type: &str) -> Self {
        Self::generic(format!("Device '{driver}' can't go on {bus_type} bus"))
    }

    /// The answer when no bus for the device has room.
    pub fn no_bus(bus_type: &str, driver: &str) -> Self {
        Self::generic(format!("No '{bus_type}' bus found for device '{driver}'"))
    }

    /// The answer to `device_del` when the removal is under way.
    pub fn unplug_pending(id: &str) -> Self {
        Self::generic(format!("Device {id} is already in the process of unplug"))
    }

    /// The answer to `object-add` when there is no such type.
    pub fn invalid_object_type(qom_type: &str) -> Self {
        Self::generic(format!(
            "Parameter 'qom-type' does not accept value '{qom_type}'"
        ))
    }

    /// The answer to `object-add` when the id is taken.
    pub fn duplicate_object_id(id: &str) -> Self {
        Self::generic(format!(
            "attempt to add duplicate property '{id}' to object (type 'container')"
        ))
    }

    /// The answer to `object-del` when there is no such object.
    pub fn object_not_found(id: &str) -> Self {
        Self::generic(format!("object '{id}' not found"))
    }

    /// The answer to `object-del` when something uses the object.
    pub fn object_in_use(id: &str) -> Self {
        Self::generic(format!("object '{id}' is in use, can not be deleted"))
    }

    /// The answer when there is no such block node.
    pub fn node_not_found(node: &str) -> Self {
        Self::generic(format!("Failed to find node with node-name='{node}'"))
    }

    /// The answer when a property names a block node, network backend or character device that is not there. A memory
    /// backend that is not there is [`QmpError::device_not_found`].
    pub fn no_such_backend(type_name: &str, property: &str, value: &str) -> Self {
        Self::generic(format!(
            "Property '{type_name}.{property}' can't find value '{value}'"
        ))
    }

    /// The answer to `blockdev-add` when a node that is not a part of another has no name.
    pub fn unnamed_node() -> Self {
        Self::generic("'node-name' must be specified for the root node")
    }

    /// The answer to `blockdev-add` when the name is taken.
    pub fn duplicate_node(node: &str) -> Self {
        Self::generic(format!("Duplicate nodes with node-name='{node}'"))
    }

    /// The answer to `blockdev-del` when a device uses the node.
    pub fn node_in_use(node: &str) -> Self {
        Self::generic(format!("Node {node} is in use"))
    }

    /// The answer to `blockdev-del` when the node is a part of another.
    pub fn node_is_part(node: &str) -> Self {
        Self::generic(format!("Block device {node} is in use"))
    }

    /// The answer when something uses a block node; `role` is such as `file of 'disk0'`.
    pub fn node_busy(node: &str, role: &str) -> Self {
        Self::generic(format!("Node '{node}' is busy: node is used as {role}"))
    }

    /// The answer to `netdev_add` when the id is taken.
    pub fn duplicate_netdev(id: &str) -> Self {
        Self::generic(format!("Duplicate ID '{id}'"))
    }

    /// The answer to `netdev_del` when what has the id is no network backend.
    pub fn not_a_netdev(id: &str) -> Self {
        Self::generic(format!("Device '{id}' is not a netdev"))
    }

    /// The answer to `chardev-add` when the id is taken.
    pub fn duplicate_chardev(id: &str) -> Self {
        Self::generic(format!("Chardev with id '{id}' already exists"))
    }

    /// The answer when there is no such character device.
    pub fn chardev_not_found(id: &str) -> Self {
        Self::generic(format!("Chardev '{id}' not found"))
    }

    /// The answer to `chardev-remove` when a device uses it.
    pub fn chardev_busy(id: &str) -> Self {
        Self::generic(format!("Chardev '{id}' is busy"))
    }

    /// The answer to balloon commands when there is no balloon.
    pub fn no_balloon() -> Self {
        Self::new(
            ErrorClass::DeviceNotActive,
            "No balloon device has been activated",
        )
    }

    /// The answer to `device_add` and `device_del` while the machine migrates.
    pub fn migrating(command: &str) -> Self {
        Self::generic(format!("{command} not allowed while migrating"))
    }
}

/// A failure to listen on a socket, or to talk to a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A socket option (`unix:/path`) could not be understood.
    #[error("'{value}' is not a socket: {reason}; use unix:PATH, such as unix:/run/vm.qmp")]
    SocketSpec {
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process listens on the path.
    #[error("{}: another process listens on this socket", .path.display())]
    SocketInUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// The path exists and is not a socket, so it is left alone.
    #[error("{}: exists and is not a socket; it is left as it is", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("{}: cannot listen: {source}", .path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No connection to a server.
    #[error("{}: {}", .path.display(), connect_reason(.source))]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something answered, and not in QMP.
    #[error("{}: this is not a QMP server: {reason}", .path.display())]
    NotQmp {
        /// The socket's path.
        path: PathBuf,
        /// What came instead of a greeting.
        reason: String,
    },
    /// The server went away.
    #[error("{}: the server closed the connection", .path.display())]
    Closed {
        /// The socket's path.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("{}: the connection failed: {source}", .path.display())]
    Io {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No answer in time.
    #[error("{}: no answer to {what} within {} s", .path.display(), .limit.as_secs_f64())]
    TimedOut {
        /// The socket's path.
        path: PathBuf,
        /// What was asked for.
        what: String,
        /// How long the client waited.
        limit: Duration,
    },
    /// The server answered with an error.
    #[error("{command}: {error}")]
    Command {
        /// The command that failed.
        command: String,
        /// The server's answer.
        error: QmpError,
    },
    /// The server's answer is not what the command returns.
    #[error("{command}: cannot understand the answer: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A request that is not a QMP command object.
    #[error("not a QMP request: {reason}")]
    Request {
        /// What is wrong with it.
        reason: String,
    },
}

fn connect_reason(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::NotFound => "no such socket".to_owned(),
        io::ErrorKind::ConnectionRefused => "nothing listens on this socket".to_owned(),
        io::ErrorKind::PermissionDenied => "no permission to connect".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the server is too busy to accept a connection".to_owned()
        }
        _ => format!("cannot connect: {source}"),
    }
}
