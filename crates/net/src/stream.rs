// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frames over a stream socket: a length of 4 bytes, big-endian, and the frame.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, recv, send, sendmsg, socket_with,
};

use crate::backend::{FRAME_BYTES_MAX, HEADER_BYTES, NetBackend, Offloads};
use crate::error::NetError;

/// Bytes of the length.
const LENGTH_BYTES: usize = 4;
/// Room for at least one frame behind what is left of another.
const BUFFER_BYTES: usize = 2 * (LENGTH_BYTES + FRAME_BYTES_MAX);

/// A listener that has not accepted anybody for so long does not do so any more.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A connected socket.
pub(crate) struct Stream {
    fd: OwnedFd,
    incoming: Mutex<Incoming>,
    /// What the socket had no room for: the end of one frame.
    kept: Mutex<Vec<u8>>,
}

impl Stream {
    pub(crate) fn connect(id: &str, path: &Path) -> Result<Stream, NetError> {
        let socket = connect(path).map_err(|source| NetError::Socket {
            id: id.to_owned(),
            path: path.to_owned(),
            source,
        })?;
        Stream::adopt(id, socket)
    }

    pub(crate) fn adopt(id: &str, fd: OwnedFd) -> Result<Stream, NetError> {
        let error = |source| NetError::Socket {
            id: id.to_owned(),
            path: PathBuf::new(),
            source,
        };
        match rustix::net::sockopt::socket_type(&fd) {
            Ok(SocketType::STREAM) => {}
            Ok(_) => {
                let why = "it is no stream socket";
                return Err(error(io::Error::new(io::ErrorKind::InvalidInput, why)));
            }
            Err(errno) => return Err(error(errno.into())),
        }
        fcntl_getfl(&fd)
            .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .map_err(|errno| error(errno.into()))?;
        Ok(Stream {
            fd,
            incoming: Mutex::new(Incoming::new()),
            kept: Mutex::default(),
        })
    }

    fn kept(&self) -> MutexGuard<'_, Vec<u8>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects, and gives up a listener that accepts nobody.
fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_LIMIT))?;
    match retry_on_intr(|| rustix::net::connect(&socket, &address)) {
        Err(Errno::AGAIN) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "who listens there does not accept connections",
        )),
        connected => Ok(connected.map(|()| socket)?),
    }
}

impl NetBackend for Stream {
    fn has_offloads(&self) -> bool {
        false
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if offloads == Offloads::default() {
            Ok(())
        } else {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(len) = incoming.take(packet)? {
                return Ok(len);
            }
            let room = incoming.room();
            let flags = RecvFlags::DONTWAIT;
            let (count, _) = retry_on_intr(|| recv(&self.fd, &mut *room, flags))?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            incoming.end += count;
        }
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        let frame = packet.get(HEADER_BYTES..).unwrap_or_default();
        let len = u32::try_from(frame.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = len.to_be_bytes();
        let parts = [IoSlice::new(&len), IoSlice::new(frame)];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = retry_on_intr(|| {
            let mut no_control = SendAncillaryBuffer::default();
            sendmsg(&self.fd, &parts, &mut no_control, flags)
        });
        let sent = match sent {
            Ok(sent) => sent,
            Err(Errno::AGAIN) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let mut kept = self.kept();
        kept.extend_from_slice(len.get(sent..).unwrap_or_default());
        let of_frame = sent.saturating_sub(LENGTH_BYTES);
        kept.extend_from_slice(frame.get(of_frame..).unwrap_or_default());
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut kept = self.kept();
        while !kept.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match retry_on_intr(|| send(&self.fd, &kept, flags)) {
                Ok(sent) => {
                    let sent = sent.min(kept.len());
                    kept.drain(..sent);
                }
                Err(Errno::AGAIN) => return Err(io::ErrorKind::WouldBlock.into()),
                Err(errno) => {
                    kept.clear();
                    return Err(errno.into());
                }
            }
        }
        Ok(())
    }
}

/// What was received and not taken.
struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn new() -> Incoming {
        Incoming {
            buffer: vec![0; BUFFER_BYTES].into(),
            start: 0,
            end: 0,
        }
    }

    /// The next packet if all of it is there.
    ///
    /// # Errors
    /// A length no frame has: from here on nothing can be told apart any more.
    fn take(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((len, rest)) = there.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
        let room = packet
            .split_at_mut_checked(HEADER_BYTES)
            .and_then(|(header, frame)| Some((header, frame.get_mut(..len)?)));
        let (header, to) = match room {
            Some(room) if (1..=FRAME_BYTES_MAX).contains(&len) => room,
            _ => {
                let why = format!("the peer announces a frame of {len} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
        };
        let Some(frame) = rest.get(..len) else {
            return Ok(None);
        };
        header.fill(0);
        to.copy_from_slice(frame);
        self.start += LENGTH_BYTES + len;
        Ok(Some(HEADER_BYTES + len))
    }

    /// Room for more; never empty, for less than a frame is there when [`take`](Self::take) found none.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }
}
