// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices are plugged and asked for at every moment of a boot: before the kernel looks at its buses, while it does, before
//! its drivers for slots have started, after. In the end the guest has what came and has let go of what it was asked for,
//! however it came to know.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{add, ask, disk, machine, read, until};
use crate::system::hotplug::{GUEST, removals};
use crate::system::{BOOT_LIMIT, Ground, finish};
use crate::vmm::Vmm;

/// Time from one to the next in the long form.
const STEP: Duration = Duration::from_millis(100);
/// Moments in the short form, over the whole boot.
const MOMENTS: u32 = 3;
/// A guest that did not listen yet is asked again this much later.
const AGAIN: Duration = Duration::from_secs(1);

/// In a slot of bus 0 and behind a port, at each moment from the start until the agent is up. While one guest takes its time
/// with a slot the next one boots.
pub fn at_boot(ground: &Ground) -> Result<()> {
    let mut last = at(ground, Duration::ZERO)?;
    let boot = last.boot;
    let step = match ground.long {
        true => STEP,
        false => boot / MOMENTS,
    };
    let mut moment = step;
    while moment < boot {
        let next = at(ground, moment).with_context(|| format!("{moment:?} after the start"))?;
        std::mem::replace(&mut last, next).end()?;
        moment += step;
    }
    last.end()
}

/// A guest in whose boot devices came and went.
struct Booted {
    vmm: Vmm,
    moment: Duration,
    boot: Duration,
    /// What it was asked for and has not let go of.
    left: Vec<&'static str>,
}

/// Boots with d2 and d3; at `moment` d0 and d1 come and the others are to go.
fn at(ground: &Ground, moment: Duration) -> Result<Booted> {
    let mut machine = machine(ground, 8);
    // Another may still be writing to the usual one.
    machine.log = None;
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
        ask(&mut vmm, id)?;
    }
    let boot = vmm.wait_ready(BOOT_LIMIT)?;
    let mut booted = Booted {
        vmm,
        moment,
        boot,
        left: vec!["d2", "d3"],
    };
    booted.ask_again()?;
    booted.has_what_came().with_context(|| booted.what())?;
    Ok(booted)
}

impl Booted {
    /// For errors.
    fn what(&self) -> String {
        format!("{:?} after the start{}", self.moment, self.vmm.log())
    }

    fn has_what_came(&mut self) -> Result<()> {
        read(&mut self.vmm, "d0").context("on bus 0")?;
        read(&mut self.vmm, "d1").context("behind the port")
    }

    /// Asks for what has not gone, which a guest that did not listen has not heard.
    fn ask_again(&mut self) -> Result<()> {
        for event in self.vmm.qmp().take_events()? {
            if event.name == "DEVICE_DELETED" {
                self.left.retain(|id| event.data["device"] != json!(id));
            }
        }
        for id in &self.left {
            // It may go just now, and a guest that blinks has heard.
            let _ = self.vmm.qmp().execute("device_del", json!({"id": id}));
        }
        Ok(())
    }

    /// In the end the guest has let go of what it was asked for.
    fn end(mut self) -> Result<()> {
        self.has_let_go().with_context(|| self.what())?;
        finish(self.vmm)
    }

    fn has_let_go(&mut self) -> Result<()> {
        let begun = Instant::now();
        while !self.left.is_empty() {
            let removals = removals(&mut self.vmm);
            ensure!(begun.elapsed() < GUEST, "{:?} stay; {removals}", self.left);
            std::thread::sleep(AGAIN);
            self.ask_again()?;
        }
        // One that the guest had not seen in use may have been taken from it.
        let two = "[ $(ls /sys/block | grep -c vd) = 2 ]";
        until(
            &mut self.vmm,
            "a disk that has gone is not there any more",
            two,
        )
    }
}
