// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver for PCI Express ports and their hot-plug slots (PCIe 5.0, 6.7), which does what Linux's does, without its
//! waiting.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use ebbtide_bus::irq::MsiMessage;
use ebbtide_bus::pci::Devfn;

use crate::pci::PciDevice;

const CAPABILITY_EXPRESS: u8 = 0x10;
const BAR0: u16 = 0x10;
const BAR_COUNT: u16 = 6;

/// Registers of a type 1 header and of the capability.
const SECONDARY: u16 = 0x19;
const MEMORY_WINDOW: u16 = 0x20;
const PREFETCHABLE_WINDOW: u16 = 0x24;
const LINK_STATUS: u16 = 0x12;
const SLOT_CAPABILITIES: u16 = 0x14;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;

const HOTPLUG_CAPABLE: u32 = 1 << 6;
const LINK_ACTIVE: u32 = 1 << 13;
/// Slot control: button, presence, command completed, hot-plug interrupt, link.
const ENABLES: u32 = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 12;
const POWER_INDICATOR: u32 = 3 << 8;
const INDICATOR_ON: u32 = 1 << 8;
const INDICATOR_BLINKING: u32 = 2 << 8;
const INDICATOR_OFF: u32 = 3 << 8;
const POWER_OFF: u32 = 1 << 10;
/// Slot status.
const BUTTON: u32 = 1;
const PRESENCE_CHANGED: u32 = 1 << 3;
const COMMAND_COMPLETED: u32 = 1 << 4;
const PRESENT: u32 = 1 << 6;
const LINK_CHANGED: u32 = 1 << 8;

/// What happened to a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotEvents {
    /// The attention button was pressed.
    pub button: bool,
    /// Something came or went.
    pub presence: bool,
    /// The link came up or went down.
    pub link: bool,
}

/// A port whose slot the driver has taken over.
pub struct PortDriver {
    port: PciDevice,
    express: u16,
}

impl PortDriver {
    /// Takes over `port`: MSI-X, and all events of its slot.
    ///
    /// # Errors
    /// It is no port with a hot-plug slot.
    pub fn new(port: PciDevice) -> Result<Self> {
        let express = port
            .capability(CAPABILITY_EXPRESS)
            .context("no PCI Express capability")?;
        let capabilities = port.read_config(express + SLOT_CAPABILITIES, 4);
        ensure!(
            capabilities & HOTPLUG_CAPABLE != 0,
            "slot capabilities {capabilities:#x}: no hot-plug"
        );
        port.enable();
        port.enable_msix();
        let this = Self { port, express };
        this.write(SLOT_STATUS, 0xffff);
        this.command(0, ENABLES)?;
        Ok(this)
    }

    /// The port's function.
    pub fn pci(&self) -> &PciDevice {
        &self.port
    }

    /// What it interrupts with.
    pub fn message(&self) -> MsiMessage {
        self.port.message(0)
    }

    /// The function at the other end of the link, whether there is one or not.
    pub fn behind(&self) -> PciDevice {
        let bus = self.port.read_config(SECONDARY, 1) as u8;
        self.port.other(bus, Devfn::from_bits(0))
    }

    /// Reads and clears the slot's events.
    pub fn events(&self) -> SlotEvents {
        let status = self.read(SLOT_STATUS);
        self.write(SLOT_STATUS, status);
        SlotEvents {
            button: status & BUTTON != 0,
            presence: status & PRESENCE_CHANGED != 0,
            link: status & LINK_CHANGED != 0,
        }
    }

    /// Whether something is in the slot.
    pub fn is_present(&self) -> bool {
        self.read(SLOT_STATUS) & PRESENT != 0
    }

    /// Whether the link is up.
    pub fn link_is_active(&self) -> bool {
        self.read(LINK_STATUS) & LINK_ACTIVE != 0
    }

    /// Turns the slot on and gives the function in it addresses from the port's windows.
    ///
    /// # Errors
    /// The slot is empty, or the function does not fit.
    pub fn turn_on(&self) -> Result<PciDevice> {
        ensure!(self.is_present(), "the slot is empty");
        self.command(POWER_OFF, 0)?;
        self.command(POWER_INDICATOR, INDICATOR_BLINKING)?;
        ensure!(self.link_is_active(), "the link does not come up");
        let device = self.behind();
        ensure!(device.is_there(), "nothing answers");
        self.place(&device)?;
        self.command(POWER_INDICATOR, INDICATOR_ON)?;
        device.enable();
        Ok(device)
    }

    /// Shows that the button was seen.
    ///
    /// # Errors
    /// The command is not completed.
    pub fn blink(&self) -> Result<()> {
        self.command(POWER_INDICATOR, INDICATOR_BLINKING)
    }

    /// Shows that the slot stays on.
    ///
    /// # Errors
    /// The command is not completed.
    pub fn light(&self) -> Result<()> {
        self.command(POWER_INDICATOR, INDICATOR_ON)
    }

    /// Turns the slot off: what is in it is ejected when this returns.
    ///
    /// # Errors
    /// A command is not completed.
    pub fn turn_off(&self) -> Result<()> {
        self.command(POWER_OFF, POWER_OFF)?;
        self.command(POWER_INDICATOR, INDICATOR_OFF)
    }

    /// The windows the port forwards: for 32-bit BARs, for prefetchable ones.
    pub fn windows(&self) -> [Range<u64>; 2] {
        let upper = |register| u64::from(self.port.read_config(register, 4)) << 32;
        let window = |register: u16, base: u64, limit: u64| {
            let low = u64::from(self.port.read_config(register, 4));
            let base = base | (low & 0xfff0) << 16;
            let limit = limit | low & 0xfff0_0000 | 0xf_ffff;
            base..(limit + 1).max(base)
        };
        [
            window(MEMORY_WINDOW, 0, 0),
            window(PREFETCHABLE_WINDOW, upper(0x28), upper(0x2c)),
        ]
    }

    /// Sizes the BARs of `device` and gives them addresses from the windows, in order.
    fn place(&self, device: &PciDevice) -> Result<()> {
        let mut free = self.windows();
        let mut at = BAR0;
        while at < BAR0 + 4 * BAR_COUNT {
            device.write_config(at, 4, u32::MAX);
            let low = device.read_config(at, 4);
            let wide = low & 6 == 4;
            let mut ones = u64::from(low & !0xf) | !u64::from(u32::MAX);
            if wide {
                device.write_config(at + 4, 4, u32::MAX);
                ones = u64::from(device.read_config(at + 4, 4)) << 32 | u64::from(low & !0xf);
            }
            if low != 0 {
                let size = ones.wrapping_neg();
                let [memory, prefetchable] = &mut free;
                let window = if low & 8 != 0 { prefetchable } else { memory };
                let address = window.start.next_multiple_of(size);
                ensure!(
                    address + size <= window.end,
                    "no room for a BAR of {size:#x} bytes in {window:#x?}"
                );
                window.start = address + size;
                device.write_config(at, 4, address as u32);
                if wide {
                    device.write_config(at + 4, 4, (address >> 32) as u32);
                }
            }
            at += if wide { 8 } else { 4 };
        }
        Ok(())
    }

    /// Changes the bits of slot control in `mask`, and sees the command completed.
    fn command(&self, mask: u32, value: u32) -> Result<()> {
        let control = self.read(SLOT_CONTROL) & !mask | value;
        self.write(SLOT_CONTROL, control);
        ensure!(
            self.read(SLOT_STATUS) & COMMAND_COMPLETED != 0,
            "slot control {control:#x} is not completed"
        );
        self.write(SLOT_STATUS, COMMAND_COMPLETED);
        Ok(())
    }

    fn read(&self, register: u16) -> u32 {
        self.port.read_config(self.express + register, 2)
    }

    fn write(&self, register: u16, value: u32) {
        self.port.write_config(self.express + register, 2, value);
    }
}
