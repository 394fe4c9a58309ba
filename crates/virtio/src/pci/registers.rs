// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The common configuration structure (4.1.4.3): what the driver selects and programs before DRIVER_OK.
//!
//! Reads may have any width and cover parts of fields; writes only have an effect with a field's own width (a 64-bit
//! field also takes its halves), as 4.1.3.1 demands of drivers.

use ebbtide_memory::Gpa;

use super::layout::COMMON;
use crate::virtq::QueueConfig;

/// Fields by their offset.
pub(super) mod at {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: usize = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: usize = 0x12;
    pub(in crate::pci) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: usize = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

/// What a write to the structure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    DeviceFeatureSelect(u32),
    DriverFeatureSelect(u32),
    DriverFeature(u32),
    ConfigVector(u16),
    Status(u8),
    QueueSelect(u16),
    QueueSize(u16),
    QueueVector(u16),
    QueueEnable(u16),
    /// A ring's address: which ring, and the bits that are written.
    QueueRing {
        ring: RingField,
        mask: u64,
        value: u64,
    },
}

/// The three address fields of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RingField {
    Desc,
    Avail,
    Used,
}

impl Write {
    /// What writing `size` bytes of `value` at `offset` means; `None` if it hits no field as a whole.
    pub(super) fn decode(offset: u64, size: u8, value: u64) -> Option<Write> {
        let (byte, half, word) = (value as u8, value as u16, value as u32);
        Some(match (offset, size) {
            (at::DEVICE_FEATURE_SELECT, 4) => Write::DeviceFeatureSelect(word),
            (at::DRIVER_FEATURE_SELECT, 4) => Write::DriverFeatureSelect(word),
            (at::DRIVER_FEATURE, 4) => Write::DriverFeature(word),
            (at::CONFIG_VECTOR, 2) => Write::ConfigVector(half),
            (at::STATUS, 1) => Write::Status(byte),
            (at::QUEUE_SELECT, 2) => Write::QueueSelect(half),
            (at::QUEUE_SIZE, 2) => Write::QueueSize(half),
            (at::QUEUE_VECTOR, 2) => Write::QueueVector(half),
            (at::QUEUE_ENABLE, 2) => Write::QueueEnable(half),
            (at::QUEUE_DESC.., 4 | 8) => return Self::ring(offset, size, value),
            _ => return None,
        })
    }

    fn ring(offset: u64, size: u8, value: u64) -> Option<Write> {
        let ring = match offset & !7 {
            at::QUEUE_DESC => RingField::Desc,
            at::QUEUE_DRIVER => RingField::Avail,
            at::QUEUE_DEVICE => RingField::Used,
            _ => return None,
        };
        let low = u64::from(u32::MAX);
        let (mask, value) = match (offset & 7, size) {
            (0, 8) => (u64::MAX, value),
            (0, 4) => (low, value & low),
            (4, 4) => (!low, value << 32),
            _ => return None,
        };
        Some(Write::QueueRing { ring, mask, value })
    }
}

/// One queue's fields.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueRegisters {
    pub(super) config: QueueConfig,
    pub(super) enabled: bool,
}

/// What the structure keeps. The vectors, the status and the generation live where the device's threads see them.
#[derive(Debug)]
pub(super) struct Registers {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    /// Features the driver accepts, bits 0 to 63.
    pub(super) driver_features: u64,
    /// It accepted one behind those, none of which is offered.
    pub(super) driver_features_beyond: bool,
    pub(super) queue_select: u16,
    pub(super) queues: Box<[QueueRegisters]>,
}

/// The fields that are kept elsewhere.
pub(super) struct Shown {
    pub(super) device_features: u64,
    pub(super) config_vector: u16,
    pub(super) queue_vector: u16,
    pub(super) status: u8,
    pub(super) generation: u8,
}

impl Registers {
    /// After a reset, for queues of at most these sizes.
    pub(super) fn new(sizes: &[u16]) -> Self {
        let queue = |&size| QueueRegisters {
            config: QueueConfig {
                size,
                ..QueueConfig::default()
            },
            enabled: false,
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            driver_features_beyond: false,
            queue_select: 0,
            queues: sizes.iter().map(queue).collect(),
        }
    }

    /// The selected queue, if there is one of that number.
    pub(super) fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue while it may be programmed: it exists and is not enabled.
    pub(super) fn programmable(&mut self) -> Option<&mut QueueRegisters> {
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.enabled)
    }

    /// The driver writes the word of its features that it selected.
    pub(super) fn set_driver_feature(&mut self, word: u32) {
        let word = u64::from(word);
        let low = u64::from(u32::MAX);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !low | word,
            1 => self.driver_features = self.driver_features & low | word << 32,
            _ => self.driver_features_beyond |= word != 0,
        }
    }

    /// The driver writes (part of) an address of the selected queue.
    pub(super) fn set_ring(&mut self, ring: RingField, mask: u64, value: u64) {
        let Some(queue) = self.programmable() else {
            return;
        };
        let gpa = match ring {
            RingField::Desc => &mut queue.config.desc,
            RingField::Avail => &mut queue.config.avail,
            RingField::Used => &mut queue.config.used,
        };
        *gpa = Gpa(gpa.0 & !mask | value);
    }

    /// The whole structure as the driver reads it.
    pub(super) fn image(&self, shown: &Shown) -> [u8; COMMON.end as usize] {
        let mut image = [0; COMMON.end as usize];
        let queue = self.selected().copied().unwrap_or_default();
        let notify_off = if self.selected().is_some() {
            self.queue_select
        } else {
            0
        };
        put(
            &mut image,
            at::DEVICE_FEATURE_SELECT as usize,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            &mut image,
            at::DEVICE_FEATURE,
            &word(shown.device_features, self.device_feature_select),
        );
        put(
            &mut image,
            at::DRIVER_FEATURE_SELECT as usize,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            &mut image,
            at::DRIVER_FEATURE as usize,
            &word(self.driver_features, self.driver_feature_select),
        );
        put(
            &mut image,
            at::CONFIG_VECTOR as usize,
            &shown.config_vector.to_le_bytes(),
        );
        put(
            &mut image,
            at::NUM_QUEUES,
            &(self.queues.len() as u16).to_le_bytes(),
        );
        put(&mut image, at::STATUS as usize, &[shown.status]);
        put(&mut image, at::GENERATION, &[shown.generation]);
        put(
            &mut image,
            at::QUEUE_SELECT as usize,
            &self.queue_select.to_le_bytes(),
        );
        put(
            &mut image,
            at::QUEUE_SIZE as usize,
            &queue.config.size.to_le_bytes(),
        );
        put(
            &mut image,
            at::QUEUE_VECTOR as usize,
            &shown.queue_vector.to_le_bytes(),
        );
        put(
            &mut image,
            at::QUEUE_ENABLE as usize,
            &u16::from(queue.enabled).to_le_bytes(),
        );
        put(&mut image, at::QUEUE_NOTIFY_OFF, &notify_off.to_le_bytes());
        put(
            &mut image,
            at::QUEUE_DESC as usize,
            &queue.config.desc.0.to_le_bytes(),
        );
        put(
            &mut image,
            at::QUEUE_DRIVER as usize,
            &queue.config.avail.0.to_le_bytes(),
        );
        put(
            &mut image,
            at::QUEUE_DEVICE as usize,
            &queue.config.used.0.to_le_bytes(),
        );
        image
    }
}

fn word(features: u64, select: u32) -> [u8; 4] {
    let word = match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    };
    word.to_le_bytes()
}

fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(field) = image
        .get_mut(offset..)
        .and_then(|rest| rest.get_mut(..bytes.len()))
    {
        field.copy_from_slice(bytes);
    }
}
