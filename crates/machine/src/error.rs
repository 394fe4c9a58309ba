// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one error type of this crate.

use std::path::PathBuf;

use ebbtide_qmp::sizes::human;
use thiserror::Error;

/// Why a machine can't be built, or an operation on it fails.
#[derive(Debug, Error)]
pub enum Error {
    /// An option's value is not accepted.
    #[error("{0}")]
    Config(String),
    /// A file can't be used.
    #[error("{what} {}: {reason}", path.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it can't be used.
        reason: String,
    },
    /// Kernel, initrd or command line can't be put into guest memory.
    #[error("{0}")]
    Boot(String),
    /// The guest-physical address space is too small for the memory asked for.
    #[error(
        "memory: the guest would need {} of physical address space; the {phys_bits} bits of this host's processors give {}; ask for less (max=)",
        human(*.needed_bytes),
        human(*.available_bytes)
    )]
    AddressSpace {
        /// End of what was asked for.
        needed_bytes: u64,
        /// End of the address space.
        available_bytes: u64,
        /// Physical address bits of the vCPUs.
        phys_bits: u8,
    },
    /// The host can't give the boot RAM.
    #[error(
        "memory size={asked_bytes} ({}): {limit} leaves {available_bytes} bytes ({})",
        human(*.asked_bytes),
        human(*.available_bytes)
    )]
    HostMemory {
        /// Boot RAM asked for.
        asked_bytes: u64,
        /// What this process may still use.
        available_bytes: u64,
        /// Which limit that is.
        limit: String,
    },
    /// Something below this crate failed.
    #[error("{what}: {reason}")]
    Part {
        /// Which part of the machine.
        what: String,
        /// Its error.
        reason: String,
    },
}

impl Error {
    /// Wraps the error of a part of the machine.
    pub fn part(what: impl Into<String>, reason: impl std::fmt::Display) -> Error {
        Error::Part {
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}
