// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of `/dev/net/tun` (linux/if_tun.h).

use std::ffi::c_int;
use std::os::fd::BorrowedFd;

use rustix::io;
use rustix::ioctl::{self, IntegerSetter, Setter, Updater, opcode};

const GROUP: u8 = b'T';
const TUNSETIFF: ioctl::Opcode = opcode::write::<c_int>(GROUP, 202);
const TUNSETOFFLOAD: ioctl::Opcode = opcode::write::<c_int>(GROUP, 208);
const TUNGETIFF: ioctl::Opcode = opcode::read::<c_int>(GROUP, 210);
const TUNSETVNETHDRSZ: ioctl::Opcode = opcode::write::<c_int>(GROUP, 216);

/// Frames with Ethernet headers.
pub(crate) const IFF_TAP: u16 = 0x0002;
/// No packet information in front of them.
pub(crate) const IFF_NO_PI: u16 = 0x1000;
/// A virtio-net header in front of them.
pub(crate) const IFF_VNET_HDR: u16 = 0x4000;

/// Checksums may be missing.
pub(crate) const TUN_F_CSUM: usize = 0x01;
/// TCP over IPv4 of many segments.
pub(crate) const TUN_F_TSO4: usize = 0x02;
/// TCP over IPv6 of many segments.
pub(crate) const TUN_F_TSO6: usize = 0x04;
/// ... with ECN bits.
pub(crate) const TUN_F_TSO_ECN: usize = 0x08;

/// `struct ifreq` (netdevice(7)) as far as these calls use it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Interface {
    /// Ends with a zero byte.
    pub name: [u8; 16],
    pub flags: u16,
    rest: [u8; 22],
}

impl Interface {
    pub(crate) fn new(name: [u8; 16], flags: u16) -> Interface {
        Interface {
            name,
            flags,
            rest: [0; 22],
        }
    }
}

/// Makes or joins the interface; its name becomes the real one.
pub(crate) fn set_interface(fd: BorrowedFd<'_>, interface: &mut Interface) -> io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    unsafe { ioctl::ioctl(fd, Updater::<TUNSETIFF, Interface>::new(interface)) }
}

/// What interface the descriptor is of.
pub(crate) fn interface(fd: BorrowedFd<'_>) -> io::Result<Interface> {
    let mut interface = Interface::new([0; 16], 0);
    // SAFETY: TUNGETIFF writes one ifreq.
    unsafe { ioctl::ioctl(fd, Updater::<TUNGETIFF, Interface>::new(&mut interface)) }?;
    Ok(interface)
}

/// Sets the size of the header, at least 10.
pub(crate) fn set_header_bytes(fd: BorrowedFd<'_>, bytes: c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { ioctl::ioctl(fd, Setter::<TUNSETVNETHDRSZ, c_int>::new(bytes)) }
}

/// Sets what received packets may leave undone: `TUN_F_` bits.
pub(crate) fn set_offload(fd: BorrowedFd<'_>, bits: usize) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    unsafe { ioctl::ioctl(fd, IntegerSetter::<TUNSETOFFLOAD>::new_usize(bits)) }
}
