// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl plug-dimm`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ebbtide_qmp::Properties;
use ebbtide_qmp::commands::OBJECT_ADD;
use ebbtide_qmp::sizes::Size;
use ebbtide_qmp::types::qom::ObjectAdd;

use super::super::backend::Backend;
use super::super::{Failure, Outcome, Session, human, server_path};
use super::{Plan, add};

/// The options of `ctl plug-dimm`.
#[derive(Args)]
pub(in crate::ctl) struct PlugDimmArgs {
    /// How large it is, such as 1G
    #[arg(value_name = "SIZE")]
    size: Size,
    /// Its id; by default the first free one of dimm0, dimm1, ...
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Its NUMA node
    #[arg(long, value_name = "N")]
    node: Option<u32>,
    /// Where its memory comes from
    #[arg(long, value_enum, default_value_t = MemoryKind::Ram, value_name = "KIND")]
    backend: MemoryKind,
    /// The file its memory is in, for --backend file
    #[arg(long, value_name = "PATH", required_if_eq("backend", "file"))]
    path: Option<PathBuf>,
}

/// Kinds of memory backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MemoryKind {
    /// Anonymous memory
    Ram,
    /// A file without a name, which other processes can map
    Memfd,
    /// A file
    File,
}

impl MemoryKind {
    fn qom_type(self) -> &'static str {
        match self {
            Self::Ram => "memory-backend-ram",
            Self::Memfd => "memory-backend-memfd",
            Self::File => "memory-backend-file",
        }
    }
}

pub(in crate::ctl) fn plug(
    session: &mut Session<'_>,
    args: &PlugDimmArgs,
) -> Result<Outcome, Failure> {
    let mut memory = Properties::new();
    memory.set("size", args.size.0);
    match (&args.path, args.backend) {
        (Some(path), MemoryKind::File) => {
            memory.set("mem-path", server_path(path)?);
            memory.set("share", true);
        }
        (Some(path), kind) => {
            return Err(Failure::Usage(format!(
                "--path {} goes with --backend file, not {}",
                path.display(),
                kind.qom_type()
            )));
        }
        (None, _) => {}
    }
    let plan = |id: &str| {
        let backend = Backend::memory(id);
        let mut properties = Properties::new();
        properties.set("memdev", backend.name());
        if let Some(node) = args.node {
            properties.set("node", node);
        }
        Plan {
            make: OBJECT_ADD,
            arguments: ObjectAdd {
                qom_type: args.backend.qom_type().to_owned(),
                id: backend.name().to_owned(),
                properties: memory.clone(),
            },
            backend,
            driver: "pc-dimm",
            id: id.to_owned(),
            properties,
        }
    };
    let what = format!("a DIMM of {}", human(args.size.0));
    add(session, (args.id.as_deref(), "dimm"), &what, plan)
}
