// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-net.

use std::sync::Arc;

use ebbtide_net::MacAddress;
use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::net::{NetSpec, VirtioNet, feature};

use super::{COMMON_THREAD, Driver, Face, Made, Make, Serving, on_pci, queue_size, serving};
use crate::hotplug::Devices;

/// Sizes of queues QEMU takes, too.
const QUEUE_SIZES: (u16, u16) = (256, 1024);

/// Properties that switch a feature off.
const FEATURES: [(&str, u64); 16] = [
    ("mrg_rxbuf", feature::MRG_RXBUF),
    ("csum", feature::CSUM),
    ("guest_csum", feature::GUEST_CSUM),
    ("host_tso4", feature::HOST_TSO4),
    ("host_tso6", feature::HOST_TSO6),
    ("host_ecn", feature::HOST_ECN),
    ("guest_tso4", feature::GUEST_TSO4),
    ("guest_tso6", feature::GUEST_TSO6),
    ("guest_ecn", feature::GUEST_ECN),
    ("status", feature::STATUS),
    ("ctrl_vq", feature::CTRL_VQ),
    ("ctrl_rx", feature::CTRL_RX),
    ("ctrl_vlan", feature::CTRL_VLAN),
    ("ctrl_rx_extra", feature::CTRL_RX_EXTRA),
    ("ctrl_mac_addr", feature::CTRL_MAC_ADDR),
    ("ctrl_guest_offloads", feature::CTRL_GUEST_OFFLOADS),
];

pub(super) const DRIVER: Driver = Driver {
    name: "virtio-net-pci",
    aliases: &["virtio-net", "virtio-net-pci-non-transitional"],
    hotpluggable: true,
    properties: &[
        ("netdev", "str"),
        ("mac", "str"),
        ("host_mtu", "uint16"),
        ("rx_queue_size", "uint16"),
        ("tx_queue_size", "uint16"),
        ("iothread", "link<iothread>"),
        ("mrg_rxbuf", "bool"),
        ("csum", "bool"),
        ("guest_csum", "bool"),
        ("host_tso4", "bool"),
        ("host_tso6", "bool"),
        ("host_ecn", "bool"),
        ("guest_tso4", "bool"),
        ("guest_tso6", "bool"),
        ("guest_ecn", "bool"),
        ("status", "bool"),
        ("ctrl_vq", "bool"),
        ("ctrl_rx", "bool"),
        ("ctrl_vlan", "bool"),
        ("ctrl_rx_extra", "bool"),
        ("ctrl_mac_addr", "bool"),
        ("ctrl_guest_offloads", "bool"),
    ],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let id = properties
        .take_string("netdev")?
        .ok_or_else(|| QmpError::generic("netdev property not set"))?;
    let mac = match properties.take_string("mac")? {
        Some(text) => text
            .parse()
            .map_err(|_| QmpError::property_value(DRIVER.name, "mac", &text))?,
        None => free_address(devices),
    };
    let mut spec = NetSpec::new(name, mac);
    spec.mtu = properties.take_uint::<u16>("host_mtu")?;
    spec.rx_queue_size = queue_size(DRIVER.name, "rx_queue_size", 256, QUEUE_SIZES, properties)?;
    spec.tx_queue_size = queue_size(DRIVER.name, "tx_queue_size", 256, QUEUE_SIZES, properties)?;
    for (property, bit) in FEATURES {
        if properties.take_bool(property)? == Some(false) {
            spec.features_off |= bit;
        }
    }
    spec.events = Some(devices.news().net.clone());
    if devices.netdevs().get(&id).is_none() {
        return Err(QmpError::no_such_backend(DRIVER.name, "netdev", &id));
    }
    let netdev = devices.netdevs().take(&id, name)?;
    let Serving {
        first, mut uses, ..
    } = serving(devices, DRIVER.name, name, COMMON_THREAD, properties)?;
    let card = VirtioNet::new(spec, netdev.value(), first.clone())
        .map_err(|e| QmpError::generic(e.to_string()))?;
    uses.push(Box::new(netdev));
    let face = Face::Net {
        card: Arc::downgrade(&card),
        netdev: id,
    };
    Ok(Made {
        face,
        uses,
        ..on_pci(devices, name, card, &first)?
    })
}

/// The first of the addresses QEMU gives to cards that no card here has.
fn free_address(devices: &Devices) -> MacAddress {
    let tree = devices.tree().borrow();
    let taken: Vec<MacAddress> = tree
        .iter()
        .filter_map(|(_, node)| match &node.info.face {
            Face::Net { card, .. } => card.upgrade().map(|card| card.mac()),
            _ => None,
        })
        .collect();
    let mut addresses = (0..=u8::MAX).map(MacAddress::of_card);
    addresses
        .find(|address| !taken.contains(address))
        .unwrap_or(MacAddress::of_card(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_is_declared() {
        for (property, _) in FEATURES {
            let declared = DRIVER.properties.iter().find(|(name, _)| *name == property);
            assert_eq!(declared.map(|(_, kind)| *kind), Some("bool"), "{property}");
        }
    }
}
