// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Answers about devices as text.

use std::fmt::Write;

use crate::types::block::BlockInfo;
use crate::types::device::{CpuInfoFast, IothreadInfo};
use crate::types::memory::BalloonInfo;
use crate::types::pci::{PciDeviceInfo, PciInfo, PciMemoryRange, PciMemoryRegion};

/// `info balloon`
pub fn balloon(info: &BalloonInfo) -> String {
    format!("balloon: actual={}\r\n", info.actual >> 20)
}

/// `info cpus`
pub fn cpus(infos: &[CpuInfoFast]) -> String {
    let mut text = String::new();
    for info in infos {
        // The monitor's own, which others are not chosen for here.
        let own = if info.cpu_index == 0 { '*' } else { ' ' };
        let (index, thread) = (info.cpu_index, info.thread_id);
        // Writing to a text does not fail, here and below.
        let _ = write!(text, "{own} CPU #{index}: thread_id={thread}\r\n");
    }
    text
}

/// `info iothreads`
pub fn iothreads(infos: &[IothreadInfo]) -> String {
    let mut text = String::new();
    for info in infos {
        let _ = write!(
            text,
            "{}:\r\n  thread_id={}\r\n  poll-max-ns={}\r\n  poll-grow={}\r\n  poll-shrink={}\r\n  aio-max-batch={}\r\n",
            info.id,
            info.thread_id,
            info.poll_max_ns,
            info.poll_grow,
            info.poll_shrink,
            info.aio_max_batch
        );
    }
    text
}

/// `info block`
pub fn block(infos: &[BlockInfo]) -> String {
    let mut text = String::new();
    for info in infos {
        let Some(node) = &info.inserted else { continue };
        let name = node.node_name.as_deref().unwrap_or(&info.device);
        let read_only = if node.ro { ", read-only" } else { "" };
        let _ = write!(text, "{name}: {} ({}{read_only})\r\n", node.file, node.drv);
        if let Some(qdev) = &info.qdev {
            let _ = write!(text, "    Attached to:      {qdev}\r\n");
        }
        let direct = if node.cache.direct { ", direct" } else { "" };
        let _ = write!(text, "    Cache mode:       writeback{direct}\r\n");
    }
    text
}

/// `info pci`
pub fn pci(buses: &[PciInfo]) -> String {
    let mut text = String::new();
    for bus in buses {
        for device in &bus.devices {
            pci_device(&mut text, device);
        }
    }
    text
}

fn pci_device(text: &mut String, device: &PciDeviceInfo) {
    let class = match &device.class_info.desc {
        Some(name) => name.clone(),
        None => format!("Class {:04}", device.class_info.class),
    };
    let _ = write!(
        text,
        "  Bus {:2}, device {:3}, function {}:\r\n    {class}: PCI device {:04x}:{:04x}\r\n",
        device.bus, device.slot, device.function, device.id.vendor, device.id.device
    );
    if let (Some(vendor), Some(id)) = (device.id.subsystem_vendor, device.id.subsystem) {
        let _ = write!(text, "      PCI subsystem {vendor:04x}:{id:04x}\r\n");
    }
    if let Some(bridge) = &device.pci_bridge {
        let range =
            |range: &PciMemoryRange| format!("[{:#010x}, {:#010x}]", range.base, range.limit);
        let bus = &bridge.bus;
        let _ = write!(
            text,
            "      BUS {}.\r\n      secondary bus {}.\r\n      subordinate bus {}.\r\n      IO range {}\r\n      \
             memory range {}\r\n      prefetchable memory range {}\r\n",
            bus.number,
            bus.secondary,
            bus.subordinate,
            range(&bus.io_range),
            range(&bus.memory_range),
            range(&bus.prefetchable_range)
        );
    }
    device.regions.iter().for_each(|bar| region(text, bar));
    let _ = write!(text, "      id \"{}\"\r\n", device.qdev_id);
    let behind = device
        .pci_bridge
        .as_ref()
        .and_then(|it| it.devices.as_ref());
    for device in behind.into_iter().flatten() {
        pci_device(text, device);
    }
}

fn region(text: &mut String, bar: &PciMemoryRegion) {
    let width = if bar.mem_type_64 == Some(true) {
        64
    } else {
        32
    };
    let prefetchable = match bar.prefetch {
        Some(true) => " prefetchable",
        _ => "",
    };
    let last = bar.address.wrapping_add(bar.size).wrapping_sub(1);
    let what = match bar.kind.as_str() {
        "io" => "I/O".to_owned(),
        _ => format!("{width} bit{prefetchable} memory"),
    };
    let _ = write!(
        text,
        "      BAR{}: {what} at {:#x} [{last:#x}].\r\n",
        bar.bar, bar.address
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::block::{
        BlockDeviceInfo, BlockdevCacheInfo, BlockdevDetectZeroes, ImageInfo,
    };
    use crate::types::pci::{PciBridgeInfo, PciBusInfo, PciDeviceClass, PciDeviceId};

    #[test]
    fn a_disk() {
        let image = ImageInfo {
            filename: "/images/a".into(),
            format: "file".into(),
            actual_size: None,
            virtual_size: 1 << 20,
        };
        let cache = BlockdevCacheInfo {
            writeback: true,
            direct: true,
            no_flush: false,
        };
        let zeroes = BlockdevDetectZeroes::Off;
        let node = BlockDeviceInfo::new(Some("n0".into()), image, true, cache, zeroes);
        assert_eq!(
            block(&[BlockInfo::fixed("d0", node)]),
            "n0: /images/a (file, read-only)\r\n    Attached to:      d0\r\n    Cache mode:       writeback, direct\r\n"
        );
    }

    fn function(slot: i64) -> PciDeviceInfo {
        PciDeviceInfo {
            bus: 0,
            slot,
            function: 0,
            class_info: PciDeviceClass {
                desc: None,
                class: 0xff,
            },
            id: PciDeviceId {
                device: 0x1042,
                vendor: 0x1af4,
                subsystem: None,
                subsystem_vendor: None,
            },
            irq: None,
            irq_pin: 0,
            qdev_id: "d0".into(),
            pci_bridge: None,
            regions: Vec::new(),
        }
    }

    #[test]
    fn a_function_with_one_behind_it() {
        let range = PciMemoryRange {
            base: 0,
            limit: 0xf_ffff,
        };
        let bus = PciBusInfo {
            number: 0,
            secondary: 1,
            subordinate: 2,
            io_range: range,
            memory_range: range,
            prefetchable_range: range,
        };
        let mut bridge = function(3);
        bridge.pci_bridge = Some(PciBridgeInfo {
            bus,
            devices: Some(vec![function(0)]),
        });
        bridge.regions.push(PciMemoryRegion {
            bar: 4,
            kind: "memory".into(),
            address: 0x10000,
            size: 0x4000,
            prefetch: Some(true),
            mem_type_64: Some(true),
        });
        let devices = vec![bridge];
        let text = pci(&[PciInfo { bus: 0, devices }]);
        for line in [
            "  Bus  0, device   3, function 0:",
            "    Class 0255: PCI device 1af4:1042",
            "      secondary bus 1.",
            "      memory range [0x00000000, 0x000fffff]",
            "      BAR4: 64 bit prefetchable memory at 0x10000 [0x13fff].",
            "      id \"d0\"",
            "  Bus  0, device   0, function 0:",
        ] {
            assert!(text.contains(&format!("{line}\r\n")), "{line}\n{text}");
        }
    }
}
