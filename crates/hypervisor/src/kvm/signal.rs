// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The signal that gets a thread out of KVM_RUN.
//!
//! Its handler does nothing: what counts is that its arrival ends the system call. It is the process's first real-time
//! signal; nothing else may use it.

use std::io;
use std::sync::OnceLock;

extern "C" fn ignore(_signal: libc::c_int) {}

/// Installs the empty handler, once per process, and lets the calling thread receive the signal.
pub(super) fn receive() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| install().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)))
        .map_err(io::Error::from_raw_os_error)?;
    unblock()
}

fn install() -> io::Result<()> {
    // SAFETY: sigaction is plain data for which all zeroes is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // KVM_RUN is interrupted nevertheless; other system calls of the thread need not be.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: both pointers are valid or null, and the handler touches nothing.
    let done = unsafe { libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn unblock() -> io::Result<()> {
    // SAFETY: sigset_t is plain data; sigemptyset makes it valid before it is used.
    let errno = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if errno == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(errno))
    }
}

/// The calling thread, as [`send`] names it.
pub(super) fn this_thread() -> libc::pid_t {
    // SAFETY: no preconditions.
    unsafe { libc::gettid() }
}

/// Signals a thread of this process. One that is gone is left in peace.
pub(super) fn send(thread: libc::pid_t) {
    // SAFETY: names a thread of this process or none; the handler is harmless wherever it runs.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGRTMIN()) };
}
