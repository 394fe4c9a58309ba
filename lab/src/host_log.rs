// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel under a failed VMM has said: the capsule's own troubles look like the guest's.

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// Messages that are enough to see a stall, a lock-up or a clock that was given up.
const TAIL_LINES: usize = 12;

/// The clock and the latest messages of the kernel this process runs on, as far as it may be read.
pub fn tail() -> String {
    let clock =
        fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let clock = clock.unwrap_or_else(|e| e.to_string());
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_else(|e| e.to_string());
    let mut all = format!(
        "\n--- this machine's kernel, up {} s, clock {}, a sleep of 20 ms took {:.0?} ---",
        uptime.split(' ').next().unwrap_or_default(),
        clock.trim(),
        sleep()
    );
    match messages() {
        Ok(lines) => {
            let kept = lines.iter().skip(lines.len().saturating_sub(TAIL_LINES));
            kept.for_each(|line| all = format!("{all}\n{line}"));
        }
        Err(e) => all = format!("{all}\n/dev/kmsg: {e}"),
    }
    all
}

/// How long a short sleep takes: much longer where timers are late.
fn sleep() -> Duration {
    let begun = Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    begun.elapsed()
}

/// Every message that is still in the kernel's buffer (`Documentation/ABI/testing/dev-kmsg`): a
/// read takes one record, `level,sequence,microseconds,flags;text`.
fn messages() -> std::io::Result<Vec<String>> {
    let mut kmsg = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut lines = Vec::new();
    let mut record = [0; 8192];
    loop {
        match kmsg.read(&mut record) {
            Ok(0) => return Ok(lines),
            Ok(length) => lines.extend(line(&String::from_utf8_lossy(&record[..length]))),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(lines),
            // A record was overwritten before it was read: go on with the next.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
            Err(e) => return Err(e),
        }
    }
}

fn line(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let microseconds: u64 = head.split(',').nth(2)?.parse().ok()?;
    let text = text.lines().next()?;
    Some(format!(
        "[{:>5}.{:03}] {text}",
        microseconds / 1_000_000,
        microseconds / 1_000 % 1_000
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_time_and_a_text() {
        assert_eq!(
            line("4,720,3190427,-;clock; given up\n SUBSYSTEM=x\n").as_deref(),
            Some("[    3.190] clock; given up")
        );
        assert_eq!(line("no record"), None);
    }
}
