// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A tap interface of the host (Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, retry_on_intr};

use crate::backend::{HEADER_BYTES, NetBackend, Offloads};
use crate::error::NetError;
use crate::tun::{self, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, Interface};

const DEVICE: &str = "/dev/net/tun";
/// What an interface name has room for, less the NUL.
const NAME_BYTES: usize = 15;

/// Which tap interface. The names in quotes are those of QEMU's options. No script is run to set the interface up, as with
/// QEMU's `script=no,downscript=no`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapSpec {
    /// `ifname`: made if it is not there; `None`: a new one, called `tap` and a number.
    pub interface: Option<String>,
    /// `vnet_hdr`: use the kernel's offloads.
    pub offloads: bool,
}

impl Default for TapSpec {
    fn default() -> TapSpec {
        TapSpec {
            interface: None,
            offloads: true,
        }
    }
}

/// An open tap interface.
pub(crate) struct Tap {
    fd: OwnedFd,
    offloads: bool,
    /// The packet the kernel had no room for.
    kept: Mutex<Vec<u8>>,
}

impl Tap {
    pub(crate) fn open(id: &str, spec: &TapSpec) -> Result<Tap, NetError> {
        let name = interface_name(id, spec.interface.as_deref().unwrap_or("tap%d"))?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(DEVICE, flags, Mode::empty())
            .map_err(failed(id, "open /dev/net/tun"))?;
        let header = if spec.offloads { IFF_VNET_HDR } else { 0 };
        let mut interface = Interface::new(name, IFF_TAP | IFF_NO_PI | header);
        tun::set_interface(fd.as_fd(), &mut interface).map_err(failed(id, "TUNSETIFF"))?;
        Tap::new(id, fd, spec.offloads)
    }

    pub(crate) fn adopt(id: &str, fd: OwnedFd) -> Result<Tap, NetError> {
        let flags = match tun::interface(fd.as_fd()) {
            Ok(interface) => interface.flags,
            Err(Errno::NOTTY | Errno::BADFD | Errno::INVAL | Errno::OPNOTSUPP) => 0,
            Err(errno) => return Err(failed(id, "TUNGETIFF")(errno)),
        };
        if flags & IFF_TAP == 0 || flags & IFF_NO_PI == 0 {
            return Err(NetError::NotTap {
                id: id.to_owned(),
                flags,
            });
        }
        fcntl_getfl(&fd)
            .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .map_err(failed(id, "set O_NONBLOCK"))?;
        Tap::new(id, fd, flags & IFF_VNET_HDR != 0)
    }

    fn new(id: &str, fd: OwnedFd, offloads: bool) -> Result<Tap, NetError> {
        if offloads {
            // The size of a header of virtio 1.0. Its fields are little-endian because this host is.
            tun::set_header_bytes(fd.as_fd(), 12).map_err(failed(id, "TUNSETVNETHDRSZ"))?;
        }
        let tap = Tap {
            fd,
            offloads,
            kept: Mutex::default(),
        };
        tap.set_offloads(Offloads::default())
            .map_err(|source| NetError::Tap {
                id: id.to_owned(),
                what: "TUNSETOFFLOAD",
                source,
            })?;
        Ok(tap)
    }

    /// Where the part of a packet begins that the kernel sees.
    fn start(&self) -> usize {
        if self.offloads { 0 } else { HEADER_BYTES }
    }

    /// False: there is no room.
    fn write(&self, packet: &[u8]) -> io::Result<bool> {
        let seen = packet.get(self.start()..).unwrap_or_default();
        match retry_on_intr(|| rustix::io::write(&self.fd, seen)) {
            // A packet goes whole or not at all.
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<u8>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NetBackend for Tap {
    fn has_offloads(&self) -> bool {
        self.offloads
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads {
            csum,
            tso4,
            tso6,
            ecn,
        } = offloads;
        let bits = [
            (csum, tun::TUN_F_CSUM),
            (tso4, tun::TUN_F_TSO4),
            (tso6, tun::TUN_F_TSO6),
            (ecn, tun::TUN_F_TSO_ECN),
        ]
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |bits, (_, bit)| bits | bit);
        if bits != 0 && !self.offloads {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(tun::set_offload(self.fd.as_fd(), bits)?)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        if let Some(header) = packet.get_mut(..HEADER_BYTES) {
            header.fill(0);
        }
        let start = self.start();
        let seen = packet.get_mut(start..).unwrap_or_default();
        let count = retry_on_intr(|| rustix::io::read(&self.fd, &mut *seen))?;
        Ok(start.saturating_add(count))
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        if !self.write(packet)? {
            let mut kept = self.kept();
            kept.clear();
            kept.extend_from_slice(packet);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut kept = self.kept();
        if kept.is_empty() {
            return Ok(());
        }
        match self.write(&kept) {
            Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
            Ok(true) => {
                kept.clear();
                Ok(())
            }
            Err(error) => {
                kept.clear();
                Err(error)
            }
        }
    }
}

/// Checks a name as the kernel would, which says less about it.
fn interface_name(id: &str, name: &str) -> Result<[u8; 16], NetError> {
    let bytes = name.as_bytes();
    let strange = |byte: &u8| *byte == b'/' || byte.is_ascii_whitespace() || *byte == 0;
    if bytes.is_empty() || bytes.len() > NAME_BYTES || bytes.iter().any(strange) {
        return Err(NetError::InterfaceName {
            id: id.to_owned(),
            name: name.to_owned(),
        });
    }
    let mut buffer = [0; 16];
    for (to, from) in buffer.iter_mut().zip(bytes) {
        *to = *from;
    }
    Ok(buffer)
}

fn failed(id: &str, what: &'static str) -> impl FnOnce(Errno) -> NetError {
    let id = id.to_owned();
    move |errno| NetError::Tap {
        id,
        what,
        source: errno.into(),
    }
}
