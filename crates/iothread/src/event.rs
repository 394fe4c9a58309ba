// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An eventfd: what KVM, a vCPU thread or another process signals and a task waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

use crate::local::Local;

/// An eventfd for a ring to read: it must block, or the ring's read would answer EAGAIN at once.
pub(crate) fn new_bell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC)?)
}

pub(crate) fn ring(fd: impl AsFd) {
    // EAGAIN: the counter is at its end, so it is signalled already. Nothing else can happen to an eventfd, and a
    // bell is rung once per sleep, so its counter never gets there.
    let _ = write(fd, &1_u64.to_ne_bytes());
}

/// Signals an [`Event`], from any thread.
#[derive(Clone, Debug)]
pub struct Notifier {
    fd: Arc<OwnedFd>,
}

impl Notifier {
    /// Adds one to the event's count; never blocks.
    pub fn notify(&self) {
        ring(&self.fd);
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A counter that is signalled from anywhere, also by the kernel (ioeventfd), and awaited by one task at a time.
#[derive(Debug)]
pub struct Event {
    fd: Arc<OwnedFd>,
}

impl Event {
    /// A new one, at zero.
    ///
    /// # Errors
    /// Those of eventfd(2): out of file descriptors or memory.
    pub fn new() -> io::Result<Event> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Event { fd: Arc::new(fd) })
    }

    /// One over what is read as an eventfd is: eight bytes that count, and no waiting.
    pub(crate) fn of_counter(fd: Arc<OwnedFd>) -> Event {
        Event { fd }
    }

    /// What signals it.
    pub fn notifier(&self) -> Notifier {
        Notifier {
            fd: Arc::clone(&self.fd),
        }
    }

    /// The descriptor, for who has to hold it longer than a borrow (ioeventfd and irqfd registrations).
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Waits until it is signalled and takes the count (≥ 1). Dropping the future loses no signal.
    ///
    /// # Errors
    /// Those of poll and read on an eventfd; `ECANCELED` when the executor is stopping.
    pub async fn wait(&mut self, local: &Local) -> io::Result<u64> {
        loop {
            // Poll, then read in one go: an asynchronous read that is cancelled could have taken the count.
            local.readable(self.fd.as_fd()).await?;
            if let Some(count) = self.take()? {
                return Ok(count);
            }
        }
    }

    /// Takes the count if it was signalled; never blocks.
    ///
    /// # Errors
    /// Those of read on an eventfd.
    pub fn take(&mut self) -> io::Result<Option<u64>> {
        take(&self.fd)
    }
}

/// Takes the count of an eventfd that does not block.
pub(crate) fn take(fd: &OwnedFd) -> io::Result<Option<u64>> {
    let mut count = [0; 8];
    match read(fd, &mut count) {
        Ok(_) => Ok(Some(u64::from_ne_bytes(count))),
        Err(Errno::AGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
