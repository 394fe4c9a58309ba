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
