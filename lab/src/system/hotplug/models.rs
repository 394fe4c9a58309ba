// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The models that come and go: a line for each says how it is made, seen and used.

mod legacy;

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::disk;
use ebbtide_agent::protocol::{Command, DiskStart, DiskStatus};
use serde_json::{Value, json};

use super::peer;
use super::{GUEST, LOOK, deleted, until, wait_for};
use crate::system::{BOOT, MIB, STEP_LIMIT};
use crate::vmm::Vmm;

/// A model of device and a use of it.
pub struct Model {
    /// Its driver's name.
    pub driver: &'static str,
    /// What it needs before it can be made.
    pub prepare: fn(&mut Vmm, &Path) -> Result<()>,
    /// Its properties.
    pub arguments: fn() -> Value,
    /// What is below it in the end: gone before it.
    pub below: &'static [&'static str],
    /// A path in the guest that is there as long as the device is.
    pub present: &'static str,
    /// The guest begins to use it.
    pub start: fn(&mut Vmm) -> Result<()>,
    /// The device has gone under the use.
    pub stop: fn(&mut Vmm) -> Result<()>,
    /// Takes back what was prepared.
    pub clean_up: fn(&mut Vmm) -> Result<()>,
}

/// So many writes to a disk are complete before anything happens to it: what writes that fail later were for is not compared.
const WRITES: u64 = 32;
/// Of the next work on a disk.
static SEED: AtomicU64 = AtomicU64::new(7);
/// What a guest reads of a random number generator, again and again.
const READ_RNG: &str = "dd if=/dev/hwrng of=/dev/null bs=64 count=4";

/// All of them.
pub const ALL: &[Model] = &[
    Model {
        driver: "virtio-blk-pci",
        prepare: |vmm, ground| {
            vmm.qmp()
                .execute("object-add", json!({"qom-type": "iothread", "id": "io0"}))?;
            vmm.qmp()
                .execute("object-add", json!({"qom-type": "iothread", "id": "io1"}))?;
            disk_image(vmm, ground)
        },
        arguments: || json!({"drive": "image", "num-queues": 2, "iothread": ["io0", "io1"]}),
        below: &[],
        present: "/dev/vda",
        start: |vmm| write_disk(vmm, "/dev/vda"),
        stop: |vmm| disk_is_gone(vmm, "/dev/vda", "image"),
        clean_up: |vmm| {
            vmm.qmp().execute("object-del", json!({"id": "io0"}))?;
            vmm.qmp().execute("object-del", json!({"id": "io1"}))?;
            node_gone(vmm, "image")
        },
    },
    Model {
        driver: "virtio-scsi-pci",
        prepare: |vmm, ground| {
            let second = json!({"driver": "null-co", "node-name": "second", "size": 64 * MIB});
            vmm.qmp().execute("blockdev-add", second)?;
            disk_image(vmm, ground)
        },
        arguments: || json!({"num_queues": 2}),
        below: &["lun0", "lun1"],
        present: "/sys/bus/virtio/drivers/virtio_scsi/virtio*",
        start: |vmm| {
            for (id, drive, lun, name) in [
                ("lun0", "image", 1, "/dev/sda"),
                ("lun1", "second", 2, "/dev/sdb"),
            ] {
                let disk = json!({"driver": "scsi-hd", "id": id, "bus": "dev0.0", "drive": drive, "scsi-id": 3, "lun": lun});
                vmm.qmp().execute("device_add", disk)?;
                wait_for(vmm, name, true)?;
            }
            keep_on(
                vmm,
                "dd if=/dev/sdb of=/dev/null bs=64k count=4 iflag=direct",
            )?;
            write_disk(vmm, "/dev/sda")?;
            events_are_over(vmm)
        },
        stop: |vmm| {
            disk_is_gone(vmm, "/dev/sda", "image")?;
            has_ended(vmm)
        },
        clean_up: |vmm| {
            node_gone(vmm, "second")?;
            node_gone(vmm, "image")
        },
    },
    Model {
        driver: "scsi-hd",
        prepare: |vmm, ground| {
            let adapter = json!({"driver": "virtio-scsi-pci", "id": "hba0"});
            vmm.qmp().execute("device_add", adapter)?;
            disk_image(vmm, ground)
        },
        arguments: || json!({"drive": "image", "bus": "hba0.0"}),
        below: &[],
        present: "/dev/sda",
        // The guest is not asked: what it wrote after that would be lost.
        start: |vmm| {
            write_disk(vmm, "/dev/sda")?;
            disk_is_gone(vmm, "/dev/sda", "image")
        },
        stop: |_| Ok(()),
        clean_up: |vmm| {
            events_are_over(vmm)?;
            vmm.qmp().execute("device_del", json!({"id": "hba0"}))?;
            deleted(vmm, "hba0")?;
            node_gone(vmm, "image")
        },
    },
    Model {
        driver: "virtio-net-pci",
        prepare: |vmm, ground| {
            let path = ground.join("net");
            peer::serve(UnixListener::bind(&path)?);
            let netdev =
                json!({"type": "stream", "id": "n0", "addr": {"type": "unix", "path": path}});
            vmm.qmp().execute("netdev_add", netdev)?;
            Ok(())
        },
        arguments: || json!({"netdev": "n0", "mac": "52:54:00:00:00:02"}),
        below: &[],
        present: "/sys/class/net/eth0",
        start: |vmm| {
            shell(
                vmm,
                "ip link set eth0 up && ip addr add 10.0.0.2/24 dev eth0",
            )?;
            keep_on(vmm, "ping -c 1 -W 5 10.0.0.1")?;
            let refused = vmm.qmp().execute("netdev_del", json!({"id": "n0"}));
            ensure!(
                refused.is_err(),
                "the backend of a card that works is removed"
            );
            Ok(())
        },
        stop: has_ended,
        clean_up: |vmm| {
            vmm.qmp().execute("netdev_del", json!({"id": "n0"}))?;
            Ok(())
        },
    },
    Model {
        driver: "virtio-rng-pci",
        prepare: |vmm, _| {
            let source = json!({"qom-type": "rng-random", "id": "r0", "filename": "/dev/urandom"});
            vmm.qmp().execute("object-add", source)?;
            Ok(())
        },
        arguments: || json!({"rng": "r0"}),
        below: &[],
        present: "/sys/bus/virtio/drivers/virtio_rng/virtio*",
        start: read_rng,
        stop: has_ended,
        clean_up: |vmm| {
            vmm.qmp().execute("object-del", json!({"id": "r0"}))?;
            Ok(())
        },
    },
    Model {
        driver: "virtio-balloon-pci",
        prepare: |_, _| Ok(()),
        arguments: || json!({"deflate-on-oom": true, "free-page-reporting": true}),
        below: &[],
        present: "/sys/bus/virtio/drivers/virtio_balloon/virtio*",
        start: |vmm| {
            balloon(vmm, BOOT - 64 * MIB)?;
            let size = json!({"value": BOOT - 128 * MIB});
            vmm.qmp().execute("balloon", size)?;
            Ok(())
        },
        stop: |vmm| {
            let refused = vmm.qmp().execute("query-balloon", Value::Null);
            ensure!(refused.is_err(), "the balloon that went answers");
            Ok(())
        },
        clean_up: |_| Ok(()),
    },
    Model {
        driver: "virtio-serial-pci",
        prepare: |vmm, ground| {
            let out = ground.join("port");
            let chardev = json!({"id": "c0", "backend": {"type": "file", "data": {"out": out}}});
            vmm.qmp().execute("chardev-add", chardev)?;
            Ok(())
        },
        arguments: || json!({"max_ports": 4}),
        below: &["port0"],
        present: "/sys/bus/virtio/drivers/virtio_console/virtio*",
        start: |vmm| {
            let port = json!({"driver": "virtserialport", "id": "port0", "bus": "dev0.0", "chardev": "c0", "nr": 1, "name": "org.ebbtide.test"});
            vmm.qmp().execute("device_add", port)?;
            wait_for(vmm, "/dev/vport*p1", true)?;
            // A name that is opened after the device has gone would be that of a new file.
            shell(vmm, "ln -sf $(echo /dev/vport*p1) /port")?;
            let written = file_of_chardev(vmm)?.metadata()?.len();
            keep_on(vmm, "echo tick >&3")?;
            grows(&file_of_chardev(vmm)?, written)
        },
        stop: |vmm| {
            has_ended(vmm)?;
            // The next port would be taken for this one.
            wait_for(vmm, "/dev/vport*p1", false)
        },
        clean_up: |vmm| {
            vmm.qmp().execute("chardev-remove", json!({"id": "c0"}))?;
            Ok(())
        },
    },
    legacy::SERIAL,
    legacy::WATCHDOG,
    legacy::TEST_DEVICE,
    legacy::SHARED_MEMORY,
];

/// Models with I/O BARs: bridges forward no ports.
pub const ROOT_BUS_ONLY: &[&str] = &["pci-serial"];

/// Models whose driver not every kernel has, with the module.
const MODULES: &[(&str, &str)] = &[("i6300esb", "i6300esb.ko")];

impl Model {
    /// The module this guest would need for it and does not have.
    pub fn missing_module(&self, vmm: &mut Vmm) -> Result<Option<&'static str>> {
        let named = MODULES.iter().find(|(driver, _)| *driver == self.driver);
        let Some((_, module)) = named else {
            return Ok(None);
        };
        let list = vmm
            .guest()
            .exec(&["/bin/busybox", "cat", "/modules/list"], STEP_LIMIT)?;
        ensure!(list.code == Some(0), "{list:?}");
        let loaded = list.output.lines().any(|line| line == *module);
        Ok((!loaded).then_some(*module))
    }
}

/// Where the one character device that has a file writes to.
fn file_of_chardev(vmm: &mut Vmm) -> Result<File> {
    let chardevs = vmm.qmp().execute("query-chardev", Value::Null)?;
    let names = chardevs.as_array().context("query-chardev")?.iter();
    let path = names
        .filter_map(|chardev| chardev["filename"].as_str()?.strip_prefix("file:"))
        .next()
        .with_context(|| format!("no file: {chardevs}"))?;
    File::open(path).with_context(|| path.to_owned())
}

/// Waits until a file is longer.
fn grows(file: &File, than: u64) -> Result<()> {
    let begun = Instant::now();
    while file.metadata()?.len() <= than {
        ensure!(begun.elapsed() < GUEST, "the guest's bytes do not arrive");
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Runs a shell command that must succeed.
pub fn shell(vmm: &mut Vmm, script: &str) -> Result<()> {
    let done = vmm
        .guest()
        .exec(&["/bin/busybox", "sh", "-c", script], GUEST)?;
    ensure!(done.code == Some(0), "{script}: {done:?}");
    Ok(())
}

/// Runs `command` again and again until it fails, with /port as its descriptor 3 if there is one. It has gone well when this
/// returns.
pub fn keep_on(vmm: &mut Vmm, command: &str) -> Result<()> {
    if shell(vmm, "[ -c /port ]").is_ok() {
        // Its name is there a moment before the port.
        until(vmm, "the port can be opened", "(true 3<> /port)")?;
    }
    let script = format!(
        "rm -f /done; touch /going; ([ -c /port ] && exec 3<> /port; rm -f /port; while {command}; do echo >> /done; done; \
         rm /going) < /dev/null > /dev/null 2>&1 &"
    );
    shell(vmm, &script)?;
    wait_for(vmm, "/done", true)
}

/// Has the guest read random numbers, from when it has a source of them.
pub fn read_rng(vmm: &mut Vmm) -> Result<()> {
    let is_current = "grep -q virtio /sys/class/misc/hw_random/rng_current";
    until(vmm, "it is the source of random numbers", is_current)?;
    keep_on(vmm, READ_RNG)
}

/// Waits until Linux's driver of SCSI adapters is through with events. It warns when its adapter goes before: that is between
/// the end, or the coming, of a disk, which can be seen, and the buffer it gives back for the next event.
fn events_are_over(vmm: &mut Vmm) -> Result<()> {
    // A thread that has work of a queue is named after the queue.
    let none = "! grep -q '+events_freezable' /proc/[0-9]*/comm 2> /dev/null";
    until(vmm, "events are handled", none)
}

/// What was kept on ends, now that the device has gone: nothing hangs.
pub fn has_ended(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    while shell(vmm, "[ ! -e /going ]").is_err() {
        ensure!(
            begun.elapsed() < GUEST,
            "a command waits for a device that has gone"
        );
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Sets the balloon's size and waits until the guest has it, and until that has been told.
fn balloon(vmm: &mut Vmm, bytes: u64) -> Result<()> {
    vmm.qmp().execute("balloon", json!({"value": bytes}))?;
    let begun = Instant::now();
    loop {
        let answer = vmm.qmp().execute("query-balloon", Value::Null)?;
        let actual = answer["actual"].as_u64().context("actual")?;
        if actual == bytes {
            break;
        }
        if begun.elapsed() > GUEST {
            bail!("the balloon leaves {actual} bytes, not {bytes}");
        }
        std::thread::sleep(LOOK);
    }
    loop {
        let left = GUEST.saturating_sub(begun.elapsed());
        let change = vmm.qmp().wait_event("BALLOON_CHANGE", left)?;
        if change.data == json!({"actual": bytes}) {
            return Ok(());
        }
    }
}

fn disk_image(vmm: &mut Vmm, ground: &Path) -> Result<()> {
    let path = ground.join("image");
    std::fs::File::create(&path)?.set_len(64 * MIB)?;
    let node = json!({"driver": "file", "node-name": "image", "filename": path});
    vmm.qmp().execute("blockdev-add", node)?;
    Ok(())
}

fn node_gone(vmm: &mut Vmm, name: &str) -> Result<()> {
    vmm.qmp()
        .execute("blockdev-del", json!({"node-name": name}))?;
    Ok(())
}

/// Writes and verifies, and goes on with that. Something has been written when this returns.
pub fn write_disk(vmm: &mut Vmm, path: &str) -> Result<()> {
    let (guest, begun) = (vmm.guest(), Instant::now());
    // Each time another: what was written before does not count.
    let seed = SEED.fetch_add(1, Ordering::Relaxed);
    let start = || DiskStart {
        path: path.into(),
        seed,
        verify: true,
        pause_us: 0,
        span_bytes: 0,
    };
    // Its name is there a moment before it can be opened: ENXIO until then.
    while let Err(error) = guest.disk_start(start()) {
        let early = format!("{error:#}").contains("(os error 6)");
        ensure!(early && begun.elapsed() < GUEST, "{error:#}");
        std::thread::sleep(LOOK);
    }
    while guest.disk_status(path)?.writes < WRITES {
        ensure!(begun.elapsed() < GUEST, "it is hardly written to");
        std::thread::sleep(LOOK);
    }
    let verify = Command::DiskVerify { path: path.into() };
    let status: DiskStatus = guest.call(verify, STEP_LIMIT)?;
    ensure!(status.ok && status.bytes_verified > 0, "{status:?}");
    Ok(())
}

/// What was under way has ended, well or with an error. Nothing that was read was wrong, and what was completed is in the
/// file of the node that the disk was on.
pub fn disk_is_gone(vmm: &mut Vmm, path: &str, node: &str) -> Result<()> {
    let stop = Command::DiskStop {
        path: path.into(),
        verify: false,
    };
    let status: DiskStatus = vmm.guest().call(stop, STEP_LIMIT)?;
    ensure!(status.mismatches == 0, "{status:?}");
    ensure!(status.writes > 0, "nothing was written: {status:?}");
    let image = File::open(file_of_node(vmm, node)?).context("the image")?;
    let kept = disk::kept(&image, &status).with_context(|| format!("{path}: {status:?}"))?;
    ensure!(kept > 0, "no write is known to be complete: {status:?}");
    Ok(())
}

/// The file of a block node.
fn file_of_node(vmm: &mut Vmm, name: &str) -> Result<PathBuf> {
    let nodes = vmm.qmp().execute("query-named-block-nodes", Value::Null)?;
    let mut all = nodes.as_array().into_iter().flatten();
    let node = all.find(|node| node["node-name"] == name);
    let file = node.and_then(|node| node["file"].as_str());
    Ok(file.with_context(|| format!("{name}: {nodes}"))?.into())
}
