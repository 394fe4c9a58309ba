// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Child processes that don't outlive us, and the signals that end us.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};

/// A child that is killed when this value is dropped, and by the kernel when
/// the *thread* that started it ends without dropping it.
#[derive(Debug)]
pub struct Contained {
    child: Child,
    name: String,
}

impl Contained {
    /// Starts a program in a process group of its own (so that Ctrl-C on a
    /// terminal is ours to handle) with `inherited` open under the same numbers.
    ///
    /// # Errors
    /// The program can't be started.
    pub fn spawn(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> Result<Contained> {
        Contained::spawn_on(command, inherited, None)
    }

    /// As [`Contained::spawn`]; all threads of the program run on the core `core`.
    ///
    /// # Errors
    /// The program can't be started, or may not run on that core.
    pub fn spawn_on(
        command: &mut Command,
        inherited: &[BorrowedFd<'_>],
        core: Option<usize>,
    ) -> Result<Contained> {
        let name = command.get_program().to_string_lossy().into_owned();
        let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let parent = std::process::id();
        command.process_group(0);
        // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
        unsafe {
            command.pre_exec(move || {
                die_with_parent(parent)?;
                if let Some(core) = core {
                    run_on(core)?;
                }
                numbers
                    .iter()
                    .try_for_each(|&number| keep_across_exec(number))
            });
        }
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Contained { child, name })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended.
    ///
    /// # Errors
    /// It can't be waited for.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("wait for {}", self.name))
    }

    /// Waits for the end, at most `timeout`.
    ///
    /// # Errors
    /// Still running after `timeout`; it goes on.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{} still runs after {timeout:?}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).context("pid")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A field of `/proc/PID/status` in bytes, such as `VmRSS`.
    ///
    /// # Errors
    /// It has ended, or there is no such field.
    pub fn memory_bytes(&self, field: &str) -> Result<u64> {
        let kibibytes = self.status_field(field)?;
        Ok(kibibytes * 1024)
    }

    /// How many threads it has.
    ///
    /// # Errors
    /// It has ended.
    pub fn threads(&self) -> Result<u64> {
        self.status_field("Threads")
    }

    fn status_field(&self, field: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
        number.with_context(|| format!("{path} has no {field}: {} has ended", self.name))
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.kill();
        }
    }
}

fn die_with_parent(parent: u32) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let now = rustix::process::getppid().map_or(0, Pid::as_raw_pid);
    // The parent may have ended before the request was made.
    if now as u32 == parent {
        Ok(())
    } else {
        Err(io::ErrorKind::Interrupted.into())
    }
}

fn run_on(core: usize) -> io::Result<()> {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores)?;
    Ok(())
}

fn keep_across_exec(number: RawFd) -> io::Result<()> {
    // SAFETY: the caller of `spawn` holds this descriptor open; the fork has its own copy.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    Ok(())
}

/// SIGINT and SIGTERM of this thread as something to poll, until dropped.
#[derive(Debug)]
pub struct Interrupts {
    fd: OwnedFd,
    previous: libc::sigset_t,
}

impl Interrupts {
    /// Holds both signals back in this thread and the threads it starts.
    ///
    /// # Errors
    /// The kernel refuses a signalfd.
    pub fn watch() -> Result<Interrupts> {
        // SAFETY: sigset_t is plain data; sigemptyset initialises it, and all pointers live through the calls.
        let (set, previous) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut previous: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGINT);
            libc::sigaddset(&mut set, libc::SIGTERM);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut previous);
            (set, previous)
        };
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("signalfd");
        }
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Interrupts { fd, previous })
    }

    /// The signal that came in, if one did.
    pub fn take(&self) -> Option<i32> {
        let mut record = [0u8; std::mem::size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.fd, &mut record)
            .ok()
            .filter(|&length| length == record.len())?;
        // The number is the first field.
        Some(i32::from_ne_bytes(record[..4].try_into().ok()?))
    }
}

impl AsFd for Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // SAFETY: `previous` was filled by pthread_sigmask in `watch`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.previous, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_child_is_gone() {
        let child = Contained::spawn(Command::new("sleep").arg("60"), &[]).unwrap();
        let path = format!("/proc/{}", child.pid());
        assert!(child.memory_bytes("VmRSS").is_ok() && child.threads().unwrap() == 1);
        drop(child);
        assert!(!std::path::Path::new(&path).exists());
    }

    #[test]
    fn waiting_ends_with_the_status_or_the_time() {
        let mut child = Contained::spawn(Command::new("sh").args(["-c", "exit 7"]), &[]).unwrap();
        assert_eq!(child.wait(Duration::from_secs(60)).unwrap().code(), Some(7));
        let mut child = Contained::spawn(Command::new("sleep").arg("60"), &[]).unwrap();
        assert!(
            child
                .wait(Duration::from_millis(5))
                .unwrap_err()
                .to_string()
                .contains("still runs")
        );
    }

    #[test]
    fn a_child_stays_on_its_core() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let core = (0..1024).find(|&core| allowed.is_set(core)).unwrap();
        let mut sleep = Command::new("sleep");
        let child = Contained::spawn_on(sleep.arg("60"), &[], Some(core)).unwrap();
        let pid = Pid::from_raw(child.pid() as i32);
        let cores = rustix::thread::sched_getaffinity(pid).unwrap();
        assert_eq!((cores.count(), cores.is_set(core)), (1, true));
    }

    #[test]
    fn the_end_of_the_thread_ends_the_child() {
        let start = || Contained::spawn(Command::new("sleep").arg("60"), &[]).unwrap();
        let mut child = std::thread::spawn(start).join().unwrap();
        assert!(!child.wait(Duration::from_secs(60)).unwrap().success());
    }

    #[test]
    fn inherited_descriptors_keep_their_number() {
        let (reader, writer) = std::io::pipe().unwrap();
        // A shell may know numbers of one digit only.
        let script = format!("echo through > /proc/self/fd/{}", writer.as_raw_fd());
        let mut child =
            Contained::spawn(Command::new("sh").args(["-c", &script]), &[writer.as_fd()]).unwrap();
        assert!(child.wait(Duration::from_secs(60)).unwrap().success());
        drop(writer);
        assert_eq!(std::io::read_to_string(reader).unwrap(), "through\n");
    }

    #[test]
    fn signals_are_taken_once_and_let_through_afterwards() {
        let signals = Interrupts::watch().unwrap();
        assert_eq!(signals.take(), None);
        // SAFETY: sends a signal to this thread, which holds it back.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(
            (signals.take(), signals.take()),
            (Some(libc::SIGTERM), None)
        );
    }
}
