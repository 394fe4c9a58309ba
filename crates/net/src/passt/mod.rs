// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process of passt, which connects a guest to the host's network without privileges.
//!
//! ```text
//!   Passt::start ──ask──▶ launcher ──▶ passt: its end of the frames is its standard input
//!        │ ◀── Started ─────┘ │ waits for the process, keeps what it says
//!        │ ◀── Ended ─────────┘
//!   drop: the lifeline is cut ──▶ SIGKILL, reaped ──▶ the lifeline's other end is closed
//! ```

mod arguments;
mod launcher;
mod serve;
mod wire;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use crate::backend::{NetBackend, Offloads};
use crate::error::NetError;
use crate::stream::Stream;
pub use launcher::Launcher;
pub use serve::serve;
use wire::Reply;

/// The launcher does one thing at a time, none of which takes long.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// A program that has not ended by then is taken to work.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// How often it is looked at meanwhile.
const SETTLE_LOOK: Duration = Duration::from_millis(5);
/// From SIGKILL to the end of a process.
const END_LIMIT: Duration = Duration::from_secs(5);
/// From the end of a connection to word of the end of the process that had it.
const WORD_LIMIT: Duration = Duration::from_millis(500);

/// Which program. The names in quotes are those of QEMU's options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PasstSpec {
    /// `path`: the program, one of the launcher's; its first if there is none here.
    pub program: Option<PathBuf>,
    /// `param`: what to pass to it besides what makes it use our socket, as passt(1) has it. Options that shape the
    /// network are accepted, by their full names or letters.
    pub arguments: Vec<String>,
}

/// The running program. It ends with its socket; dropping this makes sure of it, and waits.
pub(crate) struct Passt {
    stream: Stream,
    /// Where the launcher tells of it, and sees whether it is still wanted.
    lifeline: OwnedFd,
}

impl Passt {
    pub(crate) fn start(
        id: &str,
        launcher: &Launcher,
        spec: &PasstSpec,
    ) -> Result<Passt, NetError> {
        let program = program(id, launcher, spec)?;
        let arguments =
            arguments::checked(&spec.arguments).map_err(|refusal| NetError::Argument {
                id: id.to_owned(),
                refusal,
            })?;
        let failed = |source| NetError::Program {
            id: id.to_owned(),
            program: program.clone(),
            source,
        };
        let unanswered = |source| NetError::Launcher {
            id: id.to_owned(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let stream = Stream::adopt(id, ours.into())?;
        let (lifeline, their_end) = wire::pair().map_err(failed)?;
        let fds = (theirs.as_fd(), their_end.as_fd());
        wire::ask(launcher.control.as_fd(), &program, &arguments, fds.0, fds.1)
            .map_err(unanswered)?;
        // They are the launcher's and the program's now: their closing says that those are gone.
        drop((theirs, their_end));
        match answer(lifeline.as_fd(), ANSWER_LIMIT).map_err(unanswered)? {
            Reply::Started(pid) => {
                let passt = Passt { stream, lifeline };
                match passt.settled(pid).map_err(unanswered)? {
                    None => Ok(passt),
                    Some(reason) => Err(NetError::ProgramEnded {
                        id: id.to_owned(),
                        program,
                        reason,
                    }),
                }
            }
            Reply::Failed(why) | Reply::Ended(why) => Err(failed(io::Error::other(why))),
        }
    }

    /// Waits until the program has either ended, and says how, or seems to work: passt gives up its rights when there
    /// is nothing more that can go wrong, others are given time.
    fn settled(&self, pid: u32) -> io::Result<Option<String>> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        let inherited = seccomp_filters(pid);
        loop {
            match answer(self.lifeline.as_fd(), SETTLE_LOOK) {
                Ok(Reply::Ended(how)) => return Ok(Some(how)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(error),
            }
            let confined = seccomp_filters(pid) > inherited && inherited.is_some();
            if confined || Instant::now() >= deadline {
                return Ok(None);
            }
        }
    }
}

/// The program that `spec` asks for, by the name that `launcher` knows.
fn program(id: &str, launcher: &Launcher, spec: &PasstSpec) -> Result<PathBuf, NetError> {
    let programs = launcher.programs();
    let found = match &spec.program {
        Some(asked) => programs.iter().find(|it| *it == asked),
        None => programs.first(),
    };
    found.cloned().ok_or_else(|| NetError::OtherProgram {
        id: id.to_owned(),
        program: spec.program.clone().unwrap_or_default(),
        accepted: programs.iter().map(|it| it.display().to_string()).collect(),
    })
}

/// How many seccomp filters a process has (proc(5)); `None` where the kernel does not tell.
fn seccomp_filters(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("Seccomp_filters:"))?;
    count.trim().parse().ok()
}

/// The next that is said on a lifeline.
///
/// # Errors
/// `TimedOut`: nothing was. `UnexpectedEof`: nothing will be.
fn answer(lifeline: BorrowedFd<'_>, limit: Duration) -> io::Result<Reply> {
    if !readable_within(lifeline, limit)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    wire::replied(lifeline)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Waits until something is there to read, or the other end is gone. False: not within `limit`.
fn readable_within(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&limit),
        ) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let ended = shutdown(&self.lifeline, Shutdown::Write)
            .map_err(io::Error::from)
            .and_then(|()| gone(self.lifeline.as_fd(), END_LIMIT));
        if let Err(error) = ended {
            tracing::warn!(%error, "passt does not end");
        }
    }
}

/// Waits until nothing more is said: the process has been reaped, or nobody is left who would.
fn gone(lifeline: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    loop {
        match answer(lifeline, limit) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

impl NetBackend for Passt {
    fn has_offloads(&self) -> bool {
        self.stream.has_offloads()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.stream.set_offloads(offloads)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.fd()
    }

    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.stream.receive(packet)
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.stream.send(packet)
    }

    fn flush(&self) -> io::Result<()> {
        self.stream.flush()
    }

    fn end_of_peer(&self) -> Option<String> {
        match answer(self.lifeline.as_fd(), WORD_LIMIT) {
            Ok(Reply::Ended(how)) => Some(how),
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Some("it has closed its connection and runs".to_owned())
            }
            Err(_) => Some("its launcher has ended".to_owned()),
        }
    }
}
