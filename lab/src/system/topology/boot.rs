// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices are plugged and asked for at every moment of a boot: before the kernel looks at its buses, while it does, before
//! its drivers for slots have started, after. In the end the guest has what came and has let go of what it was asked for,
//! however it came to know.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{add, disk, machine, read};
use crate::system::hotplug::{GUEST, removals, shell};
use crate::system::{BOOT_LIMIT, Ground, finish};
use crate::vmm::Vmm;

/// Time from one to the next in the long form.
const STEP: Duration = Duration::from_millis(100);
/// Moments in the short form, over the whole boot.
const MOMENTS: u32 = 3;
/// A guest that did not listen yet is asked again this much later.
const AGAIN: Duration = Duration::from_secs(1);

/// In a slot of bus 0 and behind a port, at each moment from the start until the agent is up.
pub fn at_boot(ground: &Ground) -> Result<()> {
    let boot = at(ground, Duration::ZERO)?;
    let step = match ground.long {
        true => STEP,
        false => boot / MOMENTS,
    };
    let mut moment = step;
    while moment < boot {
        at(ground, moment).with_context(|| format!("{moment:?} after the start"))?;
        moment += step;
    }
    Ok(())
}

/// Boots with d2 and d3; at `moment` d0 and d1 come and the others are to go. How long the boot took.
fn at(ground: &Ground, moment: Duration) -> Result<Duration> {
    let mut machine = machine(ground, 8);
    let mut option = |name: &str, value: String| machine.more.extend([name.to_owned(), value]);
    for node in ["n0", "n1", "n2", "n3"] {
        let node = json!({"driver": "null-co", "node-name": node, "size": 64 << 20});
        option("--blockdev", node.to_string());
    }
    option("--device", "pcie-root-port,id=rp2,addr=4".into());
    option("--device", disk("d2", "pcie.0", "n2").to_string());
    option("--device", disk("d3", "rp2", "n3").to_string());
    let mut vmm = Vmm::start(&machine)?;
    let left = (vmm.begun() + moment).saturating_duration_since(Instant::now());
    std::thread::sleep(left);
    add(&mut vmm, &disk("d0", "pcie.0", "n0"))?;
    add(&mut vmm, &disk("d1", "rp1", "n1"))?;
    for id in ["d2", "d3"] {
        vmm.qmp().execute("device_del", json!({"id": id}))?;
    }
    let boot = vmm.wait_ready(BOOT_LIMIT)?;
    read(&mut vmm, "d0").context("on bus 0")?;
    read(&mut vmm, "d1").context("behind the port")?;
    gone(&mut vmm)?;
    let two = "[ $(ls /sys/block | grep -c vd) = 2 ]";
    shell(&mut vmm, two).context("a disk that has gone is still there")?;
    finish(vmm)?;
    Ok(boot)
}

/// Asks for what has not gone, now and then, until it has.
fn gone(vmm: &mut Vmm) -> Result<()> {
    let begun = Instant::now();
    let mut left = vec!["d2", "d3"];
    loop {
        for event in vmm.qmp().take_events()? {
            if event.name == "DEVICE_DELETED" {
                left.retain(|id| event.data["device"] != json!(id));
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        ensure!(begun.elapsed() < GUEST, "{left:?} stay; {}", removals(vmm));
        std::thread::sleep(AGAIN);
        for id in &left {
            // It may go just now, and a guest that blinks has heard.
            let _ = vmm.qmp().execute("device_del", json!({"id": id}));
        }
    }
}
