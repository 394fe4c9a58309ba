// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest images: a Debian kernel and an initramfs with the agent.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::initramfs::Initramfs;
use crate::kernel::{Kernel, Series};
use crate::modules::{Module, Modules};
use crate::places::target_dir;
use crate::{agent, packages, places};

/// Modules a guest needs; each brings what it depends on. Few and
/// uncompressed, because the time to boot is measured.
const GUEST_MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_mem",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_scsi",
    "sd_mod",
    "virtio_console",
];

/// Modules that not every kernel has: one without does not try the devices they are for.
const DEVICE_MODULES: [&str; 1] = ["i6300esb"];

/// What every test guest is started with. A bare `online_movable` guest can
/// give back all the memory it was lent.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable";

/// What a VMM boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Kernel release.
    pub version: String,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs, uncompressed; none for what is its own kernel.
    pub initrd: Option<PathBuf>,
}

/// Downloads and builds what a guest with this kernel needs.
///
/// # Errors
/// A package, a module or the agent is not to be had.
pub fn build(series: Series) -> Result<Image> {
    let kernel = Kernel::cloud(series)?;
    let modules = Modules::open(&kernel.modules)?;
    // All of these have to be there.
    modules.resolve(&GUEST_MODULES)?;
    let wanted: Vec<&str> = GUEST_MODULES.into_iter().chain(DEVICE_MODULES).collect();
    pack(kernel, &modules.resolve_known(&wanted)?)
}

/// The same with the full kernel, if it is of this series, where the small one lacks drivers of devices that come and go.
///
/// # Errors
/// As [`build`].
pub fn with_all_drivers(series: Series) -> Result<Option<Image>> {
    let small = Modules::open(&Kernel::cloud(series)?.modules)?;
    if small.resolve(&DEVICE_MODULES).is_ok() {
        return Ok(None);
    }
    let kernel = Kernel::full()?;
    if !kernel.version.starts_with(&format!("{series}.")) {
        return Ok(None);
    }
    let wanted: Vec<&str> = GUEST_MODULES.into_iter().chain(DEVICE_MODULES).collect();
    let modules = Modules::open(&kernel.modules)?.resolve(&wanted)?;
    pack(kernel, &modules).map(Some)
}

fn pack(kernel: Kernel, modules: &[Module]) -> Result<Image> {
    packages::ensure_packages(&["busybox-static"])?;
    let programs = agent::build()?;
    let read = |path: &PathBuf| fs::read(path).with_context(|| format!("read {}", path.display()));
    let mut archive = Initramfs::bootable(&read(&programs.agent)?, modules);
    archive.file("/bin/busybox", 0o755, &read(&packages::static_busybox()?)?);
    archive.symlink("/bin/sh", "busybox");
    let initrd = target_dir()?
        .join("images")
        .join(format!("{}.cpio", kernel.version));
    // In the capsule the tree is read-only; the image is there already, unchanged.
    places::write_whole(&initrd, &archive.finish())?;
    Ok(Image {
        version: kernel.version,
        kernel: kernel.vmlinuz,
        initrd: Some(initrd),
    })
}
