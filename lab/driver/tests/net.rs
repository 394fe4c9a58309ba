// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device over a stream: frames both ways, commands, the link.

mod card;
mod device;

use std::sync::Arc;

use card::{BUFFER, ERR, HEADER, MAC, OK, RX, Rig, TX, frame, hears_nothing, receive, send};
use device::ALL;
use ebbtide_iothread::channel;
use ebbtide_lab_driver::{Board, Layout, Part, poll};
use ebbtide_net::{FRAME_BYTES_MAX, MacAddress};
use ebbtide_virtio::features;
use ebbtide_virtio::net::{NetDeviceError, NetEvent, NetSpec, VirtioNet, feature};

#[test]
fn what_a_card_without_offloads_offers() {
    let (mut rig, _peer) = Rig::new();
    rig.driver.reset().unwrap();
    assert_eq!(rig.driver.pci().read_config(2, 2), 0x1041);
    let own = feature::MAC
        | feature::STATUS
        | feature::MRG_RXBUF
        | feature::CTRL_VQ
        | feature::CTRL_RX
        | feature::CTRL_RX_EXTRA
        | feature::CTRL_VLAN
        | feature::CTRL_MAC_ADDR;
    assert_eq!(rig.driver.offered(), own | features::TRANSPORT);
    let mac: Vec<u8> = (0..6)
        .map(|at| rig.driver.read_config(at, 1) as u8)
        .collect();
    assert_eq!(mac, MAC.0);
    assert_eq!(rig.driver.read_config(6, 2), 1, "the link is up");
    assert_eq!(rig.driver.read_config(8, 4), 0);
    assert_eq!(
        [0, 1, 2, 3].map(|i| rig.driver.max_queue_size(i)),
        [256, 256, 64, 0]
    );
}

#[test]
fn what_is_switched_off_is_not_offered_nor_what_needs_it() {
    let (netdev, _peer) = card::pair();
    let spec = NetSpec {
        features_off: feature::CTRL_VQ | feature::MRG_RXBUF,
        mtu: Some(9000),
        rx_queue_size: 1024,
        tx_queue_size: 512,
        ..NetSpec::new("card0", MAC)
    };
    let board = Board::new(16 << 20).unwrap();
    let card = VirtioNet::new(spec, &netdev, board.remote()).unwrap();
    let mut rig = device::Rig::new(board, card, ALL, &[64, 64]);
    rig.driver.reset().unwrap();
    let own = feature::MAC | feature::STATUS | feature::MTU;
    assert_eq!(rig.driver.offered(), own | features::TRANSPORT);
    assert_eq!(rig.driver.read_config(10, 2), 9000);
    assert_eq!(
        [0, 1, 2].map(|i| rig.driver.max_queue_size(i)),
        [1024, 512, 0]
    );
}

#[test]
fn features_without_what_they_need_are_refused() {
    let (mut rig, _peer) = Rig::new();
    for (lonely, needed) in [
        (feature::CTRL_RX, feature::CTRL_VQ),
        (feature::CTRL_VLAN, feature::CTRL_VQ),
        (feature::CTRL_MAC_ADDR, feature::CTRL_VQ),
        (feature::CTRL_RX_EXTRA, feature::CTRL_RX),
    ] {
        assert!(rig.driver.negotiate(lonely).is_err(), "{lonely:#x}");
        let both = lonely | needed | feature::CTRL_VQ;
        assert!(rig.driver.negotiate(both).is_ok(), "{both:#x}");
    }
}

#[test]
fn frames_out_of_whatever_buffers() {
    let (mut rig, peer) = Rig::new();
    let ram = rig.board.ram().clone();
    for (seed, len) in [14, 60, 1514, 9014, FRAME_BYTES_MAX]
        .into_iter()
        .enumerate()
    {
        let there = frame(MacAddress::BROADCAST, len, seed as u8);
        rig.transmit(&there);
        assert_eq!(receive(&peer), there);
        // Header and frame cut anywhere.
        let packet = [&[0; HEADER], &there[..]].concat();
        let gpa = ram.alloc(packet.len(), 1);
        ram.write(gpa, &packet);
        let [front, rest] = Part::readable(gpa, packet.len()).split(5);
        let [middle, back] = rest.split(15);
        for layout in [Layout::Direct, Layout::Indirect, Layout::Mixed(2)] {
            rig.add(TX, &[front, middle, back], layout);
            assert_eq!(rig.used(TX).written, 0);
            assert_eq!(receive(&peer), there);
        }
        ram.free(gpa, packet.len());
    }
    let metrics = rig.card.metrics();
    assert_eq!(
        (metrics.sent, metrics.refused, metrics.malformed),
        (20, 0, 0)
    );
}

#[test]
fn frames_in_order_both_ways_with_few_kicks() {
    let (mut rig, peer) = Rig::new();
    let ram = rig.board.ram().clone();
    let frames: Vec<_> = (0..40).map(|i| frame(MAC, 60 + 30 * i, i as u8)).collect();
    for there in &frames {
        let packet = [&[0; HEADER], &there[..]].concat();
        let gpa = ram.alloc(packet.len(), 1);
        ram.write(gpa, &packet);
        let queue = &mut rig.queues[usize::from(TX)];
        queue
            .add(&[Part::readable(gpa, packet.len())], Layout::Direct)
            .unwrap();
    }
    rig.driver.kick(TX);
    for there in &frames {
        assert_eq!(receive(&peer), *there);
    }
    (0..40).for_each(|_| assert_eq!(rig.used(TX).written, 0));
    rig.post_some(40, BUFFER);
    frames.iter().for_each(|back| send(&peer, back));
    for back in &frames {
        let (bytes, buffers) = rig.received();
        assert_eq!((&bytes[HEADER..], buffers), (&back[..], 1));
        assert_eq!(bytes[..10], [0; 10]);
    }
}

#[test]
fn a_frame_over_many_buffers() {
    let (mut rig, peer) = Rig::new();
    for (len, buffers) in [(14, 1), (100, 1), (500, 1), (501, 2), (1012, 2), (1013, 3)] {
        rig.post_some(3, 512);
        let back = frame(MAC, len, 3);
        send(&peer, &back);
        let (bytes, count) = rig.received();
        assert_eq!((&bytes[HEADER..], count), (&back[..], buffers), "{len}");
        // Those that were not needed take the next frames.
        for _ in buffers..3 {
            send(&peer, &frame(MAC, 60, 9));
            assert_eq!(rig.received().1, 1);
        }
    }
    // One that waits for buffers, which come one by one.
    let back = frame(MAC, FRAME_BYTES_MAX, 5);
    send(&peer, &back);
    rig.post(BUFFER);
    assert!(rig.stays_unused(RX));
    rig.post_some(40, BUFFER);
    let (bytes, count) = rig.received();
    assert_eq!((&bytes[HEADER..], count), (&back[..], 33));
}

#[test]
fn without_merged_buffers() {
    for wanted in [
        ALL & !feature::MRG_RXBUF,
        ALL & !feature::MRG_RXBUF & !features::RING_EVENT_IDX,
    ] {
        let (mut rig, peer) = Rig::with(wanted);
        for _ in 0..100 {
            rig.assert_works(&peer);
        }
        // A frame that does not fit is dropped, its buffer is for the next.
        rig.post(200);
        send(&peer, &frame(MAC, 189, 1));
        send(&peer, &frame(MAC, 188, 2));
        let (bytes, count) = rig.received();
        assert_eq!((bytes[HEADER..].to_vec(), count), (frame(MAC, 188, 2), 1));
        assert_eq!(rig.card.metrics().unfit, 1);
    }
}

/// Nothing is lost while the driver has no buffers: it stays with the host.
#[test]
fn frames_wait_for_buffers() {
    let (mut rig, peer) = Rig::new();
    let frames: Vec<_> = (0..50).map(|i| frame(MAC, 1000, i)).collect();
    frames.iter().for_each(|back| send(&peer, back));
    std::thread::sleep(device::SOON);
    for back in &frames {
        rig.post(BUFFER);
        assert_eq!(rig.received().0[HEADER..], *back);
    }
}

#[test]
fn commands() {
    let (mut rig, peer) = Rig::new();
    let other = MacAddress([0x52, 0x54, 0, 0, 0, 7]);
    let group = MacAddress([0x01, 0, 0x5e, 0, 0, 1]);
    let all = [MAC, other, group, MacAddress::BROADCAST];
    let heard = |rig: &mut Rig| -> Vec<bool> {
        // A frame that passes always, behind each, tells what became of it.
        let mut heard = Vec::new();
        for to in all {
            rig.post_some(2, BUFFER);
            send(&peer, &frame(to, 60, 1));
            send(&peer, &frame(rig.card.mac(), 61, 2));
            let first = rig.received().0.len() == HEADER + 60;
            if first {
                rig.received();
            }
            heard.push(first);
        }
        heard
    };
    assert_eq!(heard(&mut rig), [true; 4]);
    assert_eq!(rig.command(0, 0, &[0]), OK, "not promiscuous");
    assert_eq!(heard(&mut rig), [true, false, false, true]);
    assert_eq!(rig.command(0, 1, &[1]), OK, "all multicast");
    assert_eq!(heard(&mut rig), [true, false, true, true]);
    assert_eq!(rig.command(0, 1, &[0]), OK);
    let tables = [&[1, 0, 0, 0][..], &other.0, &[1, 0, 0, 0], &group.0].concat();
    assert_eq!(rig.command(1, 0, &tables), OK);
    assert_eq!(heard(&mut rig), [true; 4]);
    assert_eq!(rig.command(1, 0, &[0; 8]), OK);
    assert_eq!(rig.command(1, 1, &other.0), OK, "another address");
    assert_eq!(rig.driver.read_config(5, 1), 7);
    assert_eq!(heard(&mut rig), [false, true, false, true]);
    assert!(rig.card.metrics().filtered > 0);
    // The next driver finds everything as it was.
    rig.restart(ALL);
    assert_eq!(rig.driver.read_config(5, 1), 0x56);
    assert_eq!(heard(&mut rig), [true; 4]);
}

#[test]
fn commands_by_vlan() {
    let (mut rig, peer) = Rig::new();
    let tagged = |vlan: u8| {
        let mut tagged = frame(MAC, 64, vlan);
        tagged[12..16].copy_from_slice(&[0x81, 0, 0, vlan]);
        tagged
    };
    assert_eq!(rig.command(0, 0, &[0]), OK);
    assert_eq!(rig.command(2, 0, &[5, 0]), OK);
    rig.post(BUFFER);
    send(&peer, &tagged(4));
    send(&peer, &tagged(5));
    assert_eq!(rig.received().0[HEADER..], tagged(5));
    assert_eq!(rig.command(2, 1, &[5, 0]), OK);
    rig.post(BUFFER);
    send(&peer, &tagged(5));
    send(&peer, &frame(MAC, 70, 0));
    assert_eq!(rig.received().0.len(), HEADER + 70);
    assert_eq!(rig.command(2, 0, &[0, 0x10]), ERR);
}

#[test]
fn commands_that_fail() {
    let (mut rig, peer) = Rig::new();
    let group = [0x01, 0, 0x5e, 0, 0, 1];
    for (class, command, data) in [
        (0, 0, &[][..]),
        (0, 0, &[1, 1]),
        (0, 6, &[1]),
        (1, 0, &[0; 7]),
        (1, 0, &[0; 9]),
        (1, 0, &[0xff; 40]),
        (1, 1, &[2; 5]),
        (1, 1, &group),
        (1, 2, &[]),
        (2, 0, &[1]),
        (2, 2, &[1, 0]),
        (3, 0, &[]),
        (4, 0, &[1, 0]),
        (5, 0, &[0; 8]),
        (255, 255, &[0; 100]),
    ] {
        assert_eq!(rig.command(class, command, data), ERR, "{class} {command}");
    }
    assert_eq!(rig.card.metrics().failed_commands, 15);
    // What was not agreed upon is no command.
    rig.restart(feature::CTRL_VQ | feature::CTRL_RX | feature::MRG_RXBUF);
    assert_eq!(rig.command(0, 0, &[1]), OK);
    assert_eq!(rig.command(0, 2, &[1]), ERR);
    assert_eq!(rig.command(1, 1, &MAC.0), ERR);
    assert_eq!(rig.command(2, 0, &[5, 0]), ERR);
    rig.assert_works(&peer);
}

#[test]
fn the_link_can_be_pulled() {
    let (mut rig, peer) = Rig::new();
    let message = rig.driver.config_message();
    let before = rig.driver.interrupts(message);
    rig.card.set_link(false);
    assert!(rig.driver.wait_interrupt(message, before + 1));
    assert_eq!(rig.driver.read_config(6, 2), 0);
    rig.card.set_link(false);
    rig.transmit(&frame(MAC, 100, 1));
    send(&peer, &frame(MAC, 100, 2));
    rig.post(BUFFER);
    assert!(hears_nothing(&peer) && rig.stays_unused(RX));
    assert!(poll(|| rig.card.metrics().link_down == 2));
    rig.card.set_link(true);
    assert!(rig.driver.wait_interrupt(message, before + 2));
    assert_eq!(rig.driver.read_config(6, 2), 1);
    assert_eq!(rig.driver.interrupts(message), before + 2);
    send(&peer, &frame(MAC, 77, 2));
    assert_eq!(rig.received().0.len(), HEADER + 77);
    rig.assert_works(&peer);
}

#[test]
fn a_peer_that_goes_takes_the_link_down() {
    let (netdev, peer) = card::pair();
    let (events, mut told) = channel();
    let spec = NetSpec {
        events: Some(events),
        ..NetSpec::new("card0", MAC)
    };
    let mut rig = Rig::on(netdev, spec, ALL);
    rig.assert_works(&peer);
    let message = rig.driver.config_message();
    let before = rig.driver.interrupts(message);
    drop(peer);
    assert!(rig.driver.wait_interrupt(message, before + 1));
    assert_eq!(rig.driver.read_config(6, 2), 0);
    let gone = NetEvent::PeerGone {
        device: "card0".into(),
        netdev: "net0".into(),
    };
    assert!(poll(|| told.try_recv().as_ref() == Some(&gone)));
    // Frames go nowhere, but are answered; commands work; it can be reset, and plugging the cable does not help.
    rig.transmit(&frame(MAC, 100, 1));
    assert_eq!(rig.command(0, 0, &[1]), OK);
    rig.restart(ALL);
    rig.card.set_link(false);
    rig.card.set_link(true);
    assert!(!rig.card.link_is_up());
    rig.transmit(&frame(MAC, 100, 1));
    assert_eq!(told.try_recv(), None);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn a_backend_in_use_stays() {
    let (rig, _peer) = Rig::new();
    let Rig {
        rig, card, netdev, ..
    } = rig;
    let error = netdev.remove().unwrap_err().to_string();
    assert_eq!(error, "netdev `net0` is in use by `card0`");
    let again = VirtioNet::new(NetSpec::new("card1", MAC), &netdev, rig.board.remote());
    assert!(matches!(again, Err(NetDeviceError::Netdev { .. })));
    rig.close_ends();
    assert!(netdev.remove().is_err(), "the device is still there");
    drop(card);
    let _board = rig.remove();
    assert!(poll(|| netdev.user().is_none()));
    netdev.remove().unwrap();
    assert_eq!(Arc::strong_count(&netdev), 1);
}

#[test]
fn specs_that_cannot_be() {
    let (netdev, _peer) = card::pair();
    let board = Board::new(1 << 20).unwrap();
    let spec = NetSpec {
        mtu: Some(67),
        ..NetSpec::new("card0", MAC)
    };
    let error = VirtioNet::new(spec, &netdev, board.remote()).err().unwrap();
    assert_eq!(error.to_string(), "card0: host_mtu=67 is below 68");
    assert!(netdev.user().is_none());
}

#[test]
fn interrupts_are_asked_for() {
    let (mut rig, peer) = Rig::new();
    for queue in [RX, TX] {
        assert!(!rig.queues[usize::from(queue)].enable_interrupts());
    }
    let message = rig.driver.queue_message(RX);
    let before = rig.driver.interrupts(message);
    rig.post(BUFFER);
    send(&peer, &frame(MAC, 60, 1));
    assert!(rig.driver.wait_interrupt(message, before + 1));
    rig.received();
    rig.queues[usize::from(RX)].disable_interrupts();
    for _ in 0..20 {
        rig.post(BUFFER);
        send(&peer, &frame(MAC, 60, 1));
        rig.received();
    }
    assert_eq!(rig.driver.interrupts(message), before + 1);
}
