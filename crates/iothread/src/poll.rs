// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting until a descriptor is ready, and non-blocking system calls on top.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{opcode, types};

use crate::local::Local;

impl Local {
    /// Waits until `fd` can be read, is at its end or in error. Several may wait for one descriptor.
    ///
    /// # Errors
    /// A negative answer of the kernel, for example `EBADF`; `ECANCELED` when the executor is stopping.
    pub async fn readable(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ready(fd, libc::POLLIN).await
    }

    /// Waits until `fd` can be written, or is in error.
    ///
    /// # Errors
    /// As [`readable`](Self::readable).
    pub async fn writable(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ready(fd, libc::POLLOUT).await
    }

    async fn ready(&self, fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events as u32).build();
        // SAFETY: the entry points to no memory. Its descriptor is borrowed until this future is dropped; an entry
        // that was not handed over by then is withdrawn, and after that the kernel has its own reference.
        let (result, ()) = unsafe { self.submit(entry, ()) }.await;
        if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok(())
        }
    }

    /// Tries `call`, a non-blocking system call on `fd` such as accept or recv, until it does not answer
    /// `WouldBlock`, waiting in between for `fd` to be readable. `EINTR` is tried again. A task whose calls never
    /// have to wait is made to yield now and then.
    ///
    /// ```
    /// # use std::os::unix::net::UnixStream;
    /// # use std::io::{Read, Write};
    /// # ebbtide_iothread::run("doc", |local| async move {
    /// let (mut near, mut far) = UnixStream::pair()?;
    /// near.set_nonblocking(true)?;
    /// far.write_all(b"hello")?;
    /// let mut buffer = [0; 16];
    /// let length = local.when_readable(&near, || (&near).read(&mut buffer)).await?;
    /// assert_eq!(&buffer[..length], b"hello");
    /// # Ok::<(), std::io::Error>(()) }).unwrap().unwrap();
    /// ```
    ///
    /// # Errors
    /// Those of `call` and of [`readable`](Self::readable).
    pub async fn when_readable<R>(
        &self,
        fd: &impl AsFd,
        mut call: impl FnMut() -> io::Result<R>,
    ) -> io::Result<R> {
        self.share().await;
        loop {
            match attempt(&mut call) {
                Some(result) => return result,
                None => self.readable(fd.as_fd()).await?,
            }
        }
    }

    /// As [`when_readable`](Self::when_readable), for calls that write.
    ///
    /// # Errors
    /// Those of `call` and of [`writable`](Self::writable).
    pub async fn when_writable<R>(
        &self,
        fd: &impl AsFd,
        mut call: impl FnMut() -> io::Result<R>,
    ) -> io::Result<R> {
        self.share().await;
        loop {
            match attempt(&mut call) {
                Some(result) => return result,
                None => self.writable(fd.as_fd()).await?,
            }
        }
    }
}

/// `None`: it would block.
fn attempt<R>(call: &mut impl FnMut() -> io::Result<R>) -> Option<io::Result<R>> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            result => return Some(result),
        }
    }
}
