// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cards on passt, plugged into a machine that is confined and may start no program itself.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use flate2::Crc;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};

use super::super::hotplug::{GUEST, LOOK, Residue, peer, shell, until as guest_until, wait_for};
use super::super::{BOOT, Ground, STEP_LIMIT, finish};
use super::{command, ctl};
use crate::packages::static_busybox;
use crate::vmm::Vmm;

/// A network of its own, whatever the host has: of the host's interfaces it needs none but the loopback.
const NETWORK: &str = "passt,interface=lo,address=10.0.2.15,netmask=24,gateway=10.0.2.2,mac=52:55:0a:00:02:02,dns=none,ipv6=off";
const CYCLES: u32 = 3;
/// What is left behind is looked for from here on: the first cycle fills caches.
const SETTLED: u32 = 1;
/// How often a mistake is made that comes out too late.
const TRIES: u32 = 3;
/// What tap interfaces are made by, and the name of one.
const TAPS: &str = "/dev/net/tun";
const TAP: &str = "ebbtide-test0";
/// What each card has to carry.
const SENT_BYTES: usize = 256 << 10;
/// What the guest's DHCP client does with what it is offered.
const LEASE: &str = "#!/bin/sh\n[ \"$1\" = bound ] && ip addr add $ip/24 dev $interface && ip route add default via $router\nexit 0\n";

/// Cards come, are used, and go; passt is told wrong things, dies, and ends with its machine.
pub fn user_network(ground: &Ground) -> Result<()> {
    let mut vmm = ground.start(&ground.machine(1, BOOT))?;
    is_confined(&vmm_pid(&mut vmm))?;
    let launcher = launcher_of(&mut vmm)?;
    let port = summing_server()?;
    shell(
        &mut vmm,
        &format!("printf '%s' '{LEASE}' > /lease && chmod 755 /lease"),
    )?;
    let mut settled = None;
    for cycle in 0..CYCLES {
        one_cycle(ground, &mut vmm, launcher, port).with_context(|| format!("cycle {cycle}"))?;
        if cycle == SETTLED {
            settled = Some((Residue::of(&mut vmm)?, files(launcher)?));
        }
    }
    let (residue, opened) = settled.context("no cycle has settled it")?;
    residue.again(&mut vmm)?;
    let more = format!("the launcher had {opened} files, and has not again");
    until(&more, || Ok(files(launcher)? == opened))?;
    other_networks(ground, &mut vmm).context("not of passt")?;
    mistakes(ground, &mut vmm, launcher).context("mistakes")?;
    death(ground, &mut vmm, launcher).context("passt is killed")?;
    // It is there at the end.
    add(ground, &vmm, NETWORK, 0)?;
    let passt = only_child(launcher)?;
    finish(vmm)?;
    ensure!(!runs(passt), "passt outlives the VM");
    until("the launcher outlives the VM", || Ok(!runs(launcher)))?;
    for signal in [Signal::KILL, Signal::INT] {
        ends_with(ground, signal).with_context(|| format!("{signal:?}"))?;
    }
    Ok(())
}

fn add(ground: &Ground, vmm: &Vmm, network: &str, code: i32) -> Result<Value> {
    ctl(ground, vmm, &added(network), code)
}

fn added(network: &str) -> [&str; 7] {
    let mac = "52:54:00:00:00:02";
    ["net", "add", network, "--id", "nic0", "--mac", mac]
}

fn remove(ground: &Ground, vmm: &mut Vmm, launcher: Pid) -> Result<()> {
    gone(ground, vmm)?;
    let left = children(launcher)?;
    ensure!(left.is_empty(), "{left:?} are left");
    Ok(())
}

fn gone(ground: &Ground, vmm: &mut Vmm) -> Result<()> {
    let words = ["net", "remove", "nic0", "--wait", "--timeout", "30"];
    let gone = ctl(ground, vmm, &words, 0)?;
    ensure!(gone["result"] == json!("deleted"), "{gone}");
    wait_for(vmm, "/sys/class/net/eth0", false)
}

/// An address by DHCP, bytes to a server on the host and its answer.
fn one_cycle(ground: &Ground, vmm: &mut Vmm, launcher: Pid, port: u16) -> Result<()> {
    add(ground, vmm, NETWORK, 0)?;
    only_child(launcher)?;
    wait_for(vmm, "/sys/class/net/eth0", true)?;
    slowly(
        vmm,
        "ip link set eth0 up && udhcpc -n -q -f -t 20 -i eth0 -s /lease",
    )?;
    shell(vmm, "ip addr show eth0 | grep -q 'inet 10.0.2.15/24'")?;
    // The client's input stays open: to who has closed his half, a passt of 2023 sends again and again what it has sent.
    slowly(
        vmm,
        &format!(
            "dd if=/dev/urandom of=/sent bs={SENT_BYTES} count=1 iflag=fullblock; rm -f /pipe; mkfifo /pipe; exec 3<> /pipe; \
             cat /sent > /pipe & timeout 120 nc 10.0.2.2 {port} < /pipe > /got; [ \"$(cat /got)\" = \"$(crc32 < /sent)\" ]"
        ),
    )?;
    remove(ground, vmm, launcher)
}

/// Runs a shell command that must succeed, and for which others have to work.
fn slowly(vmm: &mut Vmm, script: &str) -> Result<()> {
    let words = ["/bin/busybox", "sh", "-c", script];
    let done = vmm.guest().exec(&words, STEP_LIMIT)?;
    ensure!(done.code == Some(0), "{script}: {done:?}");
    Ok(())
}

/// A socket, and a tap interface where this machine has them: an echo from the other end.
fn other_networks(ground: &Ground, vmm: &mut Vmm) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("net");
    peer::serve(UnixListener::bind(&path)?);
    let network = format!("stream,addr.type=unix,addr.path={}", path.display());
    add(ground, vmm, &network, 0)?;
    echoes(vmm, "10.0.0.2", "10.0.0.1")?;
    gone(ground, vmm)?;
    if let Err(error) = File::options().read(true).write(true).open(TAPS) {
        println!("{:<5} tap: NOT TRIED, {TAPS}: {error}", ground.series);
        return Ok(());
    }
    add(ground, vmm, &format!("tap,ifname={TAP}"), 0)?;
    let address = ["addr", "add", "10.0.1.1/24", "dev", TAP];
    for words in [&address[..], &["link", "set", TAP, "up"]] {
        let busybox = static_busybox()?;
        let done = Command::new(busybox).arg("ip").args(words).output()?;
        ensure!(done.status.success(), "ip {words:?}: {done:?}");
    }
    echoes(vmm, "10.0.1.2", "10.0.1.1")?;
    gone(ground, vmm)?;
    // The kernel takes it away a moment after its last descriptor was closed.
    let interface = Path::new("/sys/class/net").join(TAP);
    until("the interface is left", || Ok(!interface.exists()))
}

/// The station at the other end of the guest's card answers.
fn echoes(vmm: &mut Vmm, own: &str, station: &str) -> Result<()> {
    wait_for(vmm, "/sys/class/net/eth0", true)?;
    shell(
        vmm,
        &format!("ip link set eth0 up && ip addr add {own}/24 dev eth0"),
    )?;
    link(vmm, true)?;
    shell(vmm, &format!("ping -c 2 -W 5 {station}"))
}

/// What is wrong is said with the reason, and leaves nothing.
fn mistakes(ground: &Ground, vmm: &mut Vmm, launcher: Pid) -> Result<()> {
    for (network, part) in [
        ("passt,path=/bin/sh", "/bin/sh"),
        ("passt,param.0.str=--pcap=/tmp/x", "--pcap=/tmp/x"),
        ("passt,interface=nosuch", "nosuch"),
        ("passt,colour=red", "colour"),
        ("passt,address=10.0.2.15,address=10.0.2.16", "address"),
    ] {
        let usage = network.matches("address").count() > 1;
        let refused = refused(ground, vmm, network, if usage { 2 } else { 1 })?;
        ensure!(refused.contains(part), "{network}: {refused}");
        let left = children(launcher)?;
        ensure!(left.is_empty(), "{network}: {left:?} are left");
    }
    let backend = json!({"id": "net-nic0"});
    ensure!(vmm.qmp().execute("netdev_del", backend).is_err());
    Ok(())
}

/// Why a network is refused. A passt that has not come to its end within a second is taken to work: then once more.
fn refused(ground: &Ground, vmm: &mut Vmm, network: &str, code: i32) -> Result<String> {
    for _ in 1..TRIES {
        let mut command = command(ground, vmm, &added(network));
        let output = command.output()?;
        if output.status.code() == Some(code) {
            return Ok(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        ensure!(output.status.success(), "{network}: {output:?}");
        println!("      {network} had not failed in time: once more");
        gone(ground, vmm)?;
    }
    Ok(add(ground, vmm, network, code)?.to_string())
}

/// To the guest the cable is pulled; management is told; the card goes as any other.
fn death(ground: &Ground, vmm: &mut Vmm, launcher: Pid) -> Result<()> {
    add(ground, vmm, NETWORK, 0)?;
    wait_for(vmm, "/sys/class/net/eth0", true)?;
    shell(vmm, "ip link set eth0 up")?;
    link(vmm, true)?;
    vmm.qmp().take_events()?;
    kill_process(only_child(launcher)?, Signal::KILL)?;
    let event = vmm.qmp().wait_event("NETDEV_STREAM_DISCONNECTED", GUEST)?;
    ensure!(event.data["netdev-id"] == json!("net-nic0"), "{event:?}");
    link(vmm, false)?;
    until("the log does not say how it ended", || {
        vmm.has_said(&["it was ended by signal 9"])
    })?;
    remove(ground, vmm, launcher)
}

/// Waits until the guest's driver, which hears of it on a thread of its own, has the link up or down.
fn link(vmm: &mut Vmm, up: bool) -> Result<()> {
    let test = format!("[ $(cat /sys/class/net/eth0/carrier) = {} ]", u8::from(up));
    guest_until(vmm, "the link is as it should be", &test)
}

/// A machine with a card from the start is ended from outside, by a signal for it and all that a terminal would send it to.
fn ends_with(ground: &Ground, signal: Signal) -> Result<()> {
    let mut machine = ground.machine(1, BOOT);
    let netdev = format!("{NETWORK},id=n0");
    for word in ["--netdev", &netdev, "--device", "virtio-net-pci,netdev=n0"] {
        machine.more.push(word.to_owned());
    }
    let mut vmm = Vmm::start(&machine)?;
    let launcher = launcher_of(&mut vmm)?;
    let passt = only_child(launcher)?;
    let group = Pid::from_raw(vmm.process().pid().try_into()?).context("pid")?;
    kill_process_group(group, signal)?;
    let ended = vmm.wait_exit(STEP_LIMIT)?;
    ensure!(ended.success() == (signal == Signal::INT), "{ended}");
    until("passt or its launcher is left", || {
        Ok(!runs(passt) && !runs(launcher))
    })
}

/// A server on the loopback that answers each [`SENT_BYTES`] it gets with their CRC, and closes the connection; its port.
fn summing_server() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut bytes = vec![0; SENT_BYTES];
            // The guest compares what it gets: what fails here shows there.
            let _ = stream.read_exact(&mut bytes).and_then(|()| {
                let mut sum = Crc::new();
                sum.update(&bytes);
                writeln!(stream, "{:08x}", sum.sum())
            });
        }
    });
    Ok(port)
}

fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !so()? {
        ensure!(begun.elapsed() < GUEST, "{what}");
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn vmm_pid(vmm: &mut Vmm) -> String {
    vmm.process().pid().to_string()
}

fn is_confined(pid: &str) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(status.contains("\nSeccomp:\t2\n"), "{status}");
    Ok(())
}

/// The processes whose parent is `parent`, with their names.
fn children(parent: Pid) -> Result<Vec<(Pid, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")?.flatten() {
        // One that ends meanwhile is none that stays.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let mut lines = status.lines();
            lines
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        let is_child = field("PPid:") == Some(&parent.as_raw_nonzero().to_string());
        let pid = field("Pid:").and_then(|it| it.parse().ok());
        if let (true, Some(pid)) = (is_child, pid.and_then(Pid::from_raw)) {
            found.push((pid, field("Name:").unwrap_or_default().to_owned()));
        }
    }
    Ok(found)
}

fn launcher_of(vmm: &mut Vmm) -> Result<Pid> {
    let pid = Pid::from_raw(vmm.process().pid().try_into()?).context("pid")?;
    let begun = Instant::now();
    loop {
        match &*children(pid)? {
            [(launcher, name)] if name == "passt-launcher" => return Ok(*launcher),
            // It gives itself its name.
            [_] if begun.elapsed() < GUEST => std::thread::sleep(LOOK),
            others => bail!("the machine has {others:?} beside it, not one launcher"),
        }
    }
}

fn only_child(launcher: Pid) -> Result<Pid> {
    match &*children(launcher)? {
        [(passt, name)] if name.starts_with("passt") => Ok(*passt),
        others => bail!("the launcher has {others:?}, not one passt"),
    }
}

/// Whether it is more than a process that nobody has waited for.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// How many descriptors a process has.
fn files(pid: Pid) -> Result<usize> {
    let entries = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).context("fd")?;
    let names: BTreeSet<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    Ok(names.len())
}
