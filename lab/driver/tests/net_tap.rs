// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device on a tap interface, with the host's kernel at the other end, in a network namespace of its own.

mod card;
mod device;

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use card::{BUFFER, ERR, HEADER, MAC, OK, Rig};
use device::{ALL, AT_ONCE};
use ebbtide_net::{MacAddress, Netdev, TapSpec};
use ebbtide_virtio::features;
use ebbtide_virtio::net::{NetSpec, feature};

const INTERFACE: &str = "ebbtap0";
const HOST: [u8; 4] = [10, 77, 0, 1];
const GUEST: [u8; 4] = [10, 77, 0, 2];
const GUEST_PORT: u16 = 7;
/// Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 14 + 20 + 8;

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("the ip program");
    assert!(status.success(), "ip {arguments}");
}

/// A tap interface that is up, with the host's address, in a namespace of this thread; or why there is none.
fn tap(offloads: bool) -> Option<Arc<Netdev>> {
    let skip = |why: &dyn std::fmt::Display| eprintln!("SKIPPED: tests of a tap interface: {why}");
    if let Err(error) = Command::new("ip").arg("-V").output() {
        skip(&format!("no program ip: {error}"));
        return None;
    }
    // SAFETY: only the network of this thread changes, of which nothing is in use; descriptors stay shared.
    let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    if let Err(error) = unshared {
        skip(&format!("no network namespace: {error}"));
        return None;
    }
    let spec = TapSpec {
        interface: Some(INTERFACE.into()),
        offloads,
    };
    match Netdev::tap("net0", &spec) {
        Ok(netdev) => {
            ip(&format!("address add 10.77.0.1/24 dev {INTERFACE}"));
            ip(&format!("link set {INTERFACE} up"));
            ip(&format!(
                "neighbour add 10.77.0.2 lladdr {MAC} dev {INTERFACE}"
            ));
            Some(netdev)
        }
        Err(error) => {
            skip(&error);
            None
        }
    }
}

fn rig(offloads: bool) -> Option<Rig> {
    let netdev = tap(offloads)?;
    Some(Rig::on(netdev, NetSpec::new("card0", MAC), ALL))
}

fn host_mac() -> [u8; 6] {
    // Not from /sys, whose mount may show another namespace.
    let output = Command::new("ip")
        .args(["-o", "link", "show", INTERFACE])
        .output()
        .expect("the ip program");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, behind) = text.split_once("link/ether ").expect("an address");
    let mac: MacAddress = behind[..17].parse().expect("an address");
    mac.0
}

/// The one's complement sum of 16-bit words (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The pseudo header a UDP checksum covers (RFC 768).
fn pseudo(from: [u8; 4], to: [u8; 4], udp_len: u16) -> Vec<u8> {
    [&from[..], &to, &[0, 17], &udp_len.to_be_bytes()].concat()
}

/// A datagram from the guest, with only the pseudo header in its checksum.
fn datagram(to_port: u16, data: &[u8]) -> Vec<u8> {
    let udp_len = 8 + data.len() as u16;
    let mut header = [
        &[0x45, 0][..],
        &(20 + udp_len).to_be_bytes(),
        &[0; 4],
        &[64, 17, 0, 0],
    ]
    .concat();
    header.extend([GUEST, HOST].concat());
    let header_sum = !sum(&header);
    header[10..12].copy_from_slice(&header_sum.to_be_bytes());
    let partial = sum(&pseudo(GUEST, HOST, udp_len));
    [
        &host_mac()[..],
        &MAC.0,
        &[8, 0],
        &header,
        &GUEST_PORT.to_be_bytes(),
        &to_port.to_be_bytes(),
        &udp_len.to_be_bytes(),
        &partial.to_be_bytes(),
        data,
    ]
    .concat()
}

/// The next datagram to the guest, as its packet; other frames (of IPv6, for instance) are passed over.
fn next_datagram(rig: &mut Rig) -> Vec<u8> {
    loop {
        let (packet, _) = rig.received();
        rig.post(BUFFER);
        let frame = &packet[HEADER..];
        if frame.len() > HEADERS && frame[12..14] == [8, 0] && frame[14 + 9] == 17 {
            return packet;
        }
    }
}

/// Whether the UDP checksum of a frame is right.
fn checksum_is_right(frame: &[u8]) -> bool {
    let udp = &frame[14 + 20..];
    sum(&[&pseudo(HOST, GUEST, udp.len() as u16)[..], udp].concat()) == 0xffff
}

#[test]
fn the_kernel_answers_a_question_for_its_address() {
    for offloads in [true, false] {
        let Some(mut rig) = rig(offloads) else { return };
        rig.post_some(30, BUFFER);
        let mut question = [&MacAddress::BROADCAST.0[..], &MAC.0, &[8, 6]].concat();
        question.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        question.extend([&MAC.0[..], &GUEST, &[0; 6], &HOST].concat());
        rig.transmit(&question);
        let answer = loop {
            let (packet, _) = rig.received();
            if packet[HEADER + 12..HEADER + 14] == [8, 6] {
                break packet;
            }
        };
        assert_eq!(answer[HEADER + 20..HEADER + 22], [0, 2], "a reply");
        assert_eq!(answer[HEADER + 22..HEADER + 28], host_mac());
        assert!(rig.timed_close() < AT_ONCE);
        let Rig {
            rig, card, netdev, ..
        } = rig;
        drop(card);
        let _board = rig.remove();
        assert!(ebbtide_lab_driver::poll(|| netdev.user().is_none()));
        drop(netdev);
    }
}

#[test]
fn offloads_are_those_of_the_kernel() {
    let Some(rig) = rig(true) else { return };
    let offered = rig.driver.offered();
    let offloads = feature::CSUM
        | feature::GUEST_CSUM
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::HOST_ECN
        | feature::GUEST_TSO4
        | feature::GUEST_TSO6
        | feature::GUEST_ECN
        | feature::CTRL_GUEST_OFFLOADS;
    assert_eq!(offered & offloads, offloads);
}

#[test]
fn checksums_the_driver_leaves_out() {
    let Some(mut rig) = rig(true) else { return };
    let socket = UdpSocket::bind(("10.77.0.1", 0)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let port = socket.local_addr().unwrap().port();
    let frame = datagram(port, b"to be summed up");
    // VIRTIO_NET_HDR_F_NEEDS_CSUM from the UDP header on, at its offset 6.
    let needs_csum = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    let packet = [&needs_csum[..], &frame].concat();
    let mut data = [0; 100];
    rig.transmit_packet(&packet);
    let (len, from) = socket.recv_from(&mut data).unwrap();
    assert_eq!(&data[..len], b"to be summed up");
    assert_eq!(from.port(), GUEST_PORT);
    // Without the flag the kernel finds it wrong, and without the feature the flag says nothing.
    rig.transmit(&frame);
    assert!(socket.recv_from(&mut data).is_err());
    rig.restart(features::TRANSPORT);
    rig.transmit_packet(&packet);
    assert!(socket.recv_from(&mut data).is_err());
    // What the kernel cannot make sense of is refused by it.
    rig.restart(ALL);
    let beyond = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 6, 0, 0, 0];
    rig.transmit_packet(&[&beyond[..], &frame].concat());
    assert_eq!(rig.card.metrics().refused, 1);
    rig.transmit_packet(&packet);
    assert!(socket.recv_from(&mut data).is_ok());
}

#[test]
fn checksums_the_kernel_leaves_out() {
    let Some(mut rig) = rig(true) else { return };
    let socket = UdpSocket::bind(("10.77.0.1", 0)).unwrap();
    let next = |rig: &mut Rig| {
        socket
            .send_to(b"whose sum is it?", ("10.77.0.2", 9))
            .unwrap();
        let packet = next_datagram(rig);
        assert!(packet.ends_with(b"whose sum is it?"));
        (packet[0] & 1 != 0, checksum_is_right(&packet[HEADER..]))
    };
    rig.post_some(30, BUFFER);
    assert_eq!(next(&mut rig), (true, false));
    assert_eq!(rig.command(5, 0, &[0; 8]), OK, "no offloads");
    assert_eq!(next(&mut rig), (false, true));
    let offloads = feature::GUEST_CSUM | feature::GUEST_TSO4;
    assert_eq!(rig.command(5, 0, &offloads.to_le_bytes()), OK);
    assert_eq!(next(&mut rig), (true, false));
    // A driver that did not agree to it does not get it, whatever the one before had.
    let few = feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS | feature::MRG_RXBUF;
    rig.restart(few);
    rig.post_some(30, BUFFER);
    assert_eq!(rig.command(5, 0, &offloads.to_le_bytes()), ERR);
    assert_eq!(next(&mut rig), (false, true));
}

/// The interface is deleted under the card.
#[test]
fn an_interface_that_goes_takes_the_link_down() {
    let Some(mut rig) = rig(true) else { return };
    assert!(rig.card.link_is_up());
    ip(&format!("link delete {INTERFACE}"));
    let card = Arc::clone(&rig.card);
    assert!(ebbtide_lab_driver::poll(|| !card.link_is_up()));
    rig.transmit(&card::frame(MacAddress::BROADCAST, 100, 0));
    assert!(rig.timed_close() < AT_ONCE);
}
