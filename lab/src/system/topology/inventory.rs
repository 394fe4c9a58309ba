// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What management says of the hierarchy is what the guest sees of it; links and failures are told to each other.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    add, add_node, announce, ask, disk, disk_path, downstream, machine, output, read, until,
};
use crate::deny;
use crate::system::hotplug::{GUEST, LOOK, deleted, peer, shell, wait_for};
use crate::system::{Ground, STEP_LIMIT};
use crate::vmm::Vmm;

/// A tree on both sides, before and after part of it has gone; a cable; a disk that fails.
pub fn inventory(ground: &Ground) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut machine = machine(ground, 12);
    for port in ["ioh3420,id=rp2,addr=4", "pcie-root-port,id=empty"] {
        machine.more.extend(["--device".into(), port.into()]);
    }
    let mut vmm = ground.start(&machine)?;
    populate(&mut vmm, &directory.path().join("net"))?;
    become_the_same(&mut vmm).context("all of it")?;
    numbers(&mut vmm, "7 9").context("acpi-index")?;
    blocks(&mut vmm)?;
    threads(&mut vmm)?;
    cable(&mut vmm)?;
    failure(&mut vmm)?;
    reported_error(&mut vmm).context("pcie_aer_inject_error")?;
    let path = disk_path(&mut vmm, "d0")?;
    ask(&mut vmm, "d0")?;
    deleted(&mut vmm, "d0")?;
    wait_for(&mut vmm, &path.replace("/dev/", "/sys/block/"), false)?;
    become_the_same(&mut vmm).context("without a disk")?;
    // It is free again with its device.
    let again = json!({"driver": "pci-testdev", "id": "again", "acpi-index": 9});
    add(&mut vmm, &again)?;
    let found = "[ \"$(cat /sys/bus/pci/devices/*/acpi_index | sort -n | xargs)\" = '7 9' ]";
    until(&mut vmm, "the next device has the number", found)?;
    only_that_failure(&mut vmm)?;
    vmm.power_off(STEP_LIMIT)
}

fn populate(vmm: &mut Vmm, socket: &std::path::Path) -> Result<()> {
    peer::serve(UnixListener::bind(socket)?);
    let address = json!({"type": "unix", "path": socket});
    let netdev = json!({"type": "stream", "id": "net0", "addr": address});
    vmm.qmp().execute("netdev_add", netdev)?;
    let medium = |node: &str| json!({"driver": "null-co", "node-name": node, "size": 64 << 20});
    let rules = ["fault=fail,errno=28,op=write"];
    let failing =
        json!({"driver": "x-ebbtide-fault", "node-name": "n0", "file": "m0", "rules": rules});
    for node in [medium("m0"), failing, medium("n1"), medium("n2")] {
        add_node(vmm, node)?;
    }
    let mut switch = json!({"driver": "x3130-upstream", "id": "sw", "bus": "rp1"});
    switch["x-ebbtide-announce"] = json!(false);
    add(vmm, &switch)?;
    add(vmm, &downstream("dp0", "sw"))?;
    add(vmm, &downstream("dp1", "sw"))?;
    add(
        vmm,
        &json!({"driver": "pci-bridge", "id": "br", "bus": "dp0"}),
    )?;
    add(vmm, &disk("d1", "br", "n1"))?;
    announce(vmm, "sw")?;
    let mut root_disk = disk("d0", "pcie.0", "n0");
    root_disk["acpi-index"] = json!(9);
    add(vmm, &root_disk)?;
    add(vmm, &disk("d2", "dp1", "n2"))?;
    let card = json!({"driver": "virtio-net-pci", "id": "nic", "netdev": "net0", "bus": "rp2"});
    add(vmm, &card)?;
    add(
        vmm,
        &json!({"driver": "pci-testdev", "id": "test", "membar": "64K", "acpi-index": 7}),
    )?;
    for id in ["d0", "d1", "d2"] {
        read(vmm, id)?;
    }
    wait_for(vmm, "/sys/class/net/eth0", true)
}

/// The guest finds these instance numbers, and the monitor tells them; no other device may have one of them.
fn numbers(vmm: &mut Vmm, expected: &str) -> Result<()> {
    let found = output(vmm, "cat /sys/bus/pci/devices/*/acpi_index | sort -n")?;
    let found = found.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(found == expected, "the guest has {found}");
    let line = json!({"command-line": "info qtree"});
    let text = vmm.qmp().execute("human-monitor-command", line)?;
    let text = text.as_str().unwrap_or_default();
    for number in expected.split(' ') {
        let number = number.parse()?;
        let shown = text.contains(&format!("acpi-index = {number}"));
        ensure!(shown, "info qtree: {text}");
        refused(vmm, number, "pcie.0", "has it")?;
    }
    refused(vmm, 8, "empty", "no slots of ACPI")?;
    refused(vmm, 16384, "pcie.0", "the largest is 16383")
}

fn refused(vmm: &mut Vmm, number: u64, bus: &str, why: &str) -> Result<()> {
    let device = json!({"driver": "pci-testdev", "id": "more", "bus": bus, "acpi-index": number});
    let answer = vmm.qmp().execute("device_add", device);
    let error = answer.err().context("it was taken")?.to_string();
    ensure!(error.contains(why), "{error}");
    Ok(())
}

/// A function, as either side describes it: attributes by name.
type Function = BTreeMap<&'static str, String>;

/// Soon both sides agree: the guest takes a moment to find what is plugged, to give it addresses and to turn it on.
fn become_the_same(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let compared = same_on_both_sides(vmm);
        if compared.is_ok() || begun.elapsed() > GUEST {
            return compared;
        }
        std::thread::sleep(LOOK);
    }
}

/// The guest's sysfs and `query-pci` describe the same functions; `info pci` names them.
fn same_on_both_sides(vmm: &mut Vmm) -> Result<()> {
    let answer = vmm.qmp().execute("query-pci", Value::Null)?;
    let mut managed = BTreeMap::new();
    for bus in answer.as_array().context("query-pci")? {
        managed_functions(&bus["devices"], &mut managed)?;
    }
    let seen = seen_functions(vmm)?;
    let names = |functions: &BTreeMap<String, Function>| {
        functions.keys().cloned().collect::<Vec<_>>().join(" ")
    };
    ensure!(
        names(&managed) == names(&seen),
        "query-pci has {}, the guest {}",
        names(&managed),
        names(&seen)
    );
    for (address, function) in &managed {
        ensure!(
            Some(function) == seen.get(address),
            "{address}: query-pci says {function:#?}, the guest {:#?}",
            seen.get(address)
        );
    }
    ensure!(managed.len() > 8, "too few: {}", names(&managed));
    let line = json!({"command-line": "info pci"});
    let text = vmm.qmp().execute("human-monitor-command", line)?;
    let text = text.as_str().unwrap_or_default();
    let functions = text.matches("device").count();
    for id in ["sw", "dp0", "br", "d1", "nic", "test"] {
        ensure!(text.contains(&format!("id \"{id}\"")), "{id}: {text}");
    }
    ensure!(functions >= managed.len(), "{functions} functions: {text}");
    Ok(())
}

fn managed_functions(devices: &Value, all: &mut BTreeMap<String, Function>) -> Result<()> {
    for device in devices.as_array().into_iter().flatten() {
        let number = |name: &str| device[name].as_u64().with_context(|| name.to_owned());
        let address = format!(
            "0000:{:02x}:{:02x}.{:x}",
            number("bus")?,
            number("slot")?,
            number("function")?
        );
        let id = &device["id"];
        let hex = |value: &Value| value.as_u64().map(|value| format!("{value:#06x}"));
        let mut function = Function::new();
        let mut say = |name, value: Option<String>| value.map(|value| function.insert(name, value));
        say("vendor", hex(&id["vendor"]));
        say("device", hex(&id["device"]));
        say("subsystem", hex(&id["subsystem"]));
        say("subsystem vendor", hex(&id["subsystem-vendor"]));
        let class = device["class_info"]["class"].as_u64();
        say("class", class.map(|class| format!("{class:#06x}")));
        say("BARs", Some(managed_bars(&device["regions"])));
        let bridge = &device["pci_bridge"];
        if !bridge.is_null() {
            let bus = &bridge["bus"];
            say("secondary", Some(bus["secondary"].to_string()));
            say("subordinate", Some(bus["subordinate"].to_string()));
            say("window", range(&bus["memory_range"]));
            say("prefetchable window", range(&bus["prefetchable_range"]));
            managed_functions(&bridge["devices"], all)?;
        }
        all.insert(address, function);
    }
    Ok(())
}

fn managed_bars(regions: &Value) -> String {
    let bars = regions.as_array().into_iter().flatten().map(|bar| {
        let (start, size) = (bar["address"].as_u64(), bar["size"].as_u64());
        let last = start.zip(size).map(|(start, size)| start + size - 1);
        format!("{} {start:x?}..{last:x?}", bar["bar"])
    });
    bars.collect::<Vec<_>>().join(", ")
}

/// A window; None: it is closed.
fn range(range: &Value) -> Option<String> {
    let (base, limit) = (range["base"].as_u64()?, range["limit"].as_u64()?);
    (base < limit).then(|| format!("{base:x}..{limit:x}"))
}

/// What the guest's kernel has found.
fn seen_functions(vmm: &mut Vmm) -> Result<BTreeMap<String, Function>> {
    const ATTRIBUTES: &str = "vendor device class subsystem_vendor subsystem_device secondary_bus_number subordinate_bus_number";
    let script = format!(
        "cd /sys/bus/pci/devices; for d in *; do echo function $d; for a in {ATTRIBUTES}; do [ -e $d/$a ] && echo $a $(cat $d/$a); done; \
         echo command $(od -An -tx2 -j4 -N2 $d/config); \
         sed 's/^/resource /' $d/resource; done"
    );
    let text = output(vmm, &script)?;
    let mut all = BTreeMap::new();
    for part in text.split("function ").filter(|part| !part.is_empty()) {
        let (address, rest) = part.split_once('\n').context("no attributes")?;
        all.insert(address.to_owned(), seen_function(rest)?);
    }
    Ok(all)
}

fn seen_function(text: &str) -> Result<Function> {
    /// Where in the list of resources those of bridges begin: I/O, memory, prefetchable.
    const WINDOWS: usize = 13;
    const BARS: usize = 6;
    const MEMORY_ENABLE: u16 = 2;
    let value = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
    };
    let bridge = value("secondary_bus_number").is_some();
    let mut function = Function::new();
    let mut say = |name, value: Option<String>| value.map(|value| function.insert(name, value));
    let word = |name| value(name).map(str::to_owned);
    say("vendor", word("vendor"));
    say("device", word("device"));
    // Without the programming interface.
    say(
        "class",
        value("class")
            .and_then(|class| class.get(..6))
            .map(str::to_owned),
    );
    if !bridge {
        say("subsystem", word("subsystem_device"));
        say("subsystem vendor", word("subsystem_vendor"));
    }
    say("secondary", word("secondary_bus_number"));
    say("subordinate", word("subordinate_bus_number"));
    let resources: Vec<Option<(u64, u64)>> = text
        .lines()
        .filter_map(|line| line.strip_prefix("resource "))
        .map(resource)
        .collect::<Result<_>>()?;
    // What no driver has turned on has addresses to the guest only.
    let command = u16::from_str_radix(value("command").context("command")?, 16)?;
    let mapped = |address: u64| (command & MEMORY_ENABLE != 0).then_some(address);
    let used = resources.iter().take(BARS).enumerate();
    let bars = used.filter_map(|(index, used)| {
        let (start, last) = (*used)?;
        Some(format!("{index} {:x?}..{:x?}", mapped(start), mapped(last)))
    });
    say("BARs", Some(bars.collect::<Vec<_>>().join(", ")));
    let window = |index: usize| {
        let (start, last) = (*resources.get(WINDOWS + index)?)?;
        Some(format!("{start:x}..{last:x}"))
    };
    if bridge {
        say("window", window(1));
        say("prefetchable window", window(2));
    }
    Ok(function)
}

/// A line of the file `resource`: first and last address, flags. None: nothing is there.
fn resource(line: &str) -> Result<Option<(u64, u64)>> {
    let number = |word: Option<&str>| -> Result<u64> {
        let word = word.with_context(|| line.to_owned())?;
        Ok(u64::from_str_radix(word.trim_start_matches("0x"), 16)?)
    };
    let mut words = line.split_whitespace();
    let (start, last, flags) = (
        number(words.next())?,
        number(words.next())?,
        number(words.next())?,
    );
    Ok((flags != 0 && last > start).then_some((start, last)))
}

fn blocks(vmm: &mut Vmm) -> Result<()> {
    let answer = vmm.qmp().execute("query-block", Value::Null)?;
    let line = json!({"command-line": "info block"});
    let text = vmm.qmp().execute("human-monitor-command", line)?;
    for (id, node) in [("d0", "n0"), ("d1", "n1"), ("d2", "n2")] {
        let mut all = answer.as_array().into_iter().flatten();
        let named = |it: &&Value| {
            it["qdev"].as_str().is_some_and(|path| path.ends_with(id)) || it["device"] == id
        };
        let entry = all.find(named).with_context(|| format!("{id}: {answer}"))?;
        let image = &entry["inserted"];
        ensure!(
            image["node-name"] == node && image["image"]["virtual-size"] == 64 << 20,
            "{id}: {entry}"
        );
        let text = text.as_str().unwrap_or_default();
        ensure!(text.contains(node), "{node}: {text}");
    }
    Ok(())
}

/// An iothread is listed with the thread that it is, as long as there is one.
fn threads(vmm: &mut Vmm) -> Result<()> {
    let object = json!({"qom-type": "iothread", "id": "io0"});
    vmm.qmp().execute("object-add", object)?;
    let listed = vmm.qmp().execute("query-iothreads", Value::Null)?;
    let thread = &listed[0]["thread-id"];
    let pid = vmm.process().pid();
    let name = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"));
    let name = name.with_context(|| listed.to_string())?;
    ensure!(
        listed[0]["id"] == "io0" && name.trim() == "io0",
        "{name}: {listed}"
    );
    vmm.qmp().execute("object-del", json!({"id": "io0"}))?;
    let listed = vmm.qmp().execute("query-iothreads", Value::Null)?;
    ensure!(listed == json!([]), "{listed}");
    Ok(())
}

/// The guest's carrier follows the cable.
fn cable(vmm: &mut Vmm) -> Result<()> {
    shell(
        vmm,
        "ip link set eth0 up && ip addr add 10.0.0.2/24 dev eth0",
    )?;
    let carrier = |up: u8| format!("[ $(cat /sys/class/net/eth0/carrier) = {up} ]");
    for up in [true, false, true] {
        let link = json!({"name": "nic", "up": up});
        vmm.qmp().execute("set_link", link)?;
        until(vmm, "the carrier follows", &carrier(up.into()))?;
        let ping = "ping -c 1 -W 2 10.0.0.1";
        match up {
            true => until(vmm, "the peer answers", ping)?,
            false => ensure!(shell(vmm, ping).is_err(), "answered without a cable"),
        }
    }
    super::refused(vmm, "set_link", json!({"name": "nope", "up": true}), "nope")
}

/// A write fails in the guest; management is told of which disk, and why.
fn failure(vmm: &mut Vmm) -> Result<()> {
    let path = disk_path(vmm, "d0")?;
    let write = format!("! dd if=/dev/zero of={path} bs=4k count=1 oflag=direct");
    shell(vmm, &write).context("the write goes well")?;
    let event = vmm.qmp().wait_event("BLOCK_IO_ERROR", GUEST)?;
    let data = &event.data;
    ensure!(
        data["qom-path"] == "/machine/peripheral/d0"
            && data["node-name"] == "n0"
            && data["operation"] == "write"
            && data["action"] == "report"
            && data["nospace"] == true,
        "{data}"
    );
    std::thread::sleep(Duration::from_millis(200));
    Ok(())
}

/// The guest's kernel says so, too, and complains of nothing else.
/// A port's corrected error is counted by the guest's driver; what can't be injected is refused.
fn reported_error(vmm: &mut Vmm) -> Result<()> {
    let inject = |vmm: &mut Vmm, words: &str| -> Result<String> {
        let line = json!({"command-line": format!("pcie_aer_inject_error {words}")});
        let answer = vmm.qmp().execute("human-monitor-command", line)?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    };
    let answer = inject(vmm, "dp1 REP_TIMER")?;
    ensure!(
        answer.starts_with("OK id: dp1 root bus: pcie.0, bus: "),
        "{answer}"
    );
    let counted = "[ $(cat /sys/bus/pci/devices/*/aer_dev_correctable | grep -c 'Timeout 1') = 1 ]";
    until(vmm, "the guest counts the error", counted)?;
    for (words, why) in [
        ("d2 REP_TIMER", "Device 'd2'"),
        ("dp1 0x3", "invalid error status value '0x3'"),
        ("dp1 0x2", "bit 1 can not be injected"),
        ("nobody DLP", "Device 'nobody' not found"),
    ] {
        let answer = inject(vmm, words)?;
        ensure!(answer.contains(why), "{words}: {answer}");
    }
    Ok(())
}

fn only_that_failure(vmm: &mut Vmm) -> Result<()> {
    let denied = vmm.guest().denied_kernel_messages(&deny::patterns())?;
    let others: Vec<_> = denied
        .into_iter()
        .filter(|line| !(line.contains("error, dev vd") && line.contains("(WRITE)")))
        .collect();
    ensure!(others.is_empty(), "the log holds:\n{}", others.join("\n"));
    Ok(())
}
