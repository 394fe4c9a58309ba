// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SIGTERM, SIGINT and SIGHUP end the VM in order.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

use ebbtide_iothread::Local;
use ebbtide_machine::lifecycle::Requests;
use ebbtide_qmp::types::run_state::ShutdownCause;
use rustix::event::{EventfdFlags, PollFd, PollFlags};

const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// What is said when there is no machine yet that could end.
const ENDED: &[u8] = b"ebbtide run: ended by a signal before the machine was ready\n";

/// The signals that end the VM, blocked in all threads and read from a descriptor.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks them in this thread and in those it starts.
    pub fn block() -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set it is given; the others then work on it, and the
        // descriptor that signalfd returns is new and owned by nobody else.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let refused =
                libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if refused != 0 {
                return Err(io::Error::from_raw_os_error(refused));
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Until the guard is told that it is over, a signal ends the process at once, as if the VM had
    /// ended: for the time in which this thread can't look and nothing would be left behind.
    pub fn end_process_meanwhile(&self) -> io::Result<Meanwhile> {
        let signals = self.0.try_clone()?;
        let over = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        let told = Arc::clone(&over);
        let ready = Arc::new(Barrier::new(2));
        let set_up = Arc::clone(&ready);
        let thread = std::thread::Builder::new()
            .name("starting".into())
            .spawn(move || {
                // While memory is populated the kernel holds the lock of the address space: from
                // here on nothing may allocate, or it waits for what it is to cut short.
                set_up.wait();
                if signal_comes(&signals, &told) {
                    let _ = rustix::io::write(rustix::stdio::stderr(), ENDED);
                    // SAFETY: ends the process without running anything of it.
                    unsafe { libc::_exit(0) }
                }
            })?;
        ready.wait();
        Ok(Meanwhile {
            over,
            thread: Some(thread),
        })
    }

    /// Turns each signal into a request to end.
    pub async fn watch(self, local: Local, requests: Requests) {
        loop {
            if let Err(e) = local.readable(self.0.as_fd()).await {
                tracing::error!("signals can't be waited for: {e}");
                return;
            }
            while self.read() {
                requests.shutdown(ShutdownCause::HostSignal);
            }
        }
    }

    /// Takes one signal off the descriptor; false: there is none.
    fn read(&self) -> bool {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is as large as the length says.
        let got = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        got == size as isize
    }
}

/// See [`Signals::end_process_meanwhile`].
pub struct Meanwhile {
    over: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Meanwhile {
    /// From now on, signals wait for [`Signals::watch`].
    pub fn over(self) {}
}

impl Drop for Meanwhile {
    fn drop(&mut self) {
        // Can only fail when the counter is full: it is told once.
        let _ = rustix::io::write(&*self.over, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It does not panic, and there is nothing to do about it.
            let _ = thread.join();
        }
    }
}

/// Waits for a signal, which is left to be read, or until `over` is told; true: a signal.
fn signal_comes(signals: &OwnedFd, over: &OwnedFd) -> bool {
    let mut fds = [
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(over, PollFlags::IN),
    ];
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => return fds.first().is_some_and(|fd| !fd.revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eventfd(count: u32) -> OwnedFd {
        rustix::event::eventfd(count, EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn a_signal_goes_before_the_end_of_the_wait() {
        assert!(signal_comes(&eventfd(1), &eventfd(0)));
        assert!(signal_comes(&eventfd(1), &eventfd(1)));
        assert!(!signal_comes(&eventfd(0), &eventfd(1)));
    }
}
