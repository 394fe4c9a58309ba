// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI transport as a driver meets it (virtio 1.3, 4.1 and 3.1).

mod support;

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ebbtide_lab_driver::{Layout, Part, common};
use ebbtide_memory::{FlatIoeventfd, FlatSection, Gpa, Listener, ListenerError};
use ebbtide_virtio::virtq::QueueConfig;
use ebbtide_virtio::{features, status};
use support::{DISLIKED, OFFERED, Rig, echo, lock};

const SOON: Duration = Duration::from_millis(50);

#[test]
fn looks_like_a_modern_virtio_device() {
    let rig = Rig::new();
    let pci = rig.driver.pci();
    assert_eq!(pci.read_config(0, 4), 0x1042_1af4);
    assert_eq!(
        pci.read_config(8, 4),
        0x0100_0001,
        "mass storage, revision 1"
    );
    assert!(pci.read_config(0x2e, 2) >= 0x40, "subsystem");
    assert_eq!(pci.read_config(0x3d, 1), 0, "no interrupt pin");
    assert_eq!(
        pci.read_config(0x10, 4) & 0xf,
        0xc,
        "a 64-bit prefetchable memory BAR"
    );
    assert_eq!(
        pci.vectors(),
        4,
        "one for each queue and one for the configuration"
    );
    assert_eq!(rig.driver.read_common(common::NUM_QUEUES, 2), 3);
    let sizes: Vec<u16> = (0..4)
        .map(|index| rig.driver.max_queue_size(index))
        .collect();
    assert_eq!(sizes, [16, 8, 256, 0], "and no fourth");
    let [_, notify, ..] = rig.driver.structures();
    assert!(notify.len >= 12);
}

#[test]
fn offers_the_devices_features_and_its_own() {
    let mut rig = Rig::new();
    let transport = features::VERSION_1 | features::RING_INDIRECT_DESC | features::RING_EVENT_IDX;
    assert_eq!(rig.driver.offered(), OFFERED | DISLIKED | transport);
    rig.driver.write_common(common::DEVICE_FEATURE_SELECT, 4, 2);
    assert_eq!(rig.driver.read_common(common::DEVICE_FEATURE, 4), 0);
    rig.driver.negotiate(OFFERED).unwrap();
    assert_eq!(rig.driver.features(), OFFERED | features::VERSION_1);
}

#[test]
fn refuses_features_by_leaving_features_ok_clear() {
    let mut rig = Rig::new();
    assert!(rig.driver.negotiate(DISLIKED).is_err());
    let cases = [
        (OFFERED, "VERSION_1 is required"),
        (features::VERSION_1 | 1, "not offered"),
        (features::VERSION_1 | features::RING_PACKED, "not offered"),
    ];
    for (wanted, why) in cases {
        rig.driver.reset().unwrap();
        rig.driver.set_status(status::ACKNOWLEDGE | status::DRIVER);
        rig.driver.set_features(wanted);
        rig.driver.set_status(status::FEATURES_OK);
        assert_eq!(
            rig.driver.status(),
            status::ACKNOWLEDGE | status::DRIVER,
            "{why}"
        );
    }
    rig.driver.reset().unwrap();
    rig.driver.set_features(features::VERSION_1);
    rig.driver.write_common(common::DRIVER_FEATURE_SELECT, 4, 2);
    rig.driver.write_common(common::DRIVER_FEATURE, 4, 1);
    rig.driver.set_status(status::FEATURES_OK);
    assert_eq!(rig.driver.status(), 0, "bit 64 is not offered");
}

#[test]
fn features_stand_once_they_are_ok() {
    let mut rig = Rig::new();
    rig.driver.negotiate(0).unwrap();
    rig.driver
        .set_features(features::VERSION_1 | OFFERED | DISLIKED);
    let queue = rig.driver.add_queue(0, 16);
    rig.driver.driver_ok().unwrap();
    drop(queue);
    rig.driver.write_common(common::DRIVER_FEATURE_SELECT, 4, 0);
    assert_eq!(rig.driver.read_common(common::DRIVER_FEATURE, 4), 0);
}

#[test]
fn serves_chains_of_every_layout() {
    for wanted in [
        0,
        features::RING_EVENT_IDX,
        features::RING_INDIRECT_DESC,
        features::TRANSPORT,
    ] {
        let (rig, mut queue) = Rig::ready(wanted);
        let indirect = wanted & features::RING_INDIRECT_DESC != 0;
        let layouts = [
            Layout::Direct,
            Layout::Indirect,
            Layout::Mixed(1),
            Layout::Mixed(2),
        ];
        for layout in layouts
            .into_iter()
            .filter(|layout| indirect || *layout == Layout::Direct)
        {
            let (parts, to) = echo(&rig, b"round the house");
            let parts: Vec<Part> = parts.into_iter().flat_map(|part| part.split(4)).collect();
            let used = rig.driver.roundtrip(0, &mut queue, &parts, layout).unwrap();
            assert_eq!(used.written, 15, "{layout:?}");
            assert_eq!(
                rig.board.ram().read(to, 15),
                b"round the house",
                "{layout:?}"
            );
        }
    }
}

#[test]
fn interrupts_through_the_vector_of_the_queue() {
    let (rig, mut queue) = Rig::ready(features::RING_EVENT_IDX);
    let message = rig.driver.queue_message(0);
    for round in 1..=3 {
        queue.enable_interrupts();
        let (parts, _) = echo(&rig, b"x");
        rig.driver
            .roundtrip(0, &mut queue, &parts, Layout::Direct)
            .unwrap();
        assert!(rig.driver.wait_interrupt(message, round));
    }
    queue.disable_interrupts();
    let (parts, _) = echo(&rig, b"x");
    rig.driver
        .roundtrip(0, &mut queue, &parts, Layout::Direct)
        .unwrap();
    rig.driver.silence_queue(0);
    queue.enable_interrupts();
    let (parts, _) = echo(&rig, b"x");
    rig.driver
        .roundtrip(0, &mut queue, &parts, Layout::Direct)
        .unwrap();
    std::thread::sleep(SOON);
    assert_eq!(rig.driver.interrupts(message), 3);
    assert_eq!(rig.driver.interrupts(rig.driver.config_message()), 0);
    assert_eq!(
        rig.driver.take_isr() & 1,
        1,
        "a driver without a vector polls this"
    );
    assert_eq!(rig.driver.take_isr(), 0, "and clears it");
}

#[test]
fn a_masked_vector_is_pending_until_unmasked() {
    let (rig, mut queue) = Rig::ready(0);
    let message = rig.driver.queue_message(0);
    rig.driver.pci().mask_vector(1, true);
    let (parts, _) = echo(&rig, b"x");
    rig.driver
        .roundtrip(0, &mut queue, &parts, Layout::Direct)
        .unwrap();
    std::thread::sleep(SOON);
    assert_eq!(rig.driver.interrupts(message), 0);
    rig.driver.pci().mask_vector(1, false);
    assert!(rig.driver.wait_interrupt(message, 1));
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let rig = Rig::new();
    rig.driver.write_common(common::QUEUE_SELECT, 2, 0);
    for field in [common::CONFIG_VECTOR, common::QUEUE_VECTOR] {
        assert_eq!(rig.driver.read_common(field, 2), 0xffff, "after reset");
        for (vector, reads) in [(0, 0), (3, 3), (4, 0xffff), (2, 2), (0xffff, 0xffff)] {
            rig.driver.write_common(field, 2, vector);
            assert_eq!(rig.driver.read_common(field, 2), reads);
        }
    }
    rig.driver.write_common(common::QUEUE_SELECT, 2, 3);
    rig.driver.write_common(common::QUEUE_VECTOR, 2, 0);
    assert_eq!(
        rig.driver.read_common(common::QUEUE_VECTOR, 2),
        0xffff,
        "no such queue"
    );
}

#[test]
fn reads_have_any_width_and_writes_the_fields_own() {
    let rig = Rig::new();
    let driver = &rig.driver;
    driver.write_common(common::QUEUE_DESC, 8, 0x1122_3344_5566_7780);
    assert_eq!(
        driver.read_common(common::QUEUE_DESC, 8),
        0x1122_3344_5566_7780
    );
    assert_eq!(driver.read_common(common::QUEUE_DESC + 4, 4), 0x1122_3344);
    assert_eq!(driver.read_common(common::QUEUE_DESC + 2, 2), 0x5566);
    assert_eq!(driver.read_common(common::QUEUE_DESC + 7, 1), 0x11);
    assert_eq!(
        driver.read_common(common::QUEUE_SIZE, 8) & 0xffff,
        16,
        "several fields at once"
    );
    driver.write_common(common::QUEUE_DESC + 4, 4, 0xaaaa_bbbb);
    assert_eq!(
        driver.read_common(common::QUEUE_DESC, 8),
        0xaaaa_bbbb_5566_7780
    );
    for (offset, size) in [
        (common::QUEUE_DESC, 1),
        (common::QUEUE_DESC + 2, 2),
        (common::QUEUE_SIZE, 1),
        (common::QUEUE_SIZE, 4),
        (common::STATUS, 2),
        (common::DEVICE_FEATURE, 4),
        (common::NUM_QUEUES, 2),
        (common::QUEUE_NOTIFY_OFF, 2),
    ] {
        let before = driver.read_common(offset, size);
        driver.write_common(offset, size, 8);
        assert_eq!(
            driver.read_common(offset, size),
            before,
            "{offset:#x} {size}"
        );
    }
    driver.write_common(0x38, 4, u64::MAX);
    assert_eq!(driver.read_common(0x38, 8), 0, "behind the structure");
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_devices() {
    let rig = Rig::new();
    rig.driver.write_common(common::QUEUE_SELECT, 2, 0);
    for (size, reads) in [
        (8, 8),
        (7, 8),
        (0, 8),
        (32, 8),
        (0xffff, 8),
        (1, 1),
        (16, 16),
    ] {
        rig.driver.write_common(common::QUEUE_SIZE, 2, size);
        assert_eq!(
            rig.driver.read_common(common::QUEUE_SIZE, 2),
            reads,
            "{size}"
        );
    }
}

#[test]
fn an_enabled_queue_cannot_be_changed() {
    let (rig, queue) = Rig::ready(0);
    rig.driver.program_queue(
        0,
        &QueueConfig {
            size: 4,
            ..QueueConfig::default()
        },
    );
    rig.driver.write_common(common::QUEUE_ENABLE, 2, 0);
    assert_eq!(rig.driver.read_common(common::QUEUE_ENABLE, 2), 1);
    assert_eq!(rig.driver.read_common(common::QUEUE_SIZE, 2), 16);
    assert_eq!(
        rig.driver.read_common(common::QUEUE_DESC, 8),
        queue.config().desc.0
    );
    rig.driver.add_queue(1, 8);
    assert_eq!(
        rig.driver.read_common(common::QUEUE_ENABLE, 2),
        0,
        "too late"
    );
}

#[test]
fn a_queue_without_ram_needs_a_reset() {
    let good = QueueConfig {
        size: 8,
        desc: Gpa(0x1000),
        avail: Gpa(0x2000),
        used: Gpa(0x3000),
    };
    let end = 16 << 20;
    for config in [
        QueueConfig {
            desc: Gpa(end),
            ..good
        },
        QueueConfig {
            desc: Gpa(end - 16),
            ..good
        },
        QueueConfig {
            desc: Gpa(0x1008),
            ..good
        },
        QueueConfig {
            avail: Gpa(u64::MAX),
            ..good
        },
        QueueConfig {
            avail: Gpa(u64::MAX - 1),
            ..good
        },
        QueueConfig {
            used: Gpa(u64::MAX - 3),
            ..good
        },
        QueueConfig {
            used: Gpa(0xe000_0000),
            ..good
        },
    ] {
        let mut rig = Rig::new();
        rig.driver.negotiate(0).unwrap();
        rig.driver.program_queue(0, &config);
        rig.driver.write_common(common::QUEUE_ENABLE, 2, 1);
        assert_eq!(
            rig.driver.read_common(common::QUEUE_ENABLE, 2),
            0,
            "{config:?}"
        );
        assert!(rig.driver.needs_reset(), "{config:?}");
        rig.driver.set_status(status::DRIVER_OK);
        assert_eq!(rig.echo.activations.load(Ordering::SeqCst), 0);
        let mut queue = rig.start(0);
        let (parts, _) = echo(&rig, b"fine");
        rig.driver
            .roundtrip(0, &mut queue, &parts, Layout::Direct)
            .unwrap();
    }
}

#[test]
fn configuration_writes_reach_the_device() {
    let rig = Rig::new();
    rig.driver.write_config(4, 2, 0xabcd);
    rig.driver.write_config(0xfff, 1, 7);
    assert_eq!(
        *lock(&rig.echo.config_writes),
        [(4, vec![0xcd, 0xab]), (0xfff, vec![7])]
    );
}

/// Offset, width and value of an access through the configuration window.
fn window(rig: &Rig, bar: u32, offset: u64, size: u8) -> u16 {
    let at = rig.driver.window();
    let pci = rig.driver.pci();
    pci.write_config(at + 4, 1, bar);
    pci.write_config(at + 8, 4, u32::try_from(offset).unwrap());
    pci.write_config(at + 12, 4, size.into());
    at + 16
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let rig = Rig::new();
    let pci = rig.driver.pci();
    let data = window(&rig, 0, common::QUEUE_DESC, 4);
    pci.write_config(data, 4, 0x1234_5670);
    assert_eq!(rig.driver.read_common(common::QUEUE_DESC, 4), 0x1234_5670);
    assert_eq!(pci.read_config(data, 4), 0x1234_5670);
    let data = window(&rig, 0, common::STATUS, 1);
    pci.write_config(data, 1, status::ACKNOWLEDGE.into());
    assert_eq!(rig.driver.status(), status::ACKNOWLEDGE);
    assert_eq!(pci.read_config(data, 1), u32::from(status::ACKNOWLEDGE));
    // Nonsense does nothing.
    for (bar, offset, size) in [
        (2, 0, 4),
        (0, 0x20_0000, 4),
        (0, common::STATUS, 3),
        (0, 0x22, 4),
    ] {
        let data = window(&rig, bar, offset, size);
        pci.write_config(data, 4, 0);
        pci.read_config(data, 4);
    }
    assert_eq!(rig.driver.status(), status::ACKNOWLEDGE);
    assert_eq!(rig.driver.read_common(common::QUEUE_DESC, 4), 0x1234_5670);
}

/// Knows which ioeventfds are where.
#[derive(Clone, Default)]
struct Ioeventfds(Arc<Mutex<Vec<Placed>>>);

/// An address and what a write there signals.
type Placed = (u64, Arc<OwnedFd>);

impl Listener for Ioeventfds {
    fn region_add(&mut self, _section: &FlatSection) -> Result<(), ListenerError> {
        Ok(())
    }

    fn region_del(&mut self, _section: &FlatSection) {}

    fn ioeventfd_add(&mut self, added: &FlatIoeventfd) -> Result<(), ListenerError> {
        lock(&self.0).push((added.addr, Arc::clone(&added.fd)));
        Ok(())
    }

    fn ioeventfd_del(&mut self, removed: &FlatIoeventfd) {
        lock(&self.0).retain(|(address, _)| *address != removed.addr);
    }
}

impl Ioeventfds {
    fn addresses(&self) -> Vec<u64> {
        let mut addresses: Vec<u64> = lock(&self.0).iter().map(|(address, _)| *address).collect();
        addresses.sort_unstable();
        addresses
    }

    /// What the kernel does when the guest writes to `address`.
    fn signal(&self, address: u64) {
        let fds = lock(&self.0);
        let (_, fd) = fds
            .iter()
            .find(|(at, _)| *at == address)
            .expect("an ioeventfd there");
        rustix::io::write(fd, &1u64.to_ne_bytes()).expect("signal");
    }
}

#[test]
fn kicks_come_by_ioeventfd_wherever_the_bar_is() {
    let mut rig = Rig::new();
    let ioeventfds = Ioeventfds::default();
    rig.board
        .space()
        .add_listener(Box::new(ioeventfds.clone()), 0)
        .unwrap();
    let mut queue = rig.start(0);
    let [_, notify, ..] = rig.driver.structures();
    assert_eq!(ioeventfds.addresses(), [notify.address]);
    let (parts, _) = echo(&rig, b"by eventfd");
    queue.add(&parts, Layout::Direct).unwrap();
    ioeventfds.signal(notify.address);
    rig.driver.wait_used(&mut queue).unwrap();

    // The driver moves the BAR.
    let pci = rig.driver.pci();
    let bar = pci.bar(0);
    let elsewhere = bar + (1 << 30);
    pci.write_config(0x10, 4, elsewhere as u32);
    pci.write_config(0x14, 4, (elsewhere >> 32) as u32);
    let moved = notify.address - bar + elsewhere;
    assert_eq!(ioeventfds.addresses(), [moved]);
    let (parts, _) = echo(&rig, b"again");
    queue.add(&parts, Layout::Direct).unwrap();
    ioeventfds.signal(moved);
    rig.driver.wait_used(&mut queue).unwrap();

    pci.write_config(0x10, 4, bar as u32);
    pci.write_config(0x14, 4, (bar >> 32) as u32);
    assert_eq!(ioeventfds.addresses(), [notify.address]);
    rig.driver.reset().unwrap();
    assert!(
        ioeventfds.addresses().is_empty(),
        "nothing is left of the session"
    );
}
