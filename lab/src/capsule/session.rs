// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run of a capsule: hands over the job, passes output on, waits for the end.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use ebbtide_agent::capsule_protocol::{Job, Notice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::host::Ports;
use super::{Capsule, Interrupted, Outcome};
use crate::process::{Contained, Interrupts};

const LOG_TAIL_LINES: usize = 25;

/// What the capsule says besides the command's output.
pub(super) struct Logs {
    /// Its kernel.
    pub console: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
}

impl Logs {
    /// Both, shortened, for an error.
    fn tail(&self) -> String {
        let mut text = String::new();
        for (name, path) in [("QEMU", &self.qemu), ("capsule console", &self.console)] {
            let content = std::fs::read(path).unwrap_or_default();
            let content = String::from_utf8_lossy(&content);
            let lines: Vec<&str> = content
                .lines()
                .filter(|line| !line.trim().is_empty())
                .collect();
            let skipped = lines.len().saturating_sub(LOG_TAIL_LINES);
            text.push_str(&format!("\n--- {name}, last lines of {} ---", lines.len()));
            for line in lines.iter().skip(skipped) {
                text.push('\n');
                text.push_str(line.trim_end());
            }
        }
        text
    }
}

/// A running capsule.
pub(super) struct Session {
    qemu: Contained,
    control: UnixStream,
    stdout: UnixStream,
    stderr: UnixStream,
    interrupts: Interrupts,
    logs: Logs,
    begun: Instant,
    pending: Vec<u8>,
}

/// What the next step of a session brought.
enum Step {
    Nothing,
    Notice(Notice),
    Closed,
}

impl Session {
    pub fn start(command: &mut Command, ports: Ports, logs: Logs) -> Result<Session> {
        let interrupts = Interrupts::watch()?;
        let begun = Instant::now();
        let qemu = Contained::spawn(command, &ports.inherited())?;
        // QEMU's ends are closed here, so that its end shows as the end of the stream.
        Ok(Session {
            qemu,
            control: ports.control.ours,
            stdout: ports.stdout.ours,
            stderr: ports.stderr.ours,
            interrupts,
            logs,
            begun,
            pending: Vec::new(),
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
                Step::Nothing => {}
                Step::Notice(Notice::Up { .. }) => self.send(job)?,
                Step::Notice(Notice::Started { kvm: true, .. }) => {
                    boot = Some(self.begun.elapsed())
                }
                Step::Notice(Notice::Started { kvm: false, .. }) => {
                    bail!("the capsule has no /dev/kvm{}", self.logs.tail())
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

    /// Time left; an error when there is none.
    fn limit(&self, capsule: &Capsule, booted: bool) -> Result<Option<Duration>> {
        let (limit, what) = match (booted, capsule.timeout) {
            (true, None) => return Ok(None),
            (true, Some(limit)) => (limit, "the command did not end"),
            (false, limit) => (
                limit.unwrap_or(Duration::MAX).min(capsule.boot_timeout),
                "the capsule did not come up",
            ),
        };
        match limit.checked_sub(self.begun.elapsed()) {
            Some(left) => Ok(Some(left)),
            None => bail!(
                "{what} within {:.1} s{}",
                limit.as_secs_f64(),
                self.logs.tail()
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
        limit: Option<Duration>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Step> {
        if let Some(notice) = self.take_notice()? {
            return Ok(Step::Notice(notice));
        }
        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let [out, err, control, interrupt] = {
            let sources = [
                self.stdout.as_fd(),
                self.stderr.as_fd(),
                self.control.as_fd(),
                self.interrupts.as_fd(),
            ];
            let mut polled = sources.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut polled, limit.as_ref()) {
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
        anyhow!("the capsule went down ({status}){}", self.logs.tail())
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
