// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who starts programs for a process that may not: the asker's end.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};

use super::readable_within;
use super::wire;

/// Ending what runs, and itself, is a matter of milliseconds.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A process or thread that starts programs, and the only one that needs the right to. It runs [`serve`](super::serve)
/// on the other end of a socket pair; the programs are fixed there, so that whoever takes this end over can have no
/// other started. It ends, with all it has started, when this is dropped, and when the process that has this ends, in
/// whatever way.
pub struct Launcher {
    pub(super) control: OwnedFd,
    programs: Vec<PathBuf>,
}

impl Launcher {
    /// Starts the process: `command` is to call [`serve`](super::serve) for its standard input and `programs`. It
    /// inherits what the calling thread has and may, so this belongs before anything is opened or restricted, and
    /// signals are blocked.
    ///
    /// # Errors
    /// The process can't be started.
    pub fn start(command: &mut Command, programs: Vec<PathBuf>) -> io::Result<Launcher> {
        let (ours, theirs) = wire::pair()?;
        // It is not waited for: its end of the socket pair says when it has ended.
        let started = command.stdin(Stdio::from(theirs)).spawn();
        // Whoever keeps the command must not keep that end with it, whose closing is what is waited for.
        command.stdin(Stdio::null());
        started?;
        Ok(Launcher {
            control: ours,
            programs,
        })
    }

    /// One that a thread of this process serves, for a process that may start programs itself.
    ///
    /// # Errors
    /// The host gives no sockets or no thread.
    pub fn thread(programs: Vec<PathBuf>) -> io::Result<Launcher> {
        let (ours, theirs) = wire::pair()?;
        let served = programs.clone();
        let builder = std::thread::Builder::new().name("passt-launcher".into());
        builder.spawn(move || {
            if let Err(error) = super::serve(theirs, &served) {
                tracing::error!(%error, "the launcher of passt has failed");
            }
        })?;
        Ok(Launcher {
            control: ours,
            programs,
        })
    }

    /// What it starts: the first if nothing else is asked for.
    pub fn programs(&self) -> &[PathBuf] {
        &self.programs
    }
}

impl Drop for Launcher {
    /// Waits until it has ended all it has started.
    fn drop(&mut self) {
        let ended = shutdown(&self.control, Shutdown::Write)
            .map_err(io::Error::from)
            .and_then(|()| readable_within(self.control.as_fd(), END_LIMIT));
        if !matches!(ended, Ok(true)) {
            tracing::warn!("the launcher of passt does not end");
        }
    }
}

impl fmt::Debug for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launcher")
            .field("programs", &self.programs)
            .finish_non_exhaustive()
    }
}
