// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands as people type them, for `human-monitor-command`: the line, its words, and the texts that answer.
//!
//! Spelling, options and the wording of errors are those of QEMU's monitor, lines end in `\r\n`.
//!
//! ```
//! use ebbtide_qmp::hmp::{self, Command, Info};
//! assert_eq!(hmp::parse("info mtree -f"), Ok(Command::Info(Info::Mtree { flat: true })));
//! assert_eq!(hmp::parse("info nope"), Err("unknown command: 'info nope'\r\n".to_owned()));
//! ```

mod aer;
mod devices;
mod line;
mod text;

use serde_json::Value;

use crate::error::QmpError;
use crate::sizes;
pub use aer::PcieError;
pub use devices::{balloon, block, cpus, iothreads, pci};
pub use text::{error, memory_devices, memory_size_summary, properties, status, version};

use line::{Flag, Spec, Words};

/// What a line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Nothing but this answer: help, or an empty line.
    Text(String),
    /// `info …`
    Info(Info),
    /// Stop the vCPUs.
    Stop,
    /// Let the vCPUs run.
    Cont,
    /// Reset the machine.
    SystemReset,
    /// Press the power button.
    SystemPowerdown,
    /// End the machine.
    Quit,
    /// The properties of the object at this path, by default of the root.
    QomList {
        /// The object.
        path: Option<String>,
    },
    /// One property.
    QomGet {
        /// The object.
        path: String,
        /// The property.
        property: String,
    },
    /// Change one property.
    QomSet {
        /// The object.
        path: String,
        /// The property.
        property: String,
        /// Its new value.
        value: QomValue,
    },
    /// Have an error happen in a PCI Express device.
    InjectError {
        /// The device's id.
        id: String,
        /// What is to happen.
        error: PcieError,
    },
}

/// What `info` is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Whether the guest runs; see [`status`].
    Status,
    /// Who is speaking; see [`version`].
    Version,
    /// The memory devices; see [`memory_devices`].
    MemoryDevices,
    /// How much memory there is; see [`memory_size_summary`].
    MemorySizeSummary,
    /// The memory map.
    Mtree {
        /// As ranges without overlap, not as a tree.
        flat: bool,
    },
    /// The host memory behind the guest's.
    RamBlock,
    /// The disks; see [`block`].
    Block,
    /// The PCI buses; see [`pci`].
    Pci,
    /// All devices, each below the bus it is on.
    Qtree,
    /// The vCPUs; see [`cpus`].
    Cpus,
    /// The iothreads; see [`iothreads`].
    Iothreads,
    /// What the balloon leaves to the guest; see [`balloon`].
    Balloon,
}

/// A property's value as it was typed. What it means depends on the property's type.
#[derive(Debug, Clone, PartialEq)]
pub enum QomValue {
    /// The rest of the line.
    Text(String),
    /// The rest of the line after `-j`, which is JSON.
    Json(Value),
}

impl QomValue {
    /// The value for a property that holds a size; text may carry a suffix (`300M`).
    ///
    /// # Errors
    /// A `GenericError` that names the property and what is accepted.
    pub fn to_size(&self, property: &str) -> Result<u64, QmpError> {
        match self {
            QomValue::Text(text) => sizes::parse_option(property, text)
                .map_err(|error| QmpError::generic(error.to_string())),
            QomValue::Json(value) => value
                .as_u64()
                .ok_or_else(|| QmpError::generic(format!("Parameter '{property}' expects uint64"))),
        }
    }
}

const FLAT: Flag = Flag {
    letter: 'f',
    help: "as ranges without overlap",
};
const JSON: Flag = Flag {
    letter: 'j',
    help: "the value is JSON",
};

const CORRECTABLE: Flag = Flag {
    letter: 'c',
    help: "the status is one of correctable errors",
};

const COMMANDS: &[Spec] = &[
    Spec {
        names: &["help", "?"],
        options: &[],
        words: Words::Rest("[cmd]"),
        help: "show the help",
    },
    Spec {
        names: &["info"],
        options: &[],
        words: Words::Rest("[subcommand]"),
        help: "show various information about the machine",
    },
    Spec {
        names: &["stop", "s"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "stop the vCPUs",
    },
    Spec {
        names: &["cont", "c"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "let the vCPUs run",
    },
    Spec {
        names: &["system_reset"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "reset the machine",
    },
    Spec {
        names: &["system_powerdown"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "press the power button",
    },
    Spec {
        names: &["quit", "q"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "end the machine",
    },
    Spec {
        names: &["qom-list"],
        options: &[],
        words: Words::AtMostOne("path"),
        help: "list the properties of an object",
    },
    Spec {
        names: &["qom-get"],
        options: &[],
        words: Words::Exactly(&["path", "property"]),
        help: "show a property",
    },
    Spec {
        names: &["qom-set"],
        options: &[JSON],
        words: Words::ThenRest(&["path", "property"], "value"),
        help: "change a property; sizes may carry a suffix",
    },
    Spec {
        names: &["pcie_aer_inject_error"],
        options: &[CORRECTABLE],
        words: Words::ThenRest(&["id"], "error_status [header]..."),
        help: "have an error happen in a PCI Express device, and reported",
    },
];

const INFOS: &[Spec] = &[
    Spec {
        names: &["balloon"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show how much memory the balloon leaves to the guest",
    },
    Spec {
        names: &["block"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the disks",
    },
    Spec {
        names: &["cpus"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the vCPUs",
    },
    Spec {
        names: &["iothreads"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the iothreads",
    },
    Spec {
        names: &["pci"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the PCI buses",
    },
    Spec {
        names: &["qtree"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the devices and the buses they are on",
    },
    Spec {
        names: &["memory-devices"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the memory devices",
    },
    Spec {
        names: &["memory_size_summary"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show how much memory the guest has, in bytes",
    },
    Spec {
        names: &["mtree"],
        options: &[FLAT],
        words: Words::Exactly(&[]),
        help: "show the memory map",
    },
    Spec {
        names: &["ramblock"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the host memory behind the guest's",
    },
    Spec {
        names: &["status"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show whether the guest runs",
    },
    Spec {
        names: &["version"],
        options: &[],
        words: Words::Exactly(&[]),
        help: "show the version",
    },
];

/// Reads one line.
///
/// # Errors
/// The text that answers a line that cannot be understood.
pub fn parse(input: &str) -> Result<Command, String> {
    let input = input.trim();
    if input.is_empty() {
        return Ok(Command::Text(String::new()));
    }
    let (name, rest) = line::split_name(input);
    let spec = line::find(COMMANDS, name).ok_or_else(|| line::unknown(name))?;
    let found = line::read(spec, "", rest)?;
    let mut words = found.words.into_iter();
    let mut next = || words.next().unwrap_or_default();
    Ok(match spec.names.first().copied().unwrap_or_default() {
        "help" => Command::Text(help(&next())?),
        "info" => return info(rest),
        "stop" => Command::Stop,
        "cont" => Command::Cont,
        "system_reset" => Command::SystemReset,
        "system_powerdown" => Command::SystemPowerdown,
        "quit" => Command::Quit,
        "qom-list" => Command::QomList {
            path: Some(next()).filter(|path| !path.is_empty()),
        },
        "qom-get" => Command::QomGet {
            path: next(),
            property: next(),
        },
        "qom-set" => {
            let (path, property) = (next(), next());
            Command::QomSet {
                path,
                property,
                value: qom_value(next(), !found.options.is_empty())?,
            }
        }
        "pcie_aer_inject_error" => Command::InjectError {
            id: next(),
            error: aer::read(&next(), !found.options.is_empty())?,
        },
        _ => return Err(line::unknown(name)),
    })
}

fn info(rest: &str) -> Result<Command, String> {
    if rest.is_empty() {
        return Ok(Command::Text(line::help_all(INFOS, "info ")));
    }
    let (name, rest) = line::split_name(rest);
    let unknown = || line::unknown(&format!("info {name}"));
    let spec = line::find(INFOS, name).ok_or_else(unknown)?;
    let found = line::read(spec, "info ", rest)?;
    Ok(Command::Info(match name {
        "memory-devices" => Info::MemoryDevices,
        "memory_size_summary" => Info::MemorySizeSummary,
        "mtree" => Info::Mtree {
            flat: found.options.contains(&FLAT.letter),
        },
        "ramblock" => Info::RamBlock,
        "balloon" => Info::Balloon,
        "block" => Info::Block,
        "cpus" => Info::Cpus,
        "iothreads" => Info::Iothreads,
        "pci" => Info::Pci,
        "qtree" => Info::Qtree,
        "status" => Info::Status,
        "version" => Info::Version,
        _ => return Err(unknown()),
    }))
}

fn help(about: &str) -> Result<String, String> {
    let (name, rest) = line::split_name(about);
    match (name, rest) {
        ("", _) => Ok(line::help_all(COMMANDS, "")),
        ("info", "") => Ok(line::help_all(INFOS, "info ")),
        ("info", topic) => line::find(INFOS, topic)
            .map(|spec| line::help_one(spec, "info "))
            .ok_or_else(|| line::unknown(&format!("info {topic}"))),
        _ => line::find(COMMANDS, name)
            .map(|spec| line::help_one(spec, ""))
            .ok_or_else(|| line::unknown(name)),
    }
}

fn qom_value(text: String, json: bool) -> Result<QomValue, String> {
    if !json {
        return Ok(QomValue::Text(text));
    }
    crate::json::parse_one(&text)
        .map(QomValue::Json)
        .map_err(|error| format!("Error: {error}\r\n"))
}

#[cfg(test)]
mod tests;
