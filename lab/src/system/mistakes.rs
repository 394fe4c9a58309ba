// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bad input gets a clear error that names the thing and the value, and leaves nothing behind.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Ground, MIB, finish};
use crate::qmp::Qmp;
use crate::vmm::Disk;

const USAGE: i32 = 2;
const FAILURE: i32 = 1;

struct Case<'a> {
    arguments: Vec<&'a str>,
    code: i32,
    /// What the error must say.
    says: &'a [&'a str],
}

fn case<'a>(arguments: &[&'a str], code: i32, says: &'a [&'a str]) -> Case<'a> {
    Case {
        arguments: arguments.to_vec(),
        code,
        says,
    }
}

/// What is wrong is on the command line itself.
pub fn command_line(ground: &Ground) -> Result<()> {
    let kernel = ground.image.kernel.to_str().context("path")?;
    let with = |more: &[&'static str], says: &'static [&'static str]| {
        let mut arguments = vec!["run", "--kernel", kernel];
        arguments.extend_from_slice(more);
        Case {
            arguments,
            code: USAGE,
            says,
        }
    };
    for case in [
        with(&["--memory", "size=0"], &["--memory", "size=0"]),
        with(&["--memory", "size=513K"], &["--memory", "2 MiB"]),
        with(&["--memory", "size=1G,max=512M"], &["max=", "smaller"]),
        with(&["--memory", "size=lots"], &["--memory", "lots"]),
        with(
            &["--memory", "512M,bakend=anon"],
            &["bakend", "\"backend\""],
        ),
        with(
            &["--disk", "path=x,readonyl=on"],
            &["readonyl", "\"readonly\""],
        ),
        with(
            &["--disk", "path=x", "--disk", "path=x"],
            &["disk0 and disk1", "path=x", "readonly=on"],
        ),
        with(&["--cpus", "0"], &["cpus=0"]),
        with(&["--cpus", "99"], &["cpus=99"]),
        with(&["--serial", "tcp:1"], &["--serial", "tcp:1"]),
        with(&["--cpus", "256"], &["cpus=256"]),
        with(&["--qmp", "vm.qmp"], &["--qmp", "vm.qmp"]),
        with(
            &["--qmp", "unix:a", "--qmp", "unix:a"],
            &["unix:a", "twice"],
        ),
        with(
            &["--drain-timeout", "1000000000"],
            &["drain-timeout=1000000000", "86400"],
        ),
        with(
            &["--device", "virtio-men-pci,memdev=a"],
            &["virtio-men-pci", "\"virtio-mem-pci\""],
        ),
        with(&["--memroy", "1G"], &["--memroy", "--memory"]),
        case(&["run"], USAGE, &["--kernel"]),
        case(&["fly"], USAGE, &["fly"]),
        case(
            &["ctl", "--qmp", "/nonexistent/qmp", "status"],
            FAILURE,
            &["/nonexistent/qmp"],
        ),
    ] {
        expect(ground, &case)?;
    }
    Ok(())
}

/// What is wrong is a file, a socket, or what the host has.
pub fn files(ground: &Ground) -> Result<()> {
    let work = tempfile::tempdir()?;
    let path = |name: &str| work.path().join(name).to_string_lossy().into_owned();
    let kernel = ground.image.kernel.to_str().context("path")?;
    let truncated = path("truncated");
    let bytes = fs::read(&ground.image.kernel)?;
    fs::write(&truncated, &bytes[..bytes.len() / 2])?;
    let huge = path("huge-initrd");
    fs::File::create(&huge)?.set_len(600 * MIB)?;
    let small = path("small.img");
    fs::write(&small, b"tiny")?;
    let small_disk = format!("path={small}");
    let missing_disk = format!("path={}", path("missing.img"));
    let socket = path("in-use.sock");
    let live = UnixListener::bind(&socket)?;
    let live_socket = format!("unix:{socket}");
    let missing = path("missing-kernel");
    let pipe = path("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status()?;
    ensure!(made.success(), "mkfifo: {made}");
    let serial_pipe = format!("file:{pipe}");
    let long_socket = format!("unix:{}", path(&"x".repeat(120)));
    for case in [
        case(
            &["run", "--kernel", &missing],
            FAILURE,
            &["kernel", "missing-kernel"],
        ),
        case(&["run", "--kernel", &truncated], FAILURE, &["truncated"]),
        // Nobody writes to it: it must not be waited for.
        case(&["run", "--kernel", &pipe], FAILURE, &["pipe", "regular"]),
        case(
            &["run", "--kernel", kernel, "--serial", &serial_pipe],
            FAILURE,
            &["--serial", "pipe"],
        ),
        case(
            &["run", "--kernel", kernel, "--serial", &long_socket],
            FAILURE,
            &["--serial", "107"],
        ),
        case(
            &["run", "--kernel", kernel, "--qmp", &long_socket],
            FAILURE,
            &["--qmp", "107"],
        ),
        case(
            &["run", "--kernel", kernel, "--initrd", &huge],
            FAILURE,
            &["huge-initrd", "600 MiB"],
        ),
        case(
            &["run", "--kernel", kernel, "--disk", &small_disk],
            FAILURE,
            &["small.img"],
        ),
        case(
            &["run", "--kernel", kernel, "--disk", &missing_disk],
            FAILURE,
            &["missing.img"],
        ),
        case(
            &["run", "--kernel", kernel, "--qmp", &live_socket],
            FAILURE,
            &["in-use.sock"],
        ),
        case(
            &["run", "--kernel", kernel, "--serial", &live_socket],
            FAILURE,
            &["in-use.sock"],
        ),
        case(
            &["run", "--kernel", kernel, "--memory", "1000G"],
            FAILURE,
            &["size=1073741824000", "leaves"],
        ),
    ] {
        expect(ground, &case)?;
    }
    drop(live);
    beside_a_running_vm(ground, work.path())
}

/// An image that another VM writes to is refused; that VM does not notice, whose monitor's socket was there and had nobody
/// who listened: that is no obstacle.
fn beside_a_running_vm(ground: &Ground, work: &Path) -> Result<()> {
    let image = work.join("shared.img");
    fs::File::create(&image)?.set_len(16 * MIB)?;
    let socket = work.join("dead.sock");
    drop(UnixListener::bind(&socket)?);
    ensure!(socket.exists(), "the dead socket is gone too soon");
    let mut machine = ground.machine(1, 1 << 30);
    machine.disks.push(Disk {
        id: "disk0".into(),
        path: image.clone(),
        readonly: false,
    });
    let qmp = format!("unix:{}", socket.display());
    machine.more.extend(["--qmp".into(), qmp]);
    let vmm = ground.start(&machine)?;
    Qmp::connect(&socket)?.execute("query-status", Value::Null)?;
    let disk = format!("path={}", image.display());
    let kernel = ground.image.kernel.to_str().context("path")?;
    expect(
        ground,
        &case(
            &["run", "--kernel", kernel, "--disk", &disk],
            FAILURE,
            &["shared.img", "lock"],
        ),
    )?;
    finish(vmm)?;
    ensure!(!socket.exists(), "{} is left behind", socket.display());
    Ok(())
}

fn expect(ground: &Ground, case: &Case<'_>) -> Result<()> {
    let Output { status, stderr, .. } = Command::new(&ground.ebbtide)
        .args(&case.arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("run {}", ground.ebbtide.display()))?;
    let text = String::from_utf8_lossy(&stderr);
    let line = case.arguments.join(" ");
    ensure!(
        status.code() == Some(case.code),
        "{line}: ended with {status}, not with {}\n{text}",
        case.code
    );
    for part in case.says {
        ensure!(
            text.contains(part),
            "{line}: does not say {part:?}:\n{text}"
        );
    }
    ensure!(!text.contains("panicked"), "{line}:\n{text}");
    Ok(())
}
