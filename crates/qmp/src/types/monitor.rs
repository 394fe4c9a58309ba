// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocol's own data: version, commands, capabilities.

use crate::schema::{qapi_enum, qapi_struct};

qapi_struct! {
    /// The QEMU release whose interface is spoken.
    #[derive(Copy, Eq)]
    pub struct VersionTriple {
        /// x of z.y.x
        micro as "micro": u64,
        /// y of z.y.x
        minor as "minor": u64,
        /// z of z.y.x
        major as "major": u64,
    }
}

qapi_struct! {
    /// The answer to `query-version`, and a part of the greeting.
    #[derive(Eq)]
    pub struct VersionInfo {
        /// The QEMU release whose interface is spoken.
        qemu as "qemu": VersionTriple,
        /// Whose program it is, and its version.
        package as "package": String,
    }
}

impl VersionInfo {
    /// What Ebbtide says it is: names, arguments and events are those of QEMU 10.0, and clients choose by that
    /// number what they send. The package tells who is speaking.
    pub fn ebbtide() -> Self {
        Self {
            qemu: VersionTriple {
                micro: 0,
                minor: 0,
                major: 10,
            },
            package: concat!("ebbtide ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

qapi_struct! {
    /// One item of `query-commands`.
    #[derive(Eq)]
    pub struct CommandName {
        /// The command's name.
        name as "name": String,
    }
}

qapi_enum! {
    /// What a client may enable.
    pub enum Capability {
        /// Commands that overtake others.
        Oob = "oob",
    }
}

qapi_struct! {
    /// Arguments of `qmp_capabilities`.
    #[derive(Eq)]
    pub struct QmpCapabilities {
        /// What to enable.
        enable as "enable": Option<Vec<Capability>>,
    }
}

qapi_struct! {
    /// Arguments of `human-monitor-command`.
    #[derive(Eq)]
    pub struct HumanMonitorCommand {
        /// The command, as a person types it.
        command_line as "command-line": String,
        /// The vCPU it is about.
        cpu_index as "cpu-index": Option<i64>,
    }
}
