// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock that keeps two writers off one image.
//!
//! An open-file-description lock over the whole file: it belongs to the descriptor rather than to the process, so two
//! disks of one VMM exclude each other too, it cannot be lost by closing an unrelated descriptor of the same file, and
//! the kernel drops it whatever way the process ends. Covering the whole file makes it meet the byte locks QEMU takes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// How much company an image tolerates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Other readers are welcome.
    Shared,
    /// Nobody else.
    Exclusive,
}

/// Tries once to lock the file behind `fd`. `Ok(false)`: somebody else's lock is in the way.
pub(crate) fn try_lock(fd: BorrowedFd<'_>, mode: Mode) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: match mode {
            Mode::Shared => libc::F_RDLCK,
            Mode::Exclusive => libc::F_WRLCK,
        } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0, // to the end, however far the file may grow
        l_pid: 0, // demanded by OFD locks
    };
    // SAFETY: F_OFD_SETLK only reads the flock it is given, which outlives the call; `fd` is open as it is borrowed.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
