// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A listening Unix socket with one client at a time.
//!
//! ```text
//! no client ──accept──▶ client ──its input ends──▶ client without input
//!     ▲                   │                            │
//!     └──── it is gone ───┴──── it is gone, or another one wants in
//! ```
//!
//! A client that has stopped sending may still read; only the next one shows that it does not.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebbtide_iothread::{Either, Local, race};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send,
};

use super::{Wire, next_output};
use crate::Error;

/// How long to wait after a client could not be accepted.
const RETRY: Duration = Duration::from_millis(100);
/// Bytes read from a client at once.
const RECEIVE_BYTES: usize = 4096;

/// What `sockaddr_un` has room for, less the NUL (unix(7)).
const PATH_BYTES: usize = 107;

/// A bound socket; its path is removed when it is dropped.
pub(super) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the path: another process may have replaced it since.
    identity: Option<(u64, u64)>,
}

impl Listener {
    pub(super) fn bind(path: &Path) -> Result<Self, Error> {
        let error = |source| Error::Socket {
            path: path.to_owned(),
            source,
        };
        let bytes = path.as_os_str().len();
        if bytes > PATH_BYTES {
            return Err(error(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the path has {bytes} bytes, a socket's may have {PATH_BYTES}"),
            )));
        }
        remove_dead(path)?;
        let listener = UnixListener::bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => Error::SocketInUse(path.to_owned()),
            _ => error(source),
        })?;
        let identity = path.symlink_metadata().as_ref().map(identity).ok();
        let this = Self {
            listener,
            path: path.to_owned(),
            identity,
        };
        this.listener.set_nonblocking(true).map_err(error)?;
        Ok(this)
    }

    pub(super) async fn serve(&self, local: &Local, wire: &Wire) {
        let mut waiting = None;
        loop {
            let client = match waiting.take() {
                Some(client) => client,
                // Without a client nothing is kept, so that only the end of the wire makes its output ready.
                None => match race(self.accept(local), wire.output_ready()).await {
                    Either::Left(client) => client,
                    Either::Right(_) => return,
                },
            };
            wire.listen(true);
            let end = self.serve_client(local, wire, &client).await;
            wire.listen(false);
            match end {
                End::Closed => return,
                End::Gone => {}
                End::Replaced(by) => waiting = Some(by),
            }
        }
    }

    async fn serve_client(&self, local: &Local, wire: &Wire, client: &UnixStream) -> End {
        let output = async {
            while let Some(bytes) = next_output(local, wire).await {
                if send_all(local, client, &bytes).await.is_err() {
                    return End::Gone;
                }
            }
            End::Closed
        };
        let input = async {
            match receive(local, wire, client).await {
                Ok(()) => End::Replaced(self.accept(local).await),
                Err(_) => End::Gone,
            }
        };
        match race(output, input).await {
            Either::Left(end) | Either::Right(end) => end,
        }
    }

    async fn accept(&self, local: &Local) -> UnixStream {
        loop {
            let accepted = local
                .when_readable(&self.listener, || self.listener.accept())
                .await;
            match accepted.and_then(|(client, _)| client.set_nonblocking(true).map(|()| client)) {
                Ok(client) => return client,
                Err(error) => {
                    // Out of descriptors, or the client is gone again.
                    tracing::warn!(%error, path = %self.path.display(), "a client can't be accepted");
                    local.sleep(RETRY).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = self.path.symlink_metadata().as_ref().map(identity).ok();
        if ours.is_some() && ours == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// How serving a client ended.
enum End {
    /// The wire was closed and everything is sent.
    Closed,
    /// The client is gone.
    Gone,
    /// The client had stopped sending, and here is another.
    Replaced(UnixStream),
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Removes a socket nobody listens at.
fn remove_dead(path: &Path) -> Result<(), Error> {
    let error = |source| Error::Socket {
        path: path.to_owned(),
        source,
    };
    let metadata = match path.symlink_metadata() {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(error)?,
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::NotASocket(path.to_owned()));
    }
    match probe(path) {
        Ok(()) | Err(Errno::AGAIN) => Err(Error::SocketInUse(path.to_owned())),
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(error),
        Err(other) => Err(error(other.into())),
    }
}

/// Connects to the socket and hangs up. Never waits: a full backlog is `AGAIN`.
fn probe(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

async fn send_all(local: &Local, client: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = local
            .when_writable(client, || Ok(send(client, bytes, SendFlags::NOSIGNAL)?))
            .await?;
        bytes = bytes.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// Hands what the client sends to the guest, until the client has sent everything. Waits forever once the wire is
/// closed.
async fn receive(local: &Local, wire: &Wire, client: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; RECEIVE_BYTES];
    loop {
        let room = wire.input_room().await.min(buffer.len());
        if room == 0 {
            std::future::pending::<()>().await;
        }
        let free = buffer.get_mut(..room).unwrap_or_default();
        let count = local
            .when_readable(client, || {
                Ok(recv(client, &mut *free, RecvFlags::DONTWAIT)?.0)
            })
            .await?;
        if count == 0 {
            return Ok(());
        }
        wire.receive(buffer.get(..count).unwrap_or_default());
    }
}
