// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Machine and guest back to power-on.
//!
//! ```text
//!   park ─► removals asked for ─► devices drain ── time-out ──► stuck ones: forget the guest, go ─┐
//!                                     │                                                           ▼
//!                                     └────────────────► memory still in use: new one in its place, or wait
//!                                                                          │
//!                      load, vCPUs ◄── registers, interrupt controllers ◄──┘
//! ```

mod memory;
mod progress;
#[cfg(test)]
mod tests;

use ebbtide_bus::pci::HostBridge;
use ebbtide_qmp::types::ebbtide::ResetStep;
use ebbtide_qmp::types::run_state::ShutdownCause;

use crate::Error;
use crate::machine::Machine;
pub(crate) use progress::Progress;

/// What came of a reset.
pub(crate) enum Outcome {
    /// All is as at power-on.
    Fresh,
    /// The VM is to end, which whoever wanted that did not want to wait for.
    Ended(ShutdownCause),
}

impl Machine {
    /// Puts everything back to power-on: vCPUs out, requests of the old guest drained, memory
    /// devices empty, registers reset, kernel loaded.
    ///
    /// # Errors
    /// The host refuses; the machine is of no use before another reset.
    pub(crate) async fn reset(&self, cause: ShutdownCause) -> Result<Outcome, Error> {
        let under_way = self.resetting.begin(cause, self.local.now());
        self.cpus.park().await;
        self.devices.finish_requested().await;
        for device in self.devices.quiesce().await {
            // The new guest must not meet the device, which stays allocated until its requests end. Those that have not
            // reached the host yet never will.
            self.devices.give_up(device.node);
            tracing::error!(
                "{}: requests did not end within {:?}; the device is kept out of the new guest",
                device.name,
                self.config.drain_timeout
            );
            drop(self.devices.remove(device.node));
        }
        // Until its devices are quiet the old guest may still ask for something: a watchdog does.
        self.requests.next_guest();
        self.devices.ejector().next_guest();
        under_way.step(ResetStep::Memory);
        if let Some(cause) = self.part_memory(&under_way).await {
            return Ok(Outcome::Ended(cause));
        }
        under_way.step(ResetStep::Loading);
        self.empty_memory_devices().await;
        power_on(&self.bridge);
        self.platform.reset();
        self.vm
            .restore_chips(&self.power_on.chips)
            .map_err(|e| Error::part("interrupt controllers", e))?;
        self.load().await?;
        Ok(Outcome::Fresh)
    }

    /// Unplugs all device memory. What can't be taken back in time stays plugged; the driver of the
    /// next guest begins with unplugging it.
    async fn empty_memory_devices(&self) {
        for slot in &self.slots {
            let emptied = slot.device.system_reset();
            let id = &slot.config.id;
            match self.local.timeout(self.config.drain_timeout, emptied).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => tracing::error!("{id}: its memory can't be taken back: {e}"),
                Err(_) => tracing::error!("{id}: its memory is still in use"),
            }
        }
    }
}

/// The functions of all buses as at power-on, with their BARs where firmware would put them.
fn power_on(bridge: &HostBridge) {
    bridge.reset();
    // What was plugged since the start may be too much for what the tables name: a guest goes on without it, as the
    // last one did.
    if let Err(e) = bridge.assign_bars() {
        tracing::error!("PCI: {e}");
    }
}
