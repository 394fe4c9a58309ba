// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The QEMU that emulates the capsule's machine.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use ebbtide_agent::capsule_protocol::{CONTROL_PORT, ROOT_TAG, STDERR_PORT, STDOUT_PORT, Share};

use super::Capsule;
use crate::kernel::Kernel;
use crate::places::find_program;

/// An AMD processor with nested paging. Without `-xsave` every guest's kernel
/// warns at boot. Without `-erms,-fsrm` kernels clear and copy memory by single
/// bytes, which TCG emulates one by one.
pub(super) const PROCESSOR: &str = "max,+svm,+npt,-xsave,-erms,-fsrm";
const COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off init_on_alloc=0 no_timer_check";

/// Our ends of the virtio-serial ports, and QEMU's.
pub(super) struct Ports {
    pub control: Pair,
    pub stdout: Pair,
    pub stderr: Pair,
}

/// The two ends of a port.
pub(super) struct Pair {
    pub ours: UnixStream,
    pub theirs: UnixStream,
}

impl Pair {
    fn new() -> Result<Pair> {
        let (ours, theirs) = UnixStream::pair().context("socket pair")?;
        Ok(Pair { ours, theirs })
    }
}

impl Ports {
    pub fn open() -> Result<Ports> {
        Ok(Ports {
            control: Pair::new()?,
            stdout: Pair::new()?,
            stderr: Pair::new()?,
        })
    }

    fn inherited(&self) -> [BorrowedFd<'_>; 3] {
        [
            self.control.theirs.as_fd(),
            self.stdout.theirs.as_fd(),
            self.stderr.theirs.as_fd(),
        ]
    }
}

/// Files of one run. They have no name unless asked for, so none is left
/// behind even when this process is killed.
pub(super) struct Files {
    pub initrd: File,
    pub console: File,
    pub log: File,
}

impl Files {
    pub fn create(initrd: &[u8], console: Option<&Path>) -> Result<Files> {
        let nameless = || tempfile::tempfile().context("create a temporary file");
        let mut files = Files {
            initrd: nameless()?,
            console: match console {
                Some(path) => {
                    let mut options = File::options();
                    options.read(true).write(true).create(true).truncate(true);
                    options
                        .open(path)
                        .with_context(|| format!("create {}", path.display()))?
                }
                None => nameless()?,
            },
            log: nameless()?,
        };
        files
            .initrd
            .write_all(initrd)
            .context("write the capsule's initrd")?;
        Ok(files)
    }
}

/// What QEMU must inherit.
pub(super) fn inherited<'a>(ports: &'a Ports, files: &'a Files) -> Vec<BorrowedFd<'a>> {
    let mut all = vec![files.initrd.as_fd(), files.console.as_fd()];
    all.extend(ports.inherited());
    all
}

/// An inherited file as a path.
fn path_of(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// QEMU's command line; its standard error is the caller's to choose.
pub(super) fn command(
    capsule: &Capsule,
    kernel: &Kernel,
    files: &Files,
    shares: &[Share],
    ports: &Ports,
) -> Result<Command> {
    let program =
        find_program("qemu-system-x86_64").context("qemu-system-x86_64 is not installed")?;
    let mut command = Command::new(program);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-monitor",
        "none",
    ]);
    command.args([
        "-machine",
        "q35,memory-backend=ram",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        &capsule.processor,
    ]);
    command
        .arg("-smp")
        .arg(capsule.cpus.to_string())
        .arg("-m")
        .arg(format!("{}M", capsule.memory_mib));
    // The host lends pages when they are touched, even if it has less in all.
    command.arg("-object").arg(format!(
        "memory-backend-ram,id=ram,size={}M,reserve=off",
        capsule.memory_mib
    ));
    // One packed in a way unknown here still boots, only slower.
    let image = kernel.vmlinux().unwrap_or_else(|error| {
        eprintln!("the capsule boots slowly: {error:#}");
        kernel.vmlinuz.clone()
    });
    command
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(path_of(&files.initrd))
        .args(["-append", COMMAND_LINE]);
    command
        .arg("-serial")
        .arg(format!("file:{}", path_of(&files.console)));
    command.args(["-device", "virtio-serial-pci"]);
    let named = [
        (CONTROL_PORT, &ports.control),
        (STDOUT_PORT, &ports.stdout),
        (STDERR_PORT, &ports.stderr),
    ];
    for (index, (name, pair)) in named.into_iter().enumerate() {
        let fd = pair.theirs.as_raw_fd();
        command
            .arg("-chardev")
            .arg(format!("socket,id=port{index},fd={fd}"));
        command
            .arg("-device")
            .arg(format!("virtserialport,chardev=port{index},name={name}"));
    }
    nine_p(&mut command, ROOT_TAG, Path::new("/"), ",readonly=on")?;
    for share in shares {
        nine_p(&mut command, &share.tag, Path::new(&share.path), "")?;
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

fn nine_p(command: &mut Command, tag: &str, path: &Path, more: &str) -> Result<()> {
    let path = option_value(path)?;
    // Owners are those of the host; a user who may not give files away keeps them.
    let options = format!("local,id={tag},path={path},security_model=none,multidevs=remap{more}");
    command.arg("-fsdev").arg(options);
    command
        .arg("-device")
        .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
    Ok(())
}

/// In QEMU's options a comma within a value is doubled.
fn option_value(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(option_value(Path::new("/a,b")).unwrap(), "/a,,b");
    }
}
