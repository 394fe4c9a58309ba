// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A board with a network card; the test is the driver and the peer at the other end of a stream.
#![allow(dead_code)] // Not every test file uses all of it.

use std::io::{Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_lab_driver::{Board, LIMIT, Layout, Part};
use ebbtide_memory::Gpa;
use ebbtide_net::{MacAddress, Netdev};
use ebbtide_virtio::net::{NetSpec, VirtioNet};

use crate::device::{self, ALL};

pub const RX: u16 = 0;
pub const TX: u16 = 1;
pub const CTRL: u16 = 2;
pub const SIZES: [u16; 3] = [64, 64, 16];
pub const HEADER: usize = 12;
pub const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// Room for any frame without offloads.
pub const BUFFER: usize = 2048;
/// `ack` of a command.
pub const OK: u8 = 0;
pub const ERR: u8 = 1;

pub struct Rig {
    pub rig: device::Rig,
    pub card: Arc<VirtioNet>,
    pub netdev: Arc<Netdev>,
    /// Buffers the driver posted, by head.
    posted: std::collections::HashMap<u16, (Gpa, usize)>,
}

impl Deref for Rig {
    type Target = device::Rig;

    fn deref(&self) -> &device::Rig {
        &self.rig
    }
}

impl DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut device::Rig {
        &mut self.rig
    }
}

pub fn pair() -> (Arc<Netdev>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    theirs.set_write_timeout(Some(LIMIT)).unwrap();
    (Netdev::stream_of("net0", ours.into()).unwrap(), theirs)
}

/// An Ethernet frame of `len` bytes from somebody.
pub fn frame(to: MacAddress, len: usize, seed: u8) -> Vec<u8> {
    let head = [&to.0[..], &[0x52, 0x54, 0, 0, 0, 0x99], &[0x08, 0x00]].concat();
    let body = (0..len - head.len()).map(|i| (i as u8).wrapping_mul(13) ^ (i >> 8) as u8 ^ seed);
    head.iter().copied().chain(body).collect()
}

pub fn send(mut peer: &UnixStream, frame: &[u8]) {
    let len = (frame.len() as u32).to_be_bytes();
    peer.write_all(&[&len[..], frame].concat()).unwrap();
}

pub fn receive(mut peer: &UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    peer.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

/// Nothing is there for the peer, now and a moment later.
pub fn hears_nothing(mut peer: &UnixStream) -> bool {
    peer.set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let nothing = peer.read(&mut [0]).is_err();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    nothing
}

impl Rig {
    pub fn on(netdev: Arc<Netdev>, spec: NetSpec, wanted: u64) -> Rig {
        let board = Board::new(32 << 20).unwrap();
        let card = VirtioNet::new(spec, &netdev, board.remote()).unwrap();
        let rig = device::Rig::new(board, Arc::clone(&card) as _, wanted, &SIZES);
        Rig {
            rig,
            card,
            netdev,
            posted: Default::default(),
        }
    }

    pub fn with(wanted: u64) -> (Rig, UnixStream) {
        let (netdev, peer) = pair();
        (Rig::on(netdev, NetSpec::new("card0", MAC), wanted), peer)
    }

    pub fn new() -> (Rig, UnixStream) {
        Rig::with(ALL)
    }

    pub fn restart(&mut self, wanted: u64) {
        self.posted.clear();
        self.rig.restart(wanted);
    }

    /// Gives the device a buffer to receive into.
    pub fn post(&mut self, len: usize) -> u16 {
        let gpa = self.board.ram().alloc(len, 1);
        let head = self.add(RX, &[Part::writable(gpa, len)], Layout::Direct);
        self.posted.insert(head, (gpa, len));
        head
    }

    /// Posts so many buffers.
    pub fn post_some(&mut self, count: usize, len: usize) {
        for _ in 0..count {
            self.post(len);
        }
    }

    /// What the device put into the next used buffer.
    pub fn buffer(&mut self) -> Vec<u8> {
        let used = self.used(RX);
        let (gpa, len) = self.posted.remove(&used.head).expect("a posted buffer");
        assert!(used.written as usize <= len);
        let bytes = self.board.ram().read(gpa, used.written as usize);
        self.board.ram().free(gpa, len);
        bytes
    }

    /// The next frame, over as many buffers as it says, and how many those were.
    pub fn received(&mut self) -> (Vec<u8>, u16) {
        let mut bytes = self.buffer();
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            let more = self.buffer();
            bytes.extend(more);
        }
        (bytes, count)
    }

    /// Sends a packet as one buffer; returns when the device has given it back.
    pub fn transmit_packet(&mut self, packet: &[u8]) {
        let gpa = self.board.ram().alloc(packet.len(), 1);
        self.board.ram().write(gpa, packet);
        self.add(TX, &[Part::readable(gpa, packet.len())], Layout::Direct);
        assert_eq!(self.used(TX).written, 0);
        self.board.ram().free(gpa, packet.len());
    }

    pub fn transmit(&mut self, frame: &[u8]) {
        self.transmit_packet(&[&[0; HEADER], frame].concat());
    }

    /// Carries a command out; its `ack`.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        let bytes = [&[class, command], data].concat();
        let ram = self.board.ram().clone();
        let (from, ack) = (ram.alloc(bytes.len(), 1), ram.alloc(1, 1));
        ram.write(from, &bytes);
        ram.write(ack, &[0xee]);
        let parts = [
            Part::readable(from, 2),
            Part::readable(Gpa(from.0 + 2), data.len()),
            Part::writable(ack, 1),
        ];
        self.add(CTRL, &parts, Layout::Direct);
        assert_eq!(self.used(CTRL).written, 1);
        let [answer] = ram.read(ack, 1)[..] else {
            panic!("one byte")
        };
        ram.free(from, bytes.len());
        ram.free(ack, 1);
        answer
    }

    /// A frame gets through each way.
    pub fn assert_works(&mut self, peer: &UnixStream) {
        assert!(!self.driver.needs_reset());
        let there = frame(MacAddress::BROADCAST, 100, 1);
        self.transmit(&there);
        assert_eq!(receive(peer), there);
        let back = frame(MAC, 100, 2);
        self.post(BUFFER);
        send(peer, &back);
        assert_eq!(self.received().0[HEADER..], back);
    }
}
