// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The launcher's end: starts programs, tells of their ends, and ends them.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use super::arguments;
use super::wire::{Asked, Reply, Request, asked, reply};

/// More cards no machine has; each of their programs takes tens of megabytes.
const PROGRAMS_MAX: usize = 64;
/// Of what a program says, so much is kept: all that passt says of its options.
const TAIL_BYTES: usize = 16 << 10;
/// Of the last that one which has ended has said, so many pieces are looked at: others may have its descriptor, and go on.
const LAST_PIECES: usize = 64;
/// All of the environment that a program gets.
const SEARCH_PATH: &str = "PATH";
/// The longest line of it that is passed on.
const LINE_BYTES: usize = 400;

/// Serves the other end of a [`Launcher`](super::Launcher) until that is closed or the process that made it ends, and then
/// ends all that was started. Of `programs`, each as it is to be asked for, nothing else is ever executed, and only with arguments that
/// [`PasstSpec::arguments`](super::PasstSpec::arguments) may hold.
///
/// What it starts inherits the limits, the session and the confinement of the process, and its descriptors that are
/// not close-on-exec; of the environment only the search path.
///
/// # Errors
/// The socket can't be read, or who is at its other end not be watched.
pub fn serve(control: OwnedFd, programs: &[PathBuf]) -> io::Result<()> {
    let asker = match asker(&control) {
        Ok(asker) => asker,
        Err(Errno::SRCH) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let mut running: Vec<Program> = Vec::new();
    let over = loop {
        let happened = match wait(&control, asker.as_ref(), &mut running) {
            Ok(happened) => happened,
            Err(error) => break Err(error),
        };
        running.retain_mut(|program| !program.has_ended());
        if happened.asker_ended {
            break Ok(());
        }
        if !happened.is_asked {
            continue;
        }
        match asked(control.as_fd()) {
            Ok(Asked::For(request, network, lifeline)) => {
                let room = running.len() < PROGRAMS_MAX;
                match start(request, programs, room, network) {
                    Ok((child, pidfd, said)) => {
                        reply(lifeline.as_fd(), &Reply::Started(child.id()));
                        running.push(Program::new(child, pidfd, said, lifeline));
                    }
                    Err(why) => reply(lifeline.as_fd(), &Reply::Failed(why)),
                }
            }
            Ok(Asked::Nonsense) => {}
            Ok(Asked::Over) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // All at once, and none is left behind.
    for program in &mut running {
        program.end();
    }
    for program in &mut running {
        let _ = program.child.wait();
    }
    over
}

/// The process that made the pair of `control`, if it is another one. That its end is closed does not follow from its own:
/// what it has handed over may be that end, and then this process holds it itself.
fn asker(control: &OwnedFd) -> rustix::io::Result<Option<OwnedFd>> {
    let pid = socket_peercred(control)?.pid;
    if pid == getpid() {
        return Ok(None);
    }
    pidfd_open(pid, PidfdFlags::empty()).map(Some)
}

/// What concerns all programs.
struct Happened {
    /// A message is there.
    is_asked: bool,
    /// Who sends them has ended.
    asker_ended: bool,
}

/// Waits until something happens. Lifelines that are cut have their program ended.
fn wait(
    control: &OwnedFd,
    asker: Option<&OwnedFd>,
    running: &mut [Program],
) -> io::Result<Happened> {
    let mut fds = vec![PollFd::new(control, PollFlags::IN)];
    if let Some(asker) = asker {
        fds.push(PollFd::new(asker, PollFlags::IN));
    }
    for program in running.iter() {
        fds.push(PollFd::new(&program.pidfd, PollFlags::IN));
        if !program.is_to_end {
            fds.push(PollFd::new(&program.lifeline, PollFlags::IN));
        }
        if let Some(said) = &program.said {
            fds.push(PollFd::new(said, PollFlags::IN));
        }
    }
    retry_on_intr(|| poll(&mut fds, None))?;
    let happened: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    drop(fds);
    let mut happened = happened.into_iter();
    let is_asked = happened.next().unwrap_or(false);
    let asker_ended = asker.is_some() && happened.next().unwrap_or(false);
    for program in running {
        let (listened, heard) = (!program.is_to_end, program.said.is_some());
        program.is_over |= happened.next().unwrap_or(false);
        // Nothing is ever said on it from the other end.
        if listened && happened.next().unwrap_or(false) {
            program.end();
        }
        if heard && happened.next().unwrap_or(false) {
            program.listen();
        }
    }
    Ok(Happened {
        is_asked,
        asker_ended,
    })
}

fn start(
    request: Request,
    programs: &[PathBuf],
    room: bool,
    network: OwnedFd,
) -> Result<(Child, OwnedFd, ChildStderr), String> {
    let Request {
        program,
        arguments: words,
    } = request;
    // By its spelling: as a path `passt/` is `passt`, and is looked for elsewhere.
    let known = |own: &&PathBuf| own.as_os_str() == program.as_os_str();
    let Some(program) = programs.iter().find(known) else {
        return Err("it is none of the programs that may be started".to_owned());
    };
    let arguments = arguments::checked(&words)?;
    if !room {
        return Err(format!("{PROGRAMS_MAX} are running, which is the most"));
    }
    // Standard input is the one descriptor that can be given to a process without others getting it, too. What else is in
    // the environment is for whoever started the machine; a guest that takes its passt over reads it there.
    let spawned = Command::new(program)
        .args(["--foreground", "--fd", "0"])
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os(SEARCH_PATH).map(|path| (SEARCH_PATH, path)))
        .stdin(network)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| error.to_string())?;
    match watched(&mut child) {
        Ok((pidfd, said)) => Ok((child, pidfd, said)),
        Err(error) => {
            // Without a way to notice its end nobody would.
            let _ = child.kill();
            let _ = child.wait();
            Err(error.to_string())
        }
    }
}

fn watched(child: &mut Child) -> io::Result<(OwnedFd, ChildStderr)> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let said = child.stderr.take().ok_or(io::ErrorKind::NotFound)?;
    fcntl_setfl(&said, fcntl_getfl(&said)? | OFlags::NONBLOCK)?;
    Ok((pidfd, said))
}

/// One that runs.
struct Program {
    child: Child,
    /// Readable when the process has ended.
    pidfd: OwnedFd,
    /// Where it says what there is to say, until it closes that.
    said: Option<ChildStderr>,
    tail: Tail,
    lifeline: OwnedFd,
    /// It was told to end.
    is_to_end: bool,
    /// The process has ended.
    is_over: bool,
}

impl Program {
    fn new(child: Child, pidfd: OwnedFd, said: ChildStderr, lifeline: OwnedFd) -> Program {
        Program {
            child,
            pidfd,
            said: Some(said),
            tail: Tail::default(),
            lifeline,
            is_to_end: false,
            is_over: false,
        }
    }

    fn end(&mut self) {
        self.is_to_end = true;
        // It fails only when the process is gone already. By its descriptor: its number may be another's by then, where
        // the process was started to have its children reaped unseen.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Takes a piece of what it has said; false: there is none. A pipe that is full would stop it.
    fn listen(&mut self) -> bool {
        let Some(said) = &mut self.said else {
            return false;
        };
        let mut buffer = [0; 4 << 10];
        match said.read(&mut buffer) {
            Ok(length @ 1..) => {
                self.tail.add(buffer.get(..length).unwrap_or_default());
                true
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Ok(0) | Err(_) => {
                self.said = None;
                false
            }
        }
    }

    /// Whether it is gone; then its end was told.
    fn has_ended(&mut self) -> bool {
        if !self.is_over {
            return false;
        }
        let how = match self.child.wait() {
            Ok(status) => outcome(status),
            Err(error) => format!("it ended, how is unknown: {error}"),
        };
        for _ in 0..LAST_PIECES {
            if !self.listen() {
                break;
            }
        }
        let how = match self.tail.last_line() {
            Some(line) => format!("{how}: {line}"),
            None => how,
        };
        reply(self.lifeline.as_fd(), &Reply::Ended(how));
        true
    }
}

fn outcome(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it ended with exit code {code}"),
        (None, Some(signal)) => format!("it was ended by signal {signal}"),
        (None, None) => format!("it ended ({status})"),
    }
}

/// The end of what a program has said.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let excess = self.0.len().saturating_sub(TAIL_BYTES);
        self.0.drain(..excess);
    }

    /// Its last words, made fit for a log. What explains the options after an error, and passt's complaints about a
    /// syslog that is not there, are not what it ended of.
    fn last_line(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.0);
        let lines = text.lines().map(str::trim);
        let before_usage = lines.take_while(|line| !line.starts_with("Usage:"));
        let is_reason = |line: &&str| {
            !(line.is_empty() || line.starts_with("Failed to send ") && line.ends_with("to syslog"))
        };
        let line = before_usage.filter(is_reason).last()?;
        let plain = line.chars().filter(|it| !it.is_control());
        Some(plain.take(LINE_BYTES).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(text: &str) -> Option<String> {
        let mut tail = Tail::default();
        tail.add(text.as_bytes());
        tail.last_line()
    }

    #[test]
    fn the_reason_is_found_among_what_was_said() {
        assert_eq!(last(""), None);
        assert_eq!(last("\n \n"), None);
        assert_eq!(last("one\ntwo\n\n").unwrap(), "two");
        let option = "passt: unrecognized option '--nope'\nFailed to send 31 bytes to syslog\nUsage: passt [OPTION]...\n  -d\n";
        assert_eq!(last(option).unwrap(), "passt: unrecognized option '--nope'");
        assert_eq!(last("\x1b[31mred").unwrap(), "[31mred");
        let long = "a".repeat(3 * TAIL_BYTES);
        assert_eq!(last(&long).unwrap().len(), LINE_BYTES);
    }
}
