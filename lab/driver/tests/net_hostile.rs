// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device with drivers that are wrong, peers that take nothing, and resets in between.

mod card;
mod device;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use card::{BUFFER, CTRL, HEADER, MAC, RX, Rig, TX, frame, hears_nothing, receive, send};
use device::ALL;
use ebbtide_lab_driver::{Layout, Part, poll};
use ebbtide_memory::{Backing, Gpa, RamSpec, Region};
use ebbtide_net::{FRAME_BYTES_MAX, MacAddress};
use ebbtide_virtio::net::feature;

const NOWHERE: Gpa = Gpa(1 << 35);

#[test]
fn chains_to_send_that_are_no_frame() {
    let (mut rig, peer) = Rig::new();
    let ram = rig.board.ram().clone();
    let gpa = ram.alloc(80_000, 1);
    let readable = |len| vec![Part::readable(gpa, len)];
    let mut chains: Vec<_> = (0..HEADER + 14).map(readable).collect();
    chains.push(readable(HEADER + FRAME_BYTES_MAX + 1));
    chains.push(vec![Part::writable(gpa, 100)]);
    let malformed = chains.len() as u64;
    chains.push(vec![Part::readable(NOWHERE, 100)]);
    chains.push(vec![Part::readable(gpa, 100), Part::readable(NOWHERE, 100)]);
    chains.push(vec![Part::readable(Gpa(u64::MAX - 99), 100)]);
    for parts in chains {
        for layout in [Layout::Direct, Layout::Indirect] {
            rig.add(TX, &parts, layout);
            assert_eq!(rig.used(TX).written, 0);
        }
    }
    assert!(hears_nothing(&peer));
    let metrics = rig.card.metrics();
    assert_eq!((metrics.malformed, metrics.bad_memory), (2 * malformed, 6));
    rig.assert_works(&peer);
}

/// A header asks for what was not agreed upon: checksums are left as they are, segments are refused.
#[test]
fn headers_that_ask_for_too_much() {
    let (mut rig, peer) = Rig::new();
    let there = frame(MacAddress::BROADCAST, 100, 1);
    let with = |flags: u8, gso_type: u8| {
        let header = [
            flags, gso_type, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ];
        [&header[..], &there].concat()
    };
    for gso_type in 1..=255 {
        rig.transmit_packet(&with(1, gso_type));
    }
    assert!(hears_nothing(&peer));
    assert_eq!(rig.card.metrics().malformed, 255);
    rig.transmit_packet(&with(0xff, 0));
    assert_eq!(receive(&peer), there);
}

#[test]
fn buffers_that_are_no_room() {
    for wanted in [ALL, ALL & !feature::MRG_RXBUF] {
        let (mut rig, peer) = Rig::with(wanted);
        let gpa = rig.board.ram().alloc(BUFFER, 1);
        for len in 0..HEADER {
            rig.add(RX, &[Part::writable(gpa, len)], Layout::Direct);
        }
        rig.add(RX, &[Part::readable(gpa, BUFFER)], Layout::Direct);
        rig.post(BUFFER);
        let back = frame(MAC, 100, 1);
        send(&peer, &back);
        for _ in 0..=HEADER {
            assert_eq!(rig.used(RX).written, 0);
        }
        assert_eq!(rig.received().0[HEADER..], back);
        assert_eq!(rig.card.metrics().malformed, HEADER as u64 + 1);
        // A frame is lost with the buffer that is none; the next is not.
        rig.add(RX, &[Part::writable(NOWHERE, BUFFER)], Layout::Direct);
        rig.post(BUFFER);
        send(&peer, &frame(MAC, 100, 2));
        assert_eq!(rig.used(RX).written, 0);
        let back = frame(MAC, 100, 3);
        send(&peer, &back);
        assert_eq!(rig.received().0[HEADER..], back);
        assert_eq!(rig.card.metrics().bad_memory, 1);
        rig.assert_works(&peer);
    }
}

/// All the buffers a queue can have are too small together: the frame is dropped, and the next one is not stuck behind.
#[test]
fn a_frame_that_will_never_fit() {
    let (mut rig, peer) = Rig::new();
    rig.post_some(32, 20);
    send(&peer, &frame(MAC, 1514, 1));
    assert!(rig.stays_unused(RX), "there may be more buffers");
    rig.post_some(32, 20);
    let back = frame(MAC, 60, 2);
    send(&peer, &back);
    let (bytes, buffers) = rig.received();
    assert_eq!((&bytes[HEADER..], buffers), (&back[..], 4));
    assert_eq!(rig.card.metrics().unfit, 1);
}

#[test]
fn half_in_memory_that_is_none() {
    let (mut rig, peer) = Rig::new();
    rig.post(200);
    rig.add(RX, &[Part::writable(NOWHERE, 200)], Layout::Direct);
    rig.post(200);
    send(&peer, &frame(MAC, 500, 1));
    for _ in 0..3 {
        assert_eq!(rig.used(RX).written, 0, "none of it is a frame");
    }
    rig.assert_works(&peer);
}

#[test]
fn commands_without_room_for_an_answer() {
    let (mut rig, peer) = Rig::new();
    let gpa = rig.board.ram().alloc(8, 1);
    let command = Part::readable(gpa, 3);
    for answer in [Part::writable(gpa, 0), Part::writable(NOWHERE, 1)] {
        rig.add(CTRL, &[command, answer], Layout::Direct);
        assert!(rig.driver.wait_needs_reset());
        rig.restart(ALL);
    }
    // A command that cannot be read, or is endless, is a command that fails.
    for command in [
        Part::readable(NOWHERE, 3),
        Part::readable(Gpa(0x1000), 1 << 20),
    ] {
        rig.add(CTRL, &[command, Part::writable(gpa, 1)], Layout::Direct);
        assert_eq!(rig.used(CTRL).written, 1);
        assert_eq!(rig.board.ram().read(gpa, 1), [1]);
    }
    rig.assert_works(&peer);
}

#[test]
fn broken_queues_want_a_reset() {
    let (mut rig, peer) = Rig::new();
    for index in [RX, TX, CTRL] {
        rig.queues[usize::from(index)].set_avail_idx(1000);
        rig.driver.kick(index);
        // The receive queue is looked at when there is something to receive.
        send(&peer, &frame(MAC, 60, 0));
        assert!(rig.driver.wait_needs_reset(), "queue {index}");
        rig.restart(ALL);
        rig.post(BUFFER);
        send(&peer, &frame(MAC, 61, 0));
        while rig.received().0.len() != HEADER + 61 {
            rig.post(BUFFER);
        }
        rig.assert_works(&peer);
    }
}

/// Fills the socket until the device stops taking chains; how many frames it took.
fn fill(rig: &mut Rig, there: &[u8]) -> usize {
    let packet = [&[0; HEADER], there].concat();
    let gpa = rig.board.ram().alloc(packet.len(), 1);
    rig.board.ram().write(gpa, &packet);
    let mut taken = 0;
    loop {
        rig.add(TX, &[Part::readable(gpa, packet.len())], Layout::Direct);
        if rig.stays_unused_by_the_board(TX) {
            return taken;
        }
        taken += 1;
    }
}

/// So many come, and no more.
fn read_whole_frames(peer: &UnixStream, there: &[u8], count: usize) {
    for number in 0..count {
        let mut frame = vec![0; 4 + there.len()];
        (&mut &*peer).read_exact(&mut frame).unwrap();
        assert_eq!(frame[..4], (there.len() as u32).to_be_bytes());
        assert!(frame[4..] == *there, "frame {number} is damaged");
    }
    peer.set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let more = (&mut &*peer).read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(more, Err(std::io::ErrorKind::WouldBlock));
    peer.set_read_timeout(Some(ebbtide_lab_driver::LIMIT))
        .unwrap();
}

#[test]
fn a_peer_that_takes_nothing_holds_nothing_up() {
    let (mut rig, peer) = Rig::new();
    let there = frame(MacAddress::BROADCAST, 30_000, 1);
    let mut taken = fill(&mut rig, &there);
    assert!(taken > 0);
    for _ in 0..3 {
        rig.reset_ends();
        rig.restart(ALL);
        // It is still full; this one waits in the queue.
        assert_eq!(fill(&mut rig, &there), 0);
        assert_eq!(rig.command(0, 0, &[1]), card::OK);
    }
    // The peer takes it all: whole frames, those that were answered and the one that waits.
    taken += 1;
    read_whole_frames(&peer, &there, taken);
    rig.used(TX);
    rig.assert_works(&peer);
    assert!(fill(&mut rig, &there) > 0);
    rig.close_ends();
}

#[test]
fn a_queue_that_waits_goes_on_by_itself() {
    let (mut rig, peer) = Rig::new();
    let there = frame(MacAddress::BROADCAST, 30_000, 1);
    let taken = fill(&mut rig, &there);
    read_whole_frames(&peer, &there, taken + 1);
    rig.used(TX);
    rig.assert_works(&peer);
}

#[test]
fn a_frame_that_waits_for_buffers_holds_nothing_up() {
    let (mut rig, peer) = Rig::new();
    for _ in 0..3 {
        rig.post(100);
        (0..20).for_each(|i| send(&peer, &frame(MAC, 1000, i)));
        assert!(rig.stays_unused(RX));
        rig.reset_ends();
        rig.restart(ALL);
    }
    (0..3).for_each(|i| send(&peer, &frame(MAC, 1000, i)));
    rig.close_ends();
}

/// Nobody waits for the peer, for a frame of its waits for buffers: then the next frame to it tells.
#[test]
fn a_peer_that_goes_unnoticed() {
    let (mut rig, peer) = Rig::new();
    send(&peer, &frame(MAC, 1000, 1));
    std::thread::sleep(device::SOON);
    peer.shutdown(std::net::Shutdown::Both).unwrap();
    rig.transmit(&frame(MAC, 100, 1));
    assert!(poll(|| !rig.card.link_is_up()));
    assert_eq!(rig.card.metrics().refused, 1);
    rig.close_ends();
}

/// Posted buffers are addresses: the memory they are in can go.
#[test]
fn memory_that_waits_for_frames_can_go() {
    let (mut rig, peer) = Rig::new();
    let block = rig.board.memory().ram().add(RamSpec {
        name: "dimm".into(),
        size_bytes: 4 << 20,
        max_size_bytes: 4 << 20,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: Some(2 << 20),
    });
    let block = block.unwrap();
    let region = Region::ram("dimm", &block);
    let (memory, root) = (rig.board.memory(), rig.board.root());
    memory
        .update(|map| map.add(root, &region, 8 << 30, 0))
        .unwrap();
    block.plug(0..2 << 20, false).unwrap();
    rig.add(RX, &[Part::writable(Gpa(8 << 30), BUFFER)], Layout::Direct);
    rig.add(
        RX,
        &[Part::writable(Gpa((8 << 30) + 4096), BUFFER)],
        Layout::Direct,
    );
    // One is taken and waits with half a frame, so that both are held.
    send(&peer, &frame(MAC, 100, 1));
    assert_eq!(rig.used(RX).written as usize, HEADER + 100);
    send(&peer, &frame(MAC, 3000, 1));
    assert!(rig.stays_unused(RX));
    let seal = block.seal(0..2 << 20).unwrap();
    let drained = ebbtide_lab_driver::block_on(seal.drained(), ebbtide_lab_driver::LIMIT);
    assert!(drained.is_some());
    assert!(seal.discard().is_ok());
    rig.post(BUFFER);
    for _ in 0..2 {
        assert_eq!(rig.used(RX).written, 0);
    }
    rig.assert_works(&peer);
}

fn try_send(mut peer: &UnixStream, len: usize) -> bool {
    let bytes = [&(len as u32).to_be_bytes()[..], &frame(MAC, len, 7)].concat();
    peer.write_all(&bytes).is_ok()
}

#[test]
fn resets_at_any_moment() {
    let (mut rig, peer) = Rig::new();
    let reading = peer.try_clone().unwrap();
    let there = frame(MacAddress::BROADCAST, 900, 1);
    let expected = there.clone();
    // Whatever the resets cut, the peer sees whole frames.
    let reader = std::thread::spawn(move || {
        let mut count = 0;
        let mut frame = vec![0; 4 + expected.len()];
        while (&reading).read_exact(&mut frame).is_ok() {
            assert!(frame[4..] == expected[..], "frame {count}");
            count += 1;
        }
        count
    });
    let writing = peer.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let mut sizes = (0..20).map(|i| 200 + 20 * i).cycle();
        while sizes.next().is_some_and(|len| try_send(&writing, len)) {}
    });
    let packet = [&[0; HEADER], &there[..]].concat();
    let gpa = rig.board.ram().alloc(packet.len(), 1);
    rig.board.ram().write(gpa, &packet);
    for round in 0..80_u64 {
        rig.post_some(20, 300);
        for _ in 0..20 {
            rig.add(TX, &[Part::readable(gpa, packet.len())], Layout::Direct);
        }
        std::thread::sleep(Duration::from_micros(round * 17 % 700));
        rig.driver.reset().unwrap();
        let used = |rig: &Rig| [RX, TX].map(|i| rig.queues[usize::from(i)].device_used_idx());
        let before = used(&rig);
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!(used(&rig), before, "a reset queue was touched");
        rig.restart(ALL);
    }
    rig.close_ends();
    let sent = rig.card.metrics().sent;
    peer.shutdown(std::net::Shutdown::Both).unwrap();
    writer.join().unwrap();
    let seen = reader.join().unwrap();
    assert!(seen <= sent && sent > 0, "{seen} of {sent}");
    assert!(poll(|| rig.card.metrics().received > 0));
}
