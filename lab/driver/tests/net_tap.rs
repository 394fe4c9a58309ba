// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device on a tap interface, with the host's kernel at the other end, in a network namespace of its own.

mod card;
mod device;

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use card::{BUFFER, ERR, HEADER, MAC, OK, Rig};
use device::ALL;
use ebbtide_lab_driver::LIMIT;
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
        rig.close_ends();
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
    socket.set_read_timeout(Some(LIMIT)).unwrap();
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
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
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
    socket.set_read_timeout(Some(LIMIT)).unwrap();
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
    // The receive queue is served, with its offloads, before the control queue is.
    assert_eq!(rig.command(0, 0, &[1]), OK);
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

const SYN: u8 = 0x02;
const PUSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// The guest's end of a TCP connection, as far as it is needed.
struct Tcp {
    to_port: u16,
    sent: u32,
    received: u32,
}

impl Tcp {
    /// A packet with these data, its checksum left to the device, and cut into segments if it is long.
    fn packet(&self, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
        let tcp_len = 20 + options.len();
        let total = (20 + tcp_len + data.len()) as u16;
        let mut ip = [
            &[0x45, 0][..],
            &total.to_be_bytes(),
            &[0; 4],
            &[64, 6, 0, 0],
        ]
        .concat();
        ip.extend([GUEST, HOST].concat());
        let ip_sum = !sum(&ip);
        ip[10..12].copy_from_slice(&ip_sum.to_be_bytes());
        let pseudo = [&GUEST[..], &HOST, &[0, 6], &(total - 20).to_be_bytes()].concat();
        let tcp = [
            &GUEST_PORT.to_be_bytes()[..],
            &self.to_port.to_be_bytes(),
            &self.sent.to_be_bytes(),
            &self.received.to_be_bytes(),
            &[(tcp_len as u8 / 4) << 4, flags, 0xff, 0xff],
            &sum(&pseudo).to_be_bytes(),
            &[0, 0],
            options,
        ]
        .concat();
        // Needs a checksum from the TCP header on, at its offset 16.
        let mut header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        if data.len() > SEGMENT {
            header[1] = 1;
            header[2..4].copy_from_slice(&((14 + 20 + tcp_len) as u16).to_le_bytes());
            header[4..6].copy_from_slice(&(SEGMENT as u16).to_le_bytes());
        }
        [&header[..], &host_mac(), &MAC.0, &[8, 0], &ip, &tcp, data].concat()
    }
}

/// Bytes of a segment, as the guest announces.
const SEGMENT: usize = 1400;

/// The next TCP packet to the guest.
fn next_segment(rig: &mut Rig) -> (Vec<u8>, u16) {
    loop {
        let (packet, buffers) = rig.received();
        rig.post_some(usize::from(buffers), BUFFER);
        let frame = &packet[HEADER..];
        if frame.len() >= 54 && frame[12..14] == [8, 0] && frame[14 + 9] == 6 {
            return (packet, buffers);
        }
    }
}

/// A connection of the guest to the host's kernel, which sends and takes many segments as one packet.
#[test]
fn packets_of_many_segments() {
    use std::io::{Read, Write};
    let Some(mut rig) = rig(true) else { return };
    rig.post_some(40, BUFFER);
    let listener = std::net::TcpListener::bind(("10.77.0.1", 0)).unwrap();
    let mut tcp = Tcp {
        to_port: listener.local_addr().unwrap().port(),
        sent: 1000,
        received: 0,
    };
    let [high, low] = (SEGMENT as u16).to_be_bytes();
    rig.transmit_packet(&tcp.packet(SYN, &[2, 4, high, low], &[]));
    let (answer, _) = next_segment(&mut rig);
    let answer = &answer[HEADER + 34..];
    assert_eq!(answer[13], SYN | ACK);
    let theirs = u32::from_be_bytes([answer[4], answer[5], answer[6], answer[7]]);
    (tcp.sent, tcp.received) = (1001, theirs.wrapping_add(1));
    rig.transmit_packet(&tcp.packet(ACK, &[], &[]));
    let (mut stream, _) = listener.accept().unwrap();
    stream
        .set_read_timeout(Some(ebbtide_lab_driver::LIMIT))
        .unwrap();

    let data: Vec<u8> = (0..9000_u32).map(|i| (i % 251) as u8).collect();
    rig.transmit_packet(&tcp.packet(ACK | PUSH, &[], &data));
    let mut received = vec![0; data.len()];
    stream.read_exact(&mut received).unwrap();
    assert!(received == data);

    stream.write_all(&data).unwrap();
    let (packet, buffers) = loop {
        let (packet, buffers) = next_segment(&mut rig);
        if packet.len() > HEADER + 54 {
            break (packet, buffers);
        }
    };
    assert_eq!(
        (packet[0] & 1, packet[1]),
        (1, 1),
        "TCP over IPv4, many segments"
    );
    let segment = u16::from_le_bytes([packet[4], packet[5]]);
    assert_eq!(usize::from(segment), SEGMENT);
    assert!(packet.len() > HEADER + 54 + SEGMENT && buffers > 1);
    assert!(data.starts_with(&packet[HEADER + 54..]));
}

/// The interface is deleted under the card.
#[test]
fn an_interface_that_goes_takes_the_link_down() {
    let Some(mut rig) = rig(true) else { return };
    assert!(rig.card.link_is_up());
    // The kernel may have something to say about IPv6.
    rig.post_some(30, BUFFER);
    ip(&format!("link delete {INTERFACE}"));
    let card = Arc::clone(&rig.card);
    assert!(ebbtide_lab_driver::poll(|| !card.link_is_up()));
    rig.transmit(&card::frame(MacAddress::BROADCAST, 100, 0));
    rig.close_ends();
}
