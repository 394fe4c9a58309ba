// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why there is no network backend, or why it stays.

use std::io;
use std::path::PathBuf;

/// What can go wrong with a backend.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The name of a host interface is impossible.
    #[error(
        "netdev `{id}`: interface name `{name}` does not have 1 to 15 bytes without `/` and blanks"
    )]
    InterfaceName {
        /// The backend.
        id: String,
        /// The name.
        name: String,
    },
    /// A tap interface could not be had.
    #[error("netdev `{id}`: tap interface: {what}: {source}")]
    Tap {
        /// The backend.
        id: String,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptor is one of something else.
    #[error("netdev `{id}`: the descriptor given is no tap interface (flags {flags:#x})")]
    NotTap {
        /// The backend.
        id: String,
        /// The interface's flags, if it has any.
        flags: u16,
    },
    /// The socket could not be connected or used.
    #[error("netdev `{id}`: socket {}: {source}", path.display())]
    Socket {
        /// The backend.
        id: String,
        /// Its path; empty for one that was given as a descriptor.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The program could not be started.
    #[error("netdev `{id}`: cannot start {}: {source}", program.display())]
    Program {
        /// The backend.
        id: String,
        /// The program.
        program: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The program was started, and has ended before it was of any use.
    #[error("netdev `{id}`: {}: {reason}", program.display())]
    ProgramEnded {
        /// The backend.
        id: String,
        /// The program.
        program: PathBuf,
        /// How it has ended, and what it said last.
        reason: String,
    },
    /// The program is not one that may be started.
    #[error("netdev `{id}`: {} is none of the programs named at the start: {}", program.display(), accepted.join(", "))]
    OtherProgram {
        /// The backend.
        id: String,
        /// The program.
        program: PathBuf,
        /// Those that may be.
        accepted: Vec<String>,
    },
    /// An argument for the program is not one that may be asked for.
    #[error("netdev `{id}`: argument {refusal}")]
    Argument {
        /// The backend.
        id: String,
        /// The argument and why.
        refusal: String,
    },
    /// Who starts programs does not answer.
    #[error("netdev `{id}`: the launcher of programs does not answer: {source}")]
    Launcher {
        /// The backend.
        id: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A device has it.
    #[error("netdev `{id}` is in use by `{device}`")]
    InUse {
        /// The backend.
        id: String,
        /// The device.
        device: String,
    },
    /// It was removed.
    #[error("netdev `{id}` has been removed")]
    Removed {
        /// The backend.
        id: String,
    },
}
