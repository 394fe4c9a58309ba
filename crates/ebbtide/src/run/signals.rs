// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SIGTERM, SIGINT and SIGHUP end the VM in order.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use ebbtide_iothread::Local;
use ebbtide_machine::lifecycle::Requests;
use ebbtide_qmp::types::run_state::ShutdownCause;

const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

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
