// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run of a capsule: hands over the job, passes output on, waits for the end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use ebbtide_agent::capsule_protocol::{Job, Notice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::core::Core;
use super::host::{self, Files, Ports};
use super::{Capsule, Interrupted, Outcome};
use crate::process::{Contained, Interrupts};

const LOG_LINES: usize = 25;
/// A capsule that works reports every few seconds, however busy it is.
const SILENCE: Duration = Duration::from_secs(120);
/// What begins the interesting part of a kernel's last words.
const TROUBLE: [&str; 4] = ["BUG:", "Oops", "Kernel panic", "invoked oom-killer"];

/// What QEMU and the capsule's kernel said, shortened, for an error.
fn last_words(files: &Files) -> String {
    let mut text = String::new();
    for (name, file) in [("QEMU", &files.log), ("capsule console", &files.console)] {
        let content = read_from_start(file);
        let content = String::from_utf8_lossy(&content);
        let lines: Vec<&str> = content
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty())
            .collect();
        text.push_str(&format!("\n--- {name}: {} lines ---", lines.len()));
        for line in lines.iter().skip(first_line(&lines)).take(LOG_LINES) {
            text.push('\n');
            text.push_str(line);
        }
    }
    text
}

fn read_from_start(file: &File) -> Vec<u8> {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let mut content = vec![0; usize::try_from(length).unwrap_or(0)];
    // A log that can't be read must not hide the error it was to explain.
    let _ = file.read_exact_at(&mut content, 0);
    content
}

/// Where the trouble begins, else where the last lines do.
fn first_line(lines: &[&str]) -> usize {
    let trouble = lines
        .iter()
        .position(|line| TROUBLE.iter().any(|word| line.contains(word)));
    trouble.unwrap_or(lines.len().saturating_sub(LOG_LINES))
}

/// A running capsule.
pub(super) struct Session {
    qemu: Contained,
    control: UnixStream,
    stdout: UnixStream,
    stderr: UnixStream,
    interrupts: Interrupts,
    files: Files,
    begun: Instant,
    /// When the capsule last said anything on the control port.
    heard: Instant,
    /// Nothing was heard for too long when it was last looked; who looked may have stood still himself.
    silent: bool,
    pending: Vec<u8>,
    /// Given back when QEMU is gone.
    _core: Core,
}

/// What the next step of a session brought.
enum Step {
    Nothing,
    Notice(Notice),
    Closed,
}

impl Session {
    pub fn start(command: &mut Command, ports: Ports, files: Files, core: Core) -> Result<Session> {
        let interrupts = Interrupts::watch()?;
        let begun = Instant::now();
        let qemu =
            Contained::spawn_on(command, &host::inherited(&ports, &files), Some(core.number))?;
        // QEMU's ends are closed here, so that its end shows as the end of the stream.
        Ok(Session {
            qemu,
            control: ports.control.ours,
            stdout: ports.stdout.ours,
            stderr: ports.stderr.ours,
            interrupts,
            files,
            begun,
            heard: begun,
            silent: false,
            pending: Vec::new(),
            _core: core,
        })
    }

    pub fn run(
        mut self,
        capsule: &Capsule,
        job: &Job,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Outcome> {
        let mut boot = None;
        loop {
            let limit = self.limit(capsule, boot.is_some())?;
            match self.step(limit, stdout, stderr)? {
                Step::Nothing | Step::Notice(Notice::Alive) => {}
                Step::Notice(Notice::Up { .. }) => self.send(job)?,
                Step::Notice(Notice::Started { kvm: true, .. }) => {
                    boot = Some(self.begun.elapsed())
                }
                Step::Notice(Notice::Started { kvm: false, .. }) => {
                    bail!("the capsule has no /dev/kvm{}", last_words(&self.files))
                }
                Step::Notice(Notice::Exit { code, signal }) => {
                    let total = self.begun.elapsed();
                    self.finish(stdout, stderr)?;
                    return Ok(Outcome {
                        code,
                        signal,
                        boot: boot.unwrap_or(total),
                        total,
                    });
                }
                Step::Notice(Notice::Failed { error }) => bail!("in the capsule: {error}"),
                Step::Closed => return Err(self.gone()),
            }
        }
    }

    /// Time until something must have happened; an error when it has not.
    fn limit(&mut self, capsule: &Capsule, booted: bool) -> Result<Duration> {
        let (limit, what) = match (booted, capsule.timeout) {
            (true, limit) => (limit.unwrap_or(Duration::MAX), "the command did not end"),
            (false, limit) => (
                limit.unwrap_or(Duration::MAX).min(capsule.boot_timeout),
                "the capsule did not come up",
            ),
        };
        let Some(left) = limit.checked_sub(self.begun.elapsed()) else {
            bail!(
                "{what} within {:.1} s{}",
                limit.as_secs_f64(),
                last_words(&self.files)
            )
        };
        if !booted {
            return Ok(left);
        }
        match SILENCE.checked_sub(self.heard.elapsed()) {
            Some(patience) => {
                self.silent = false;
                Ok(left.min(patience))
            }
            None if !self.silent => {
                self.silent = true;
                Ok(Duration::ZERO)
            }
            None => bail!(
                "the capsule stands still: not a word for {} s{}",
                SILENCE.as_secs(),
                last_words(&self.files)
            ),
        }
    }

    fn send(&mut self, job: &Job) -> Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let job = Job {
            clock_ms: u64::try_from(now.as_millis())?,
            ..job.clone()
        };
        let line = serde_json::to_string(&job).context("write the job")? + "\n";
        self.control
            .write_all(line.as_bytes())
            .context("hand the job to the capsule")
    }

    fn step(
        &mut self,
        limit: Duration,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Step> {
        if let Some(notice) = self.take_notice()? {
            return Ok(Step::Notice(notice));
        }
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let [out, err, control, interrupt] = {
            let sources = [
                self.stdout.as_fd(),
                self.stderr.as_fd(),
                self.control.as_fd(),
                self.interrupts.as_fd(),
            ];
            let mut polled = sources.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut polled, Some(&limit)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => polled.map(|fd| !fd.revents().is_empty()),
                Err(error) => return Err(error).context("poll"),
            }
        };
        if interrupt && let Some(signal) = self.interrupts.take() {
            return Err(Interrupted { signal }.into());
        }
        if out {
            pass_on(&mut self.stdout, stdout).context("standard output")?;
        }
        if err {
            pass_on(&mut self.stderr, stderr).context("standard error")?;
        }
        if !control {
            return Ok(Step::Nothing);
        }
        let mut buffer = [0; 4096];
        let length = self.control.read(&mut buffer).context("control port")?;
        if length == 0 {
            return Ok(Step::Closed);
        }
        self.heard = Instant::now();
        self.pending.extend(buffer.iter().take(length));
        Ok(Step::Nothing)
    }

    fn take_notice(&mut self) -> Result<Option<Notice>> {
        let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') else {
            return Ok(None);
        };
        let rest = self.pending.split_off(end + 1);
        let line = std::mem::replace(&mut self.pending, rest);
        let notice = serde_json::from_slice(&line)
            .with_context(|| format!("control port: {:?}", String::from_utf8_lossy(&line)))?;
        Ok(Some(notice))
    }

    /// What the command wrote was handed to QEMU before its exit was reported,
    /// so it is all in our sockets, and QEMU need not power off in order.
    fn finish(mut self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<()> {
        self.qemu.kill();
        while pass_on(&mut self.stdout, stdout).context("standard output")? {}
        while pass_on(&mut self.stderr, stderr).context("standard error")? {}
        Ok(())
    }

    fn gone(mut self) -> anyhow::Error {
        let status = match self.qemu.wait(Duration::from_secs(5)) {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        anyhow!(
            "the capsule went down ({status}){}",
            last_words(&self.files)
        )
    }
}

/// False at the end.
fn pass_on(from: &mut UnixStream, to: &mut dyn Write) -> Result<bool> {
    let mut buffer = [0; 64 << 10];
    let length = match from.read(&mut buffer) {
        Ok(length) => length,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
        Err(error) => return Err(error.into()),
    };
    to.write_all(buffer.get(..length).unwrap_or_default())?;
    to.flush()?;
    Ok(length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_begin_where_the_trouble_does() {
        let mut lines = vec!["fine"; 100];
        assert_eq!(first_line(&lines), 75);
        lines[40] = "[ 7.0] Kernel panic - not syncing: sysrq triggered crash";
        assert_eq!(first_line(&lines), 40);
        assert_eq!(first_line(&[]), 0);
    }
}
