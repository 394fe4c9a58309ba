// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl disk add`

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args;
use ebbtide_qmp::Properties;
use ebbtide_qmp::commands::BLOCKDEV_ADD;
use ebbtide_qmp::types::block::{
    BlockdevCacheOptions, BlockdevDiscard, BlockdevDriver, BlockdevOptions,
};

use super::super::backend::Backend;
use super::super::{Failure, Outcome, Session, server_path};
use super::Plan;

/// The options of `ctl disk add`.
#[derive(Args)]
pub(in crate::ctl) struct DiskAddArgs {
    /// A raw image, or a block device of the host
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Its id; by default the first free one of disk0, disk1, ...
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// For reading only
    #[arg(long)]
    readonly: bool,
    /// Past the host's page cache
    #[arg(long)]
    direct: bool,
    /// What the guest sees as its serial number; by default the id
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
}

/// As long as a disk's serial number may be (virtio 1.3 section 5.2.6).
const SERIAL_LENGTH: usize = 20;

pub(in crate::ctl) fn add(
    session: &mut Session<'_>,
    args: &DiskAddArgs,
) -> Result<Outcome, Failure> {
    let filename = server_path(&args.path)?;
    let mut medium = Properties::new();
    medium.set("filename", filename.as_str());
    let plan = |id: &str| {
        let backend = Backend::node(id);
        let mut properties = Properties::new();
        properties.set("drive", backend.name());
        let serial = args.serial.clone();
        properties.set(
            "serial",
            serial.unwrap_or_else(|| id.chars().take(SERIAL_LENGTH).collect()),
        );
        Plan {
            make: BLOCKDEV_ADD,
            arguments: BlockdevOptions {
                driver: driver_of(&args.path),
                node_name: Some(backend.name().to_owned()),
                discard: Some(BlockdevDiscard::Unmap),
                cache: Some(BlockdevCacheOptions {
                    direct: Some(args.direct),
                    no_flush: None,
                }),
                read_only: Some(args.readonly),
                auto_read_only: None,
                force_share: None,
                detect_zeroes: None,
                properties: medium.clone(),
            },
            backend,
            driver: "virtio-blk-pci",
            id: id.to_owned(),
            properties,
        }
    };
    let what = format!(
        "{filename}{}",
        if args.readonly { ", read-only" } else { "" }
    );
    super::add(session, (args.id.as_deref(), "disk"), &what, plan)
}

/// What cannot be looked at from here is for the server to judge.
fn driver_of(path: &Path) -> BlockdevDriver {
    let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    if is_device {
        BlockdevDriver::HostDevice
    } else {
        BlockdevDriver::File
    }
}
