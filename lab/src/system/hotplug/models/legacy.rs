// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Functions that are not virtio: a serial port, a watchdog, shared memory, a device for tests.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Model;
use crate::system::MIB;
use crate::system::hotplug::{GUEST, deleted, wait_for};
use crate::vmm::Vmm;

pub const SERIAL: Model = Model {
    driver: "pci-serial",
    prepare: answering_peer,
    arguments: || json!({"chardev": "peer"}),
    below: &[],
    present: PORT,
    start: talk,
    stop: |vmm| wait_for(vmm, "/tmp/talked", true),
    clean_up: |vmm| {
        let peer = json!({"id": "peer"});
        vmm.qmp().execute("chardev-remove", peer)?;
        Ok(())
    },
};

pub const WATCHDOG: Model = Model {
    driver: "i6300esb",
    prepare: |vmm, _| {
        let action = json!({"action": "none"});
        vmm.qmp().execute("watchdog-set-action", action)?;
        Ok(())
    },
    arguments: || json!({}),
    below: &[],
    present: "/dev/watchdog0",
    start: kick,
    stop: |vmm| run(vmm, "killall watchdog"),
    clean_up: |vmm| {
        none_has_barked(vmm)?;
        bark(vmm)
    },
};

pub const TEST_DEVICE: Model = Model {
    driver: "pci-testdev",
    prepare: |_, _| Ok(()),
    arguments: || json!({"membar": "64K"}),
    below: &[],
    // Nothing is there without one that has the id.
    present: "$(/bin/busybox grep -lx 0x0005 /sys/bus/pci/devices/*/device)",
    start: write_registers,
    stop: |vmm| wait_for(vmm, "/tmp/done", true),
    clean_up: |_| Ok(()),
};

pub const SHARED_MEMORY: Model = Model {
    driver: "ivshmem-plain",
    prepare: shared_file,
    arguments: || json!({"memdev": "shared"}),
    below: &[],
    present: "$(/bin/busybox grep -lx 0x1110 /sys/bus/pci/devices/*/device)",
    start: share,
    stop: |vmm| wait_for(vmm, "/tmp/shared", true),
    clean_up: |vmm| {
        vmm.qmp().execute("object-del", json!({"id": "shared"}))?;
        std::fs::remove_file(shared_path(vmm))?;
        Ok(())
    },
};

/// Where the kernel shows the port, before 6.5 and since.
const PORT: &str = "/sys/bus/pci/devices/*/tty/ttyS* /sys/bus/pci/devices/*/*:0/*:0.0/tty/ttyS*";

/// What a watchdog has until it barks: longer than a guest's process may stand still.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Time between two answers to noise.
const ANSWERS: Duration = Duration::from_millis(200);

fn peer_path(vmm: &Vmm) -> PathBuf {
    vmm.qmp_path().with_file_name("peer.sock")
}

/// A character device with a client.
fn answering_peer(vmm: &mut Vmm, _: &Path) -> Result<()> {
    let path = peer_path(vmm);
    let address = json!({"type": "unix", "data": {"path": path}});
    let backend = json!({"type": "socket", "data": {"addr": address}});
    let add = json!({"id": "peer", "backend": backend});
    vmm.qmp().execute("chardev-add", add)?;
    let client = UnixStream::connect(&path).context("the chardev's socket")?;
    // A guest that does not read keeps nobody from being read.
    client.set_write_timeout(Some(Duration::from_millis(50)))?;
    std::thread::spawn(move || answer(client));
    Ok(())
}

/// Answers what the guest says, until the connection is gone: its words at once, the rest of its noise now and then. What
/// a terminal echoes is not answered, or that would go on without end.
fn answer(client: UnixStream) -> Option<()> {
    let mut answers = client.try_clone().ok()?;
    let mut last = Instant::now();
    for line in BufReader::new(client).split(b'\n').map_while(Result::ok) {
        // A port that goes may leave half a line behind, to which the next adds its own.
        let heard = match &line[..] {
            b"out" if last.elapsed() > ANSWERS => "out",
            line if line.ends_with(b"over and") => "over and",
            _ => continue,
        };
        last = Instant::now();
        // What can't be sent in time is not sent.
        let _ = answers.write_all(format!("heard {heard}\n").as_bytes());
    }
    Some(())
}

/// A line goes to the peer and its answer comes back; then lines go there without end, with pauses. Without them a guest under
/// emulation was seen to stay in its interrupt handler: the port sends as fast as it is written to, at no baud rate.
fn talk(vmm: &mut Vmm) -> Result<()> {
    let script = format!(
        "rm -f /tmp/talked
         for t in {PORT}; do [ -e $t ] && dev=/dev/${{t##*/}}; done
         # Its name is there a moment before the port.
         until [ -c $dev ] && stty -F $dev raw -echo; do usleep 20000; done
         exec 3<>$dev
         echo over and >&3
         while read -r -t 10 answer <&3; do
             case $answer in *'heard over and') heard=1; break;; esac
         done
         [ $heard ] || exit 2
         (while echo out >&3; do usleep 20000; done; touch /tmp/talked) </dev/null >/dev/null 2>&1 &
         (while read -r answer <&3; do :; done) </dev/null >/dev/null 2>&1 &
         sleep 0.2"
    );
    run(vmm, &script)
}

/// It is kicked twice a second, beyond its end.
fn kick(vmm: &mut Vmm) -> Result<()> {
    let seconds = TIMEOUT.as_secs();
    run(
        vmm,
        &format!("watchdog -T {seconds} -t 500ms /dev/watchdog0 > /dev/null 2>&1 && sleep 1"),
    )
}

/// None of those that went did, in their time or after their end.
fn none_has_barked(vmm: &mut Vmm) -> Result<()> {
    std::thread::sleep(TIMEOUT + Duration::from_secs(1));
    let events = vmm.qmp().take_events()?;
    let barks = events.iter().filter(|e| e.name == "WATCHDOG").count();
    ensure!(barks == 0, "{barks} times WATCHDOG");
    Ok(())
}

/// One that is not kicked barks, once what it does is settled; and says nothing any more when it is gone.
fn bark(vmm: &mut Vmm) -> Result<()> {
    let device = json!({"driver": "i6300esb", "id": "dev0"});
    vmm.qmp().execute("device_add", device)?;
    wait_for(vmm, "/dev/watchdog0", true)?;
    // Killed, it has no time to say that it goes on purpose.
    run(
        vmm,
        "watchdog -T 2 -t 500ms /dev/watchdog0 > /dev/null 2>&1 && sleep 1 && killall -9 watchdog",
    )?;
    let barked = vmm.qmp().wait_event("WATCHDOG", GUEST)?;
    ensure!(barked.data["action"] == "none", "{}", barked.data);
    vmm.qmp().execute("device_del", json!({"id": "dev0"}))?;
    deleted(vmm, "dev0")?;
    wait_for(vmm, "/dev/watchdog0", false)
}

/// A test of the device is run, once it has its addresses, and its count is right; then its registers are read and written
/// without end.
fn write_registers(vmm: &mut Vmm) -> Result<()> {
    run(
        vmm,
        "rm -f /tmp/done
         dev=$(grep -lx 0x0005 /sys/bus/pci/devices/*/device); dev=${dev%/device}
         until echo 1 > $dev/enable; do usleep 20000; done
         set -- $(head -n 1 $dev/resource); bar=$1
         devmem $bar 8 0
         test $(devmem $bar 8) = 0x00 || exit 1
         offset=$(devmem $((bar + 4)) 32)
         data=$(devmem $((bar + 8)) 32)
         for n in 1 2 3; do devmem $((bar + offset)) 8 $((data & 255)); done
         count=$(devmem $((bar + 12)) 32)
         test $((count)) = 3 || { echo $count writes counted; exit 2; }
         (while [ -e $dev ]; do devmem $((bar + offset)) 8 $((data & 255)); devmem $bar 8; done
          touch /tmp/done) </dev/null >/dev/null 2>&1 &
         sleep 0.2",
    )
}

fn shared_path(vmm: &Vmm) -> PathBuf {
    vmm.qmp_path().with_file_name("shared")
}

fn shared_file(vmm: &mut Vmm, _: &Path) -> Result<()> {
    let path = shared_path(vmm);
    File::create(&path)?.set_len(MIB)?;
    let backend = json!({"qom-type": "memory-backend-file", "id": "shared", "size": MIB,
        "mem-path": path, "share": true});
    vmm.qmp().execute("object-add", backend)?;
    Ok(())
}

/// Host and guest see what the other writes, once it has its addresses; then the guest goes on with that.
fn share(vmm: &mut Vmm) -> Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(shared_path(vmm))?;
    file.write_all_at(b"ebb ", 0)?;
    run(
        vmm,
        "rm -f /tmp/shared
         dev=$(grep -lx 0x1110 /sys/bus/pci/devices/*/device); dev=${dev%/device}
         until echo 1 > $dev/enable; do usleep 20000; done
         set -- $(sed -n 3p $dev/resource); memory=$1
         test $(devmem $memory 32) = 0x20626265 || exit 1
         devmem $((memory + 4)) 32 0x65646974
         (while [ -e $dev ]; do devmem $((memory + 8)) 32 7; devmem $memory 32; done
          touch /tmp/shared) </dev/null >/dev/null 2>&1 &
         sleep 0.2",
    )?;
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(
        &bytes == b"ebb tide",
        "{:?}",
        String::from_utf8_lossy(&bytes)
    );
    file.write_all_at(&[0; 8], 0)?;
    Ok(())
}

/// Runs a script in the guest, which must succeed. It has all programs of busybox.
pub(super) fn run(vmm: &mut Vmm, script: &str) -> Result<()> {
    let script = format!(
        "/bin/busybox mkdir -p /tmp/bin && /bin/busybox --install -s /tmp/bin
         export PATH=/tmp/bin
         {script}"
    );
    let done = vmm
        .guest()
        .exec(&["/bin/busybox", "sh", "-c", &script], GUEST)?;
    ensure!(done.code == Some(0), "{done:?}");
    Ok(())
}
