// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-balloon. A machine has one at most: what `balloon` and `query-balloon` are about has no name.

use std::sync::Arc;

use ebbtide_qmp::{Properties, QmpError};
use ebbtide_virtio::balloon::{BalloonSpec, VirtioBalloon};

use super::{Driver, Face, Made, Make, Serving, on_pci, serving};
use crate::hotplug::Devices;

/// Its thread frees pages, which takes time that no other device should wait for.
const THREAD: &str = "io-balloon";

pub(super) const DRIVER: Driver = Driver {
    name: "virtio-balloon-pci",
    aliases: &["virtio-balloon", "virtio-balloon-pci-non-transitional"],
    hotpluggable: true,
    properties: &[
        ("deflate-on-oom", "bool"),
        ("free-page-reporting", "bool"),
        ("iothread", "link<iothread>"),
    ],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let there = {
        let tree = devices.tree().borrow();
        let is_balloon = |face: &Face| matches!(face, Face::Balloon(_));
        tree.iter().any(|(_, node)| is_balloon(&node.info.face))
    };
    if there {
        return Err(QmpError::generic("Only one balloon device is supported"));
    }
    let spec = BalloonSpec {
        deflate_on_oom: properties.take_bool("deflate-on-oom")?.unwrap_or(false),
        free_page_reporting: properties
            .take_bool("free-page-reporting")?
            .unwrap_or(false),
        ..BalloonSpec::new(name)
    };
    let Serving { first, uses, .. } = serving(devices, DRIVER.name, name, THREAD, properties)?;
    let device = VirtioBalloon::new(spec, first.clone(), devices.news().balloon.clone());
    Ok(Made {
        face: Face::Balloon(Arc::downgrade(&device)),
        uses,
        ..on_pci(devices, name, device, &first)?
    })
}
