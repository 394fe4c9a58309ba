// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is on the board besides RAM, vCPUs and PCI functions: the serial port, the ACPI registers,
//! the ways to reset.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_bus::acpi::{
    EVENT_PORT, EventDevice, MEMORY_HOTPLUG_PORTS, MemoryHotplug, PCI_HOTPLUG_PORTS, PciHotplug,
    REGISTER_PORTS, SLEEP_PORT, SleepRegisters,
};
use ebbtide_bus::gated;
use ebbtide_bus::pci::{EjectSink, HostBridge};
use ebbtide_devices::chardev::{Chardev, Wire};
use ebbtide_devices::legacy::Sink;
use ebbtide_devices::reset::{KeyboardController, ResetControl};
use ebbtide_devices::serial::SerialPort;
use ebbtide_gate::{Entry, Owned};
use ebbtide_hypervisor::Vm;
use ebbtide_iothread::{Local, Task};
use ebbtide_memory::{Memory, Mmio, Region};
use ebbtide_qmp::types::run_state::ShutdownCause;

use crate::Error;
use crate::config::SerialConfig;
use crate::hotplug::Ejector;
use crate::lifecycle::Requests;

/// Interrupt of the serial port, as on a PC.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the ACPI event device, where a PC has its SCI.
pub const EVENT_GSI: u32 = 9;
/// Interrupts of PCI functions without messages: the pins of the I/O APIC that a PC with one has for
/// them.
pub const INTX_GSIS: std::ops::Range<u32> = 16..24;
/// Mechanism #1 of PCI configuration space.
const CONFIG_PORTS: u64 = 0xcf8;
/// How long the last serial output may take to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// The board's devices.
pub struct Platform {
    serial: Owned<SerialPort>,
    wire: Arc<Wire>,
    /// Carries serial output to the host; ends when the wire is closed.
    output: RefCell<Option<Task<()>>>,
    events: Arc<EventDevice>,
    pci_hotplug: Arc<PciHotplug>,
    memory_hotplug: Option<Arc<MemoryHotplug>>,
}

/// What the platform is built upon.
pub struct Board<'a> {
    /// Where its interrupts go.
    pub vm: &'a dyn Vm,
    /// The memory core.
    pub memory: &'a Memory,
    /// The port space.
    pub ports: &'a Arc<Region>,
    /// The PCI host bridge.
    pub bridge: &'a Arc<HostBridge>,
}

impl Platform {
    /// Builds the platform and maps its registers.
    ///
    /// # Errors
    /// A serial target that can't be opened, an interrupt line that is taken.
    pub fn new(
        serial: &SerialConfig,
        dimm_slots: u16,
        board: &Board<'_>,
        requests: &Requests,
        ejects: &Arc<Ejector>,
        local: &Local,
    ) -> Result<Platform, Error> {
        let Board { vm, bridge, .. } = board;
        let wire = Wire::new();
        let chardev = Chardev::open(&serial.chardev()).map_err(|e| Error::part("--serial", e))?;
        let output = local.spawn(chardev.attach(&wire).serve(local.clone()));
        let line = |gsi| {
            vm.irq_line(gsi)
                .map_err(|e| Error::part(format!("interrupt line {gsi}"), e))
        };
        let serial = SerialPort::new("serial0", line(SERIAL_GSI)?, &wire);
        let events = Arc::new(EventDevice::new(line(EVENT_GSI)?));
        let sink = Arc::clone(ejects) as Arc<dyn EjectSink>;
        let pci_hotplug = PciHotplug::new(bridge, sink, Arc::clone(&events));
        let memory_hotplug = match dimm_slots {
            0 => None,
            slots => {
                let sink = Arc::clone(ejects) as _;
                let registers = MemoryHotplug::new(slots, Arc::clone(&events), sink);
                Some(Arc::new(
                    registers.map_err(|e| Error::part("DIMM slots", e))?,
                ))
            }
        };
        let platform = Platform {
            serial,
            wire,
            output: RefCell::new(Some(output)),
            events,
            pci_hotplug,
            memory_hotplug,
        };
        platform
            .map(board, requests)
            .map_err(|e| Error::part("platform registers", e))?;
        Ok(platform)
    }

    fn map(&self, board: &Board<'_>, requests: &Requests) -> Result<(), ebbtide_memory::Error> {
        let Board {
            memory,
            ports,
            bridge,
            ..
        } = board;
        let reset = || {
            let requests = requests.clone();
            move || requests.reset(ShutdownCause::GuestReset)
        };
        let off = requests.clone();
        let sleep = SleepRegisters::new(move || off.shutdown(ShutdownCause::GuestShutdown));
        let config = bridge.ports_with_reset(Arc::new(ResetControl::new(reset())));
        let event_bytes = u64::from(REGISTER_PORTS.end - EVENT_PORT);
        let sleep_bytes = u64::from(EVENT_PORT - SLEEP_PORT);
        let devices: [(&str, u64, u64, Arc<dyn Mmio>); 7] = [
            (
                "serial0",
                u64::from(SerialPort::COM1),
                SerialPort::SIZE_BYTES,
                gated::registers(self.serial.handle()),
            ),
            (
                "acpi-sleep",
                u64::from(SLEEP_PORT),
                sleep_bytes,
                Arc::new(sleep),
            ),
            (
                "acpi-events",
                u64::from(EVENT_PORT),
                event_bytes,
                Arc::clone(&self.events) as _,
            ),
            (
                "acpi-pci-hotplug",
                u64::from(PCI_HOTPLUG_PORTS.start),
                PciHotplug::SIZE_BYTES,
                Arc::clone(&self.pci_hotplug) as _,
            ),
            ("pci-config", CONFIG_PORTS, HostBridge::PORTS_BYTES, config),
            (
                "keyboard-controller",
                u64::from(KeyboardController::PORT),
                KeyboardController::SIZE_BYTES,
                Arc::new(KeyboardController::new(reset())),
            ),
            ("post", u64::from(Sink::POST_PORT), 1, Arc::new(Sink)),
        ];
        memory.update(|t| {
            for (name, at, bytes, registers) in devices {
                t.add(ports, &Region::mmio(name, bytes, registers), at, 0)?;
            }
            if let Some(registers) = &self.memory_hotplug {
                let Range { start, end } = MEMORY_HOTPLUG_PORTS;
                let registers = Arc::clone(registers) as _;
                let region = Region::mmio("acpi-memory-hotplug", u64::from(end - start), registers);
                t.add(ports, &region, u64::from(start), 0)?;
            }
            Ok(())
        })
    }

    /// The slots of bus 0.
    pub fn pci_hotplug(&self) -> &Arc<PciHotplug> {
        &self.pci_hotplug
    }

    /// The DIMM slots, if there are any.
    pub fn memory_hotplug(&self) -> Option<&Arc<MemoryHotplug>> {
        self.memory_hotplug.as_ref()
    }

    /// Tells the guest that the power button was pressed.
    pub fn press_power_button(&self) {
        self.events.press_power_button();
    }

    /// Power-on state.
    pub fn reset(&self) {
        self.events.reset();
        self.pci_hotplug.reset();
        if let Some(registers) = &self.memory_hotplug {
            registers.reset();
        }
        if let Some(serial) = self.serial.handle().enter(Entry::Io) {
            serial.reset();
        }
    }

    /// Ends serial output; ready when the last of it is written.
    pub async fn flush(&self, local: &Local) {
        self.wire.close();
        let output = self.output.borrow_mut().take();
        if let Some(output) = output
            && local.timeout(FLUSH, output).await.is_err()
        {
            tracing::warn!("the last serial output could not be written");
        }
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        self.serial.close();
    }
}
