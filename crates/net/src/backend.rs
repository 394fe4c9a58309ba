// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device does with the host side of its network.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

/// Bytes of the header in front of each frame (virtio 1.3, 5.1.6, `struct virtio_net_hdr` with `num_buffers`).
pub const HEADER_BYTES: usize = 12;
/// The longest frame: an IP packet of 64 KiB with Ethernet header and VLAN tag.
pub const FRAME_BYTES_MAX: usize = 65535 + 14 + 4;
/// The longest packet: header and frame.
pub const PACKET_BYTES_MAX: usize = HEADER_BYTES + FRAME_BYTES_MAX;

/// Whether an error of [`NetBackend::send`] or [`NetBackend::flush`] is about the peer, which is gone, and not about one
/// packet.
pub fn is_of_peer(error: &io::Error) -> bool {
    let gone = [Errno::PIPE, Errno::CONNRESET, Errno::NOTCONN, Errno::BADFD];
    let errno = error.raw_os_error();
    gone.iter().any(|it| Some(it.raw_os_error()) == errno)
}

/// What a backend may leave to the guest in packets it hands out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums may be missing.
    pub csum: bool,
    /// TCP over IPv4 may come in one packet of many segments.
    pub tso4: bool,
    /// TCP over IPv6 may.
    pub tso6: bool,
    /// Such packets may have ECN bits.
    pub ecn: bool,
}

/// The host side of a network card. Any thread may call; none of these blocks but [`end_of_peer`](Self::end_of_peer).
///
/// A packet is a header of [`HEADER_BYTES`] and a frame.
pub trait NetBackend: Send + Sync {
    /// Whether headers mean something: packets without checksums and of many segments can be sent, and
    /// [`set_offloads`](Self::set_offloads) works.
    fn has_offloads(&self) -> bool;

    /// Says what received packets may leave to the guest. Packets that wait already may still be of another kind.
    ///
    /// # Errors
    /// The host's answer. A backend without offloads takes only none.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// The descriptor to wait on: for reading after [`receive`](Self::receive) would have blocked, for writing after
    /// [`flush`](Self::flush) would have.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes the next packet that came; its length. `packet` has room for [`PACKET_BYTES_MAX`].
    ///
    /// # Errors
    /// `WouldBlock`: there is none. Anything else: the peer is gone, there will never be one.
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize>;

    /// Sends a packet, or keeps it for [`flush`](Self::flush) when the host has no room now. To be called only when
    /// nothing is kept.
    ///
    /// # Errors
    /// The host refuses this packet, which is lost, or the peer is gone. Never `WouldBlock`.
    fn send(&self, packet: &[u8]) -> io::Result<()>;

    /// Sends what is kept. Ok: nothing is kept any more.
    ///
    /// # Errors
    /// `WouldBlock`: the host still has no room. Anything else: what was kept is lost.
    fn flush(&self) -> io::Result<()>;

    /// How the peer that is gone has ended, where that is a process of ours; told once. Unlike all else this may block,
    /// for half a second.
    fn end_of_peer(&self) -> Option<String> {
        None
    }
}
