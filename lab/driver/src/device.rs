// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio driver's dealings with the transport (virtio 1.3, 3.1 and 4.1).

use anyhow::{Context, bail, ensure};
use ebbtide_bus::irq::MsiMessage;
use ebbtide_virtio::{features, status};

use crate::board::Board;
use crate::interrupts::Interrupts;
use crate::pci::PciDevice;
use crate::queue::{DriverQueue, Layout, Part, Used};
use crate::ram::GuestRam;
use crate::wait::{LIMIT, poll};

const VENDOR_SPECIFIC: u8 = 9;
/// "No vector" in the vector registers.
const NO_VECTOR: u16 = 0xffff;

/// Offsets in the common configuration structure (4.1.4.3).
#[allow(missing_docs)]
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// One structure of the transport: where it is in the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// A driver for one virtio device on PCI.
pub struct VirtioDriver {
    pci: PciDevice,
    interrupts: Interrupts,
    ram: GuestRam,
    common: Registers,
    notify: Registers,
    notify_multiplier: u64,
    isr: Registers,
    config: Registers,
    window: u16,
    features: u64,
}

impl VirtioDriver {
    /// Finds the structures of the function `pci`. The device is left as it is.
    ///
    /// # Errors
    /// The function is no virtio device, or lacks a structure.
    pub fn new(board: &Board, pci: PciDevice) -> anyhow::Result<Self> {
        let (vendor, device) = (pci.read_config(0, 2), pci.read_config(2, 2));
        ensure!(
            vendor == 0x1af4 && device >= 0x1040,
            "{vendor:04x}:{device:04x} is no virtio device"
        );
        let mut found = [None; 6];
        for capability in pci
            .capabilities()
            .iter()
            .filter(|it| it.id == VENDOR_SPECIFIC)
        {
            let kind = pci.read_config(capability.at + 3, 1) as usize;
            if let Some(slot) = found.get_mut(kind) {
                slot.get_or_insert(capability.at);
            }
        }
        let structure = |kind: usize, name: &str| -> anyhow::Result<(u16, Registers)> {
            let at = found[kind].with_context(|| format!("no {name} structure"))?;
            let base = pci.bar(pci.read_config(at + 4, 1) as u8);
            let offset = u64::from(pci.read_config(at + 8, 4));
            Ok((
                at,
                Registers {
                    address: base + offset,
                    len: pci.read_config(at + 12, 4).into(),
                },
            ))
        };
        let (notify_at, notify) = structure(2, "notification")?;
        Ok(Self {
            common: structure(1, "common configuration")?.1,
            notify,
            notify_multiplier: pci.read_config(notify_at + 16, 4).into(),
            isr: structure(3, "ISR")?.1,
            config: structure(4, "device configuration")?.1,
            window: found[5].context("no configuration access window")?,
            interrupts: board.interrupts().clone(),
            ram: board.ram().clone(),
            features: 0,
            pci,
        })
    }

    /// Attaches `function` to the board and goes through the first half of 3.1.1: reset, ACKNOWLEDGE, DRIVER, features.
    /// Accepts those of `wanted` that are offered, and VERSION_1. Then set up queues and call
    /// [`driver_ok`](Self::driver_ok).
    ///
    /// # Errors
    /// As [`new`](Self::new) and [`negotiate`](Self::negotiate).
    pub fn attach(
        board: &Board,
        function: std::sync::Arc<dyn ebbtide_bus::pci::Function>,
        wanted: u64,
    ) -> anyhow::Result<Self> {
        let mut driver = Self::new(board, board.attach(function)?)?;
        driver.pci.enable_msix();
        driver.negotiate(wanted)?;
        Ok(driver)
    }

    /// The function.
    pub fn pci(&self) -> &PciDevice {
        &self.pci
    }

    /// Guest RAM to put rings and buffers in.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The features agreed upon.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Reads the common configuration.
    pub fn read_common(&self, offset: u64, size: u8) -> u64 {
        self.pci.load(self.common.address + offset, size)
    }

    /// Writes the common configuration.
    pub fn write_common(&self, offset: u64, size: u8, value: u64) {
        self.pci.store(self.common.address + offset, size, value);
    }

    /// The structures: common, notification, ISR, device configuration.
    pub fn structures(&self) -> [Registers; 4] {
        [self.common, self.notify, self.isr, self.config]
    }

    /// Where the configuration access window is in configuration space.
    pub fn window(&self) -> u16 {
        self.window
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read_common(common::STATUS, 1) as u8
    }

    /// Sets bits of the device status.
    pub fn set_status(&self, bits: u8) {
        self.write_common(common::STATUS, 1, (self.status() | bits).into());
    }

    /// Whether the device asks for a reset.
    pub fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Waits until the device asks for a reset; false if it does not in time.
    pub fn wait_needs_reset(&self) -> bool {
        poll(|| self.needs_reset())
    }

    /// Resets the device and waits until it is done.
    ///
    /// # Errors
    /// It takes too long.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.write_common(common::STATUS, 1, 0);
        ensure!(
            poll(|| self.status() == 0),
            "status is still {:#x} {LIMIT:?} after a reset",
            self.status()
        );
        self.features = 0;
        Ok(())
    }

    /// The features offered.
    pub fn offered(&self) -> u64 {
        let word = |select: u64| {
            self.write_common(common::DEVICE_FEATURE_SELECT, 4, select);
            self.read_common(common::DEVICE_FEATURE, 4)
        };
        word(1) << 32 | word(0)
    }

    /// Writes the driver's features, whatever they are.
    pub fn set_features(&self, features: u64) {
        for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write_common(common::DRIVER_FEATURE_SELECT, 4, select);
            self.write_common(common::DRIVER_FEATURE, 4, word);
        }
    }

    /// Resets the device and agrees on features.
    ///
    /// # Errors
    /// The device does not accept the choice, or does not reset.
    pub fn negotiate(&mut self, wanted: u64) -> anyhow::Result<()> {
        self.reset()?;
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::DRIVER);
        let features = self.offered() & (wanted | features::VERSION_1);
        self.set_features(features);
        self.set_status(status::FEATURES_OK);
        if self.status() & status::FEATURES_OK == 0 {
            bail!("features {features:#x} are not accepted");
        }
        self.features = features;
        Ok(())
    }

    /// The largest size of a queue, as the device offers it.
    pub fn max_queue_size(&self, index: u16) -> u16 {
        self.write_common(common::QUEUE_SELECT, 2, index.into());
        self.read_common(common::QUEUE_SIZE, 2) as u16
    }

    /// Makes a queue, programs and enables it, with vector `index` + 1.
    pub fn add_queue(&self, index: u16, size: u16) -> DriverQueue {
        let queue = DriverQueue::new(
            &self.ram,
            size,
            self.features & features::RING_EVENT_IDX != 0,
        );
        self.program_queue(index, queue.config());
        self.write_common(common::QUEUE_VECTOR, 2, u64::from(index) + 1);
        self.write_common(common::QUEUE_ENABLE, 2, 1);
        queue
    }

    /// Writes size and addresses of a queue, whatever they are.
    pub fn program_queue(&self, index: u16, config: &ebbtide_virtio::virtq::QueueConfig) {
        self.write_common(common::QUEUE_SELECT, 2, index.into());
        self.write_common(common::QUEUE_SIZE, 2, config.size.into());
        for (at, gpa) in [
            (common::QUEUE_DESC, config.desc),
            (common::QUEUE_DRIVER, config.avail),
            (common::QUEUE_DEVICE, config.used),
        ] {
            self.write_common(at, 4, gpa.0 & 0xffff_ffff);
            self.write_common(at + 4, 4, gpa.0 >> 32);
        }
    }

    /// Tells the device that the driver is ready. Vector 0 is for configuration changes.
    ///
    /// # Errors
    /// The device asks for a reset at once.
    pub fn driver_ok(&self) -> anyhow::Result<()> {
        self.write_common(common::CONFIG_VECTOR, 2, 0);
        self.set_status(status::DRIVER_OK);
        ensure!(
            !self.needs_reset(),
            "the device needs a reset right after DRIVER_OK"
        );
        Ok(())
    }

    /// Kicks a queue.
    pub fn kick(&self, index: u16) {
        self.write_common(common::QUEUE_SELECT, 2, index.into());
        let offset = self.read_common(common::QUEUE_NOTIFY_OFF, 2) * self.notify_multiplier;
        self.pci
            .store(self.notify.address + offset, 2, index.into());
    }

    /// Adds a chain, kicks, waits for the device to give it back. Other chains of the queue must not be in flight.
    ///
    /// # Errors
    /// No descriptors, or no answer in time.
    pub fn roundtrip(
        &self,
        index: u16,
        queue: &mut DriverQueue,
        parts: &[Part],
        layout: Layout,
    ) -> anyhow::Result<Used> {
        let head = queue.add(parts, layout).context("no free descriptors")?;
        if queue.needs_kick() {
            self.kick(index);
        }
        let used = self.wait_used(queue)?;
        ensure!(
            used.head == head,
            "chain {} came back instead of {head}",
            used.head
        );
        Ok(used)
    }

    /// Waits for the next used chain by looking at the ring.
    ///
    /// # Errors
    /// None in time.
    pub fn wait_used(&self, queue: &mut DriverQueue) -> anyhow::Result<Used> {
        let mut used = None;
        poll(|| {
            used = queue.poll_used();
            used.is_some()
        });
        used.with_context(|| {
            format!(
                "no used chain within {LIMIT:?}, status {:#x}",
                self.status()
            )
        })
    }

    /// The message that announces used chains of a queue.
    pub fn queue_message(&self, index: u16) -> MsiMessage {
        self.pci.message(index + 1)
    }

    /// The message that announces configuration changes.
    pub fn config_message(&self) -> MsiMessage {
        self.pci.message(0)
    }

    /// How often a message came.
    pub fn interrupts(&self, message: MsiMessage) -> u64 {
        self.interrupts.count(message)
    }

    /// Waits until a message came so often; false if it did not in time.
    pub fn wait_interrupt(&self, message: MsiMessage, count: u64) -> bool {
        self.interrupts.wait(message, count, LIMIT)
    }

    /// Takes the vector of a queue away.
    pub fn silence_queue(&self, index: u16) {
        self.write_common(common::QUEUE_SELECT, 2, index.into());
        self.write_common(common::QUEUE_VECTOR, 2, NO_VECTOR.into());
    }

    /// Reads and clears the ISR status.
    pub fn take_isr(&self) -> u8 {
        self.pci.load(self.isr.address, 1) as u8
    }

    /// Reads a field of the device's configuration, of 1, 2 or 4 bytes.
    pub fn read_config(&self, offset: u64, size: u8) -> u64 {
        self.pci.load(self.config.address + offset, size)
    }

    /// Reads a 64-bit field of the device's configuration consistently (2.5.3).
    pub fn read_config_u64(&self, offset: u64) -> u64 {
        loop {
            let before = self.read_common(common::GENERATION, 1);
            let value = self.read_config(offset + 4, 4) << 32 | self.read_config(offset, 4);
            if self.read_common(common::GENERATION, 1) == before {
                return value;
            }
        }
    }

    /// Writes a field of the device's configuration.
    pub fn write_config(&self, offset: u64, size: u8, value: u64) {
        self.pci.store(self.config.address + offset, size, value);
    }
}
