// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What PID 1 does first: kernel file systems, modules, facts about the kernel.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// Where the initramfs holds the kernel modules and their list.
pub const MODULE_DIR: &str = "/modules";
/// The modules of [`MODULE_DIR`], one file name per line, in load order.
pub const MODULE_LIST: &str = "/modules/list";

/// Mounts a file system; one that is there already is fine.
///
/// # Errors
/// Names the file system, the place and the kernel's reason.
pub fn mount_at(
    kind: &str,
    source: &str,
    target: &str,
    flags: MountFlags,
    data: &str,
) -> Result<()> {
    fs::create_dir_all(target)
        .or_else(|error| {
            if Path::new(target).is_dir() {
                Ok(())
            } else {
                Err(error)
            }
        })
        .with_context(|| format!("create {target}"))?;
    let data = CString::new(data).context("mount options")?;
    match mount(source, target, kind, flags, data.as_c_str()) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("mount {kind} {source} on {target}")),
    }
}

/// Mounts proc, sys, devtmpfs and a tmpfs on /tmp.
///
/// Goes on after a failure; what failed is returned.
pub fn mount_kernel_file_systems() -> Vec<String> {
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC;
    [
        mount_at("proc", "proc", "/proc", plain, ""),
        mount_at("sysfs", "sysfs", "/sys", plain, ""),
        mount_at("devtmpfs", "dev", "/dev", MountFlags::NOSUID, "mode=0755"),
        mount_at("tmpfs", "tmp", "/tmp", MountFlags::NOSUID, "mode=1777"),
    ]
    .into_iter()
    .filter_map(|result| result.err().map(|error| format!("{error:#}")))
    .collect()
}

/// Loads every module of [`MODULE_LIST`] in order; `before` is called with each one's file name
/// first.
///
/// Goes on after a failure; what failed is returned.
pub fn load_modules(before: impl Fn(&str)) -> Vec<String> {
    let list = match fs::read_to_string(MODULE_LIST) {
        Ok(list) => list,
        Err(error) => return vec![format!("{MODULE_LIST}: {error}")],
    };
    list.lines()
        .filter(|name| !name.is_empty())
        .inspect(|name| before(name))
        .filter_map(|name| load_module(name).err().map(|error| format!("{error:#}")))
        .collect()
}

fn load_module(name: &str) -> Result<()> {
    let path = Path::new(MODULE_DIR).join(name);
    let file = fs::File::open(&path).with_context(|| format!("open {}", path.display()))?;
    match rustix::system::finit_module(file.as_fd(), c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load module {name}")),
    }
}

/// Time since the kernel started.
pub fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// Time since the kernel started, in milliseconds.
pub fn uptime_ms() -> u64 {
    millis(uptime())
}

/// A duration in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
