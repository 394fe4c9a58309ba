// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Backends against what is at their other end.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{
    FRAME_BYTES_MAX, HEADER_BYTES, NetBackend, NetError, Netdev, Offloads, PACKET_BYTES_MAX,
    TapSpec, is_of_peer,
};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

fn pair() -> (Arc<Netdev>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    (Netdev::stream_of("net0", ours.into()).unwrap(), theirs)
}

pub(crate) fn packet(frame: &[u8]) -> Vec<u8> {
    [&[0xaa; HEADER_BYTES], frame].concat()
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(7) ^ seed).collect()
}

fn on_the_wire(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

pub(crate) fn receive(backend: &dyn NetBackend) -> io::Result<Vec<u8>> {
    let mut packet = vec![0xee; PACKET_BYTES_MAX];
    let len = backend.receive(&mut packet)?;
    assert_eq!(packet[..HEADER_BYTES], [0; HEADER_BYTES]);
    Ok(packet[HEADER_BYTES..len].to_vec())
}

pub(crate) fn wait<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + LIMIT;
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}

#[test]
fn frames_of_a_stream_in_pieces_and_in_heaps() {
    let (netdev, mut peer) = pair();
    let net = netdev.claim("card0").unwrap();
    assert_eq!(receive(&*net).unwrap_err().kind(), ErrorKind::WouldBlock);
    let frames: Vec<_> = [1, 14, 60, 1514, 9000, FRAME_BYTES_MAX]
        .iter()
        .enumerate()
        .map(|(seed, &len)| frame(len, seed as u8))
        .collect();
    for frame in &frames[..4] {
        for byte in on_the_wire(frame) {
            assert_eq!(receive(&*net).unwrap_err().kind(), ErrorKind::WouldBlock);
            peer.write_all(&[byte]).unwrap();
        }
        assert_eq!(receive(&*net).unwrap(), *frame);
    }
    let heap: Vec<u8> = frames.iter().flat_map(|frame| on_the_wire(frame)).collect();
    let writer = std::thread::spawn(move || peer.write_all(&heap).map(|()| peer).unwrap());
    for frame in &frames {
        assert_eq!(wait(|| receive(&*net)).unwrap(), *frame);
    }
    let peer = writer.join().unwrap();
    peer.shutdown(std::net::Shutdown::Both).unwrap();
    for _ in 0..2 {
        assert_eq!(receive(&*net).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_peer_that_breaks_the_framing() {
    for len in [0, FRAME_BYTES_MAX as u32 + 1, u32::MAX] {
        let (netdev, mut peer) = pair();
        let net = netdev.claim("card0").unwrap();
        peer.write_all(&len.to_be_bytes()).unwrap();
        for _ in 0..2 {
            let error = receive(&*net).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData);
            assert!(error.to_string().contains(&len.to_string()), "{error}");
        }
    }
}

/// Whatever the socket has room for, the peer sees whole frames in order.
#[test]
fn a_peer_that_reads_late_gets_all_that_was_taken() {
    let (netdev, mut peer) = pair();
    let net = netdev.claim("card0").unwrap();
    let mut expected = Vec::new();
    let mut seed = 0;
    loop {
        let frame = frame(50_000, seed);
        net.send(&packet(&frame)).unwrap();
        expected.extend(on_the_wire(&frame));
        seed += 1;
        if let Err(error) = net.flush() {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            break;
        }
    }
    // Whoever has it next goes on where the last one stopped.
    drop(net);
    let net = netdev.claim("card1").unwrap();
    let len = expected.len();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; len];
        peer.read_exact(&mut bytes).map(|()| bytes).unwrap()
    });
    wait(|| net.flush()).unwrap();
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn a_peer_that_is_gone_takes_nothing() {
    let (netdev, peer) = pair();
    let net = netdev.claim("card0").unwrap();
    peer.shutdown(std::net::Shutdown::Both).unwrap();
    for _ in 0..2 {
        let error = net.send(&packet(&frame(60, 0))).unwrap_err();
        assert!(is_of_peer(&error), "{error}");
        assert!(net.flush().is_ok(), "nothing is kept");
    }
}

#[test]
fn a_stream_has_no_offloads() {
    let (netdev, _peer) = pair();
    let net = netdev.claim("card0").unwrap();
    assert!(!net.has_offloads());
    assert!(net.set_offloads(Offloads::default()).is_ok());
    let csum = Offloads {
        csum: true,
        ..Offloads::default()
    };
    assert!(net.set_offloads(csum).is_err());
}

#[test]
fn one_device_at_a_time() {
    let (netdev, _peer) = pair();
    let claim = netdev.claim("card0").unwrap();
    let error = netdev.claim("card1").unwrap_err().to_string();
    assert_eq!(error, "netdev `net0` is in use by `card0`");
    assert!(matches!(netdev.remove(), Err(NetError::InUse { .. })));
    assert_eq!(netdev.user().as_deref(), Some("card0"));
    drop(claim);
    drop(netdev.claim("card1").unwrap());
    netdev.remove().unwrap();
    assert!(matches!(
        netdev.claim("card0"),
        Err(NetError::Removed { .. })
    ));
    assert!(matches!(netdev.remove(), Err(NetError::Removed { .. })));
}

#[test]
fn sockets_by_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net.sock");
    let error = Netdev::stream("net0", &path).unwrap_err().to_string();
    assert!(error.contains("net.sock"), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let netdev = Netdev::stream("net0", &path).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(&on_the_wire(b"hello, frame!")).unwrap();
    assert_eq!(
        receive(&*netdev.claim("card0").unwrap()).unwrap(),
        b"hello, frame!"
    );
}

#[test]
fn descriptors_of_something_else() {
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    assert!(matches!(
        Netdev::stream_of("net0", file()),
        Err(NetError::Socket { .. })
    ));
    let error = Netdev::tap_of("net0", file()).unwrap_err().to_string();
    assert!(error.contains("no tap interface"), "{error}");
    let (datagrams, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
    assert!(Netdev::stream_of("net0", datagrams.into()).is_err());
}

#[test]
fn interface_names_are_checked() {
    for name in ["", "a/b", "a b", "0123456789abcdef", "a\0b"] {
        let spec = TapSpec {
            interface: Some(name.into()),
            ..TapSpec::default()
        };
        let error = Netdev::tap("net0", &spec).unwrap_err();
        assert!(
            matches!(error, NetError::InterfaceName { .. }),
            "{name}: {error}"
        );
    }
}

/// A tap interface, or why there is none.
fn tap(spec: &TapSpec) -> Option<Arc<Netdev>> {
    match Netdev::tap("net0", spec) {
        Ok(netdev) => Some(netdev),
        Err(error) => {
            eprintln!("SKIPPED: no tap interface can be made here: {error}");
            None
        }
    }
}

#[test]
fn a_tap_interface_that_is_down_takes_and_gives_nothing() {
    for offloads in [true, false] {
        let spec = TapSpec {
            interface: None,
            offloads,
        };
        let Some(netdev) = tap(&spec) else { return };
        let net = netdev.claim("card0").unwrap();
        assert_eq!(net.has_offloads(), offloads);
        assert_eq!(receive(&*net).unwrap_err().kind(), ErrorKind::WouldBlock);
        // It is down: the kernel refuses the packet, which is not kept.
        assert!(net.send(&[0; 100]).is_err_and(|error| !is_of_peer(&error)));
        assert!(net.flush().is_ok());
        let all = Offloads {
            csum: true,
            tso4: true,
            tso6: true,
            ecn: true,
        };
        assert_eq!(net.set_offloads(all).is_ok(), offloads);
        assert!(net.set_offloads(Offloads::default()).is_ok());
    }
}

/// Whoever asks has one thread of few that may block.
#[test]
fn a_listener_that_does_not_accept_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let refused = Netdev::stream("net0", &path).map(drop);
        tell.send(refused.unwrap_err().to_string())
    });
    let refused = told.recv_timeout(LIMIT).expect("it waits for ever");
    assert!(refused.contains("does not accept"), "{refused}");
}
