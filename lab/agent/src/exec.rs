// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a program in the guest and collects what it says.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::protocol::Executed;

const OUTPUT_LIMIT_BYTES: usize = 32 << 10;
/// What a command has written is read by then after its end, also by a guest that stands still for a while.
const READ: Duration = Duration::from_secs(20);
const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// Runs `argv` and waits for its end, at most `timeout`.
///
/// # Errors
/// The program can't be started or waited for.
pub fn run(argv: &[String], timeout: Duration) -> Result<Executed> {
    let (program, arguments) = argv.split_first().context("argv is empty")?;
    let (reader, writer) = std::io::pipe().context("pipe")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", PATH)
        .stdin(Stdio::null());
    command
        .stdout(writer.try_clone().context("pipe")?)
        .stderr(writer);
    let mut child = command
        .spawn()
        .with_context(|| format!("start {program}"))?;
    // The command still holds the write ends; without this the output never ends.
    drop(command);

    let (sender, output) = mpsc::channel();
    std::thread::spawn(move || sender.send(read_limited(reader)));
    let (status, timed_out) = wait(&mut child, timeout)?;
    // A daemon may keep the pipe open for ever: take what there is by then.
    let (text, truncated) = output.recv_timeout(READ).unwrap_or_default();
    Ok(Executed {
        code: status.code(),
        signal: status.signal(),
        timed_out,
        output: text,
        truncated,
    })
}

fn wait(child: &mut Child, timeout: Duration) -> Result<(ExitStatus, bool)> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait().context("wait")? {
            return Ok((status, false));
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            return Ok((child.wait().context("wait")?, true));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_limited(mut reader: impl Read) -> (String, bool) {
    let (mut kept, mut truncated) = (Vec::new(), false);
    let mut buffer = [0; 4096];
    while let Ok(length) = reader.read(&mut buffer) {
        if length == 0 {
            break;
        }
        let room = OUTPUT_LIMIT_BYTES - kept.len();
        truncated |= length > room;
        kept.extend(buffer.iter().take(length.min(room)));
    }
    (String::from_utf8_lossy(&kept).into_owned(), truncated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, timeout_ms: u64) -> Executed {
        run(
            &["sh".into(), "-c".into(), script.into()],
            Duration::from_millis(timeout_ms),
        )
        .unwrap()
    }

    #[test]
    fn status_and_output_come_back() {
        let done = sh("echo out; echo err >&2; exit 3", 10_000);
        assert_eq!(
            (done.code, done.signal, done.timed_out),
            (Some(3), None, false)
        );
        assert_eq!(done.output, "out\nerr\n");
        assert_eq!(sh("kill -9 $$", 10_000).signal, Some(9));
    }

    #[test]
    fn long_runs_are_killed_and_long_output_cut() {
        assert!(sh("exec sleep 60", 50).timed_out);
        let done = sh("head -c 100000 /dev/zero", 10_000);
        assert!(done.truncated && done.output.len() == OUTPUT_LIMIT_BYTES);
        assert!(run(&["/no/such".into()], Duration::from_secs(1)).is_err());
        assert!(run(&[], Duration::from_secs(1)).is_err());
    }
}
