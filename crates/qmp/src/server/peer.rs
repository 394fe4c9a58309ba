// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One client: its socket, what still has to be sent to it, and how far the negotiation is.
//!
//! ```text
//!   socket ─▶ read ─▶ Stream ─▶ one request ─▶ Executor ─▶ answer ─┐
//!               ▲                                                  ├─▶ output ─▶ write ─▶ socket
//!               └── waits while much output is unsent    event ────┘
//! ```
//! A client that does not read is not read from, so its requests wait in its own socket. Events cannot wait: when
//! they pile up over the limit, the client is dropped.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ebbtide_iothread::{Local, race};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::signal::Signal;
use crate::executor::ClientId;

/// Unsent output from which on no further request is begun.
const PAUSE_BYTES: usize = 64 << 10;

/// How long a client whose connection ends may take for what is still to be sent.
const LINGER: Duration = Duration::from_secs(2);

/// How often it is looked whether a client whose command takes long is still there.
const GONE_LOOK: Duration = Duration::from_secs(1);

/// Why a client is no longer served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The client has gone.
    Gone,
    /// The client does not read what it is sent.
    TooSlow,
}

/// A connected client.
pub(super) struct Peer {
    pub(super) id: ClientId,
    socket: UnixStream,
    output: RefCell<VecDeque<u8>>,
    output_limit: usize,
    negotiated: Cell<bool>,
    ended: Cell<Option<Ended>>,
    /// A command of this client is being carried out.
    busy: Cell<bool>,
    /// Output, its end, or busy has changed.
    changed: Signal,
}

impl Peer {
    pub(super) fn new(id: ClientId, socket: UnixStream, output_limit: usize) -> Self {
        Self {
            id,
            socket,
            output: RefCell::default(),
            output_limit,
            negotiated: Cell::new(false),
            ended: Cell::new(None),
            busy: Cell::new(false),
            changed: Signal::default(),
        }
    }

    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated.get()
    }

    pub(super) fn set_negotiated(&self) {
        self.negotiated.set(true);
    }

    pub(super) fn set_busy(&self, busy: bool) {
        self.busy.set(busy);
        self.changed.notify();
    }

    /// Nothing is being carried out for it and nothing is left to send.
    pub(super) fn is_quiet(&self) -> bool {
        self.ended.get().is_some() || (!self.busy.get() && self.output.borrow().is_empty())
    }

    /// Ready when [`Peer::is_quiet`].
    pub(super) async fn quiet(&self) {
        self.changed.until(|| self.is_quiet()).await;
    }

    /// Adds a message to the output; drops the client when that is too much.
    pub(super) fn send(&self, message: &[u8]) {
        if self.ended.get().is_some() {
            return;
        }
        let unsent = self.output.borrow().len();
        if unsent.saturating_add(message.len()) > self.output_limit {
            tracing::warn!(client = %self.id, unsent_bytes = unsent, "dropping a QMP client that does not read");
            self.end(Ended::TooSlow);
            return;
        }
        self.output.borrow_mut().extend(message);
        self.changed.notify();
    }

    pub(super) fn end(&self, why: Ended) {
        if self.ended.get().is_none() {
            self.ended.set(Some(why));
            // Frees the memory now and tells the other side, whoever else still holds the socket.
            self.output.take();
            if let Err(error) = rustix::net::shutdown(&self.socket, Shutdown::Both) {
                tracing::trace!(client = %self.id, %error, "shutdown of a QMP client");
            }
            self.changed.notify();
        }
    }

    pub(super) fn ended(&self) -> Option<Ended> {
        self.ended.get()
    }

    /// Ready when there is room for another answer; false when the client has ended.
    pub(super) async fn room(&self) -> bool {
        self.changed
            .until(|| self.ended.get().is_some() || self.output.borrow().len() < PAUSE_BYTES)
            .await;
        self.ended.get().is_none()
    }

    /// Ready when nobody is there any more who could read an answer; a client that has only said its last may. What it has
    /// sent before it went is not looked at: it may be much.
    pub(super) async fn gone(&self, local: &Local) {
        while self.ended.get().is_none() {
            race(local.sleep(GONE_LOOK), self.until_ended()).await;
            // An end of both directions is told unasked.
            let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
            let at_once = Timespec::default();
            if matches!(poll(&mut fds, Some(&at_once)), Ok(1..)) {
                return;
            }
        }
    }

    async fn until_ended(&self) {
        self.changed.until(|| self.ended.get().is_some()).await;
    }

    /// Reads what has come; 0 at the end of the input, also when the client was ended from here.
    pub(super) async fn read(&self, local: &Local, buffer: &mut [u8]) -> usize {
        loop {
            if self.ended.get().is_some() {
                return 0;
            }
            match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) => return length,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => {
                    tracing::debug!(client = %self.id, %error, "reading from a QMP client failed");
                    self.end(Ended::Gone);
                    return 0;
                }
            }
            race(local.readable(self.fd()), self.until_ended()).await;
        }
    }

    /// Sends output as it comes, until the client has ended.
    pub(super) async fn write(&self, local: &Local) {
        loop {
            self.changed
                .until(|| self.ended.get().is_some() || !self.output.borrow().is_empty())
                .await;
            if self.ended.get().is_some() {
                return;
            }
            match self.send_some() {
                Ok(()) => self.changed.notify(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    race(local.writable(self.fd()), self.until_ended()).await;
                }
                Err(error) => {
                    tracing::debug!(client = %self.id, %error, "writing to a QMP client failed");
                    self.end(Ended::Gone);
                }
            }
        }
    }

    fn send_some(&self) -> io::Result<()> {
        let mut output = self.output.borrow_mut();
        let (front, _) = output.as_slices();
        let sent = rustix::net::send(
            &self.socket,
            front,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )?;
        output.drain(..sent);
        if output.is_empty() {
            // One large answer is no reason to keep its memory for the life of the connection.
            output.shrink_to(PAUSE_BYTES);
        }
        Ok(())
    }

    /// After the last request: lets the output go out, for a while.
    pub(super) async fn linger(&self, local: &Local) {
        if local.timeout(LINGER, self.quiet()).await.is_err() {
            tracing::debug!(client = %self.id, "a QMP client left its last answers unread");
        }
        self.end(Ended::Gone);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
