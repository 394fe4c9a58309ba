// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel says of a thread's life: how long it ran, and how long it could have run and had to wait. And of this
//! machine's, if that is a virtual one: for how long its own host did not let it run.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// From the thread's start on, or between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scheduled {
    /// It ran, guests included.
    pub ran: Duration,
    /// It waited for a processor.
    pub waited: Duration,
}

impl Scheduled {
    /// Of the thread whose directory of `/proc/PID/task` this is.
    pub(crate) fn of_thread(task: &Path) -> Result<Scheduled> {
        let file = task.join("schedstat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        parse(&text).with_context(|| format!("{}: {text}", file.display()))
    }

    /// Of a process's first thread.
    pub(crate) fn of_main_thread(pid: u32) -> Result<Scheduled> {
        Scheduled::of_thread(Path::new(&format!("/proc/{pid}/task/{pid}")))
    }

    pub(crate) fn since(&self, before: &Scheduled) -> Scheduled {
        Scheduled {
            ran: self.ran.saturating_sub(before.ran),
            waited: self.waited.saturating_sub(before.waited),
        }
    }
}

/// What this machine's host took of its processors since it was started: all of them together (proc_stat(5)).
pub(crate) fn stolen() -> Result<Duration> {
    let file = "/proc/stat";
    let text = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    parse_stolen(&text).with_context(|| format!("{file} has no stolen time"))
}

/// The eighth number of the first line, in hundredths of a second.
fn parse_stolen(text: &str) -> Option<Duration> {
    let all = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: u64 = all.split_whitespace().nth(7)?.parse().ok()?;
    Some(Duration::from_millis(ticks * 10))
}

/// Nanoseconds run, nanoseconds waited, and how often.
fn parse(text: &str) -> Option<Scheduled> {
    let mut words = text.split_whitespace();
    let mut next = || words.next()?.parse().ok().map(Duration::from_nanos);
    Some(Scheduled {
        ran: next()?,
        waited: next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let ns = Duration::from_nanos;
        let seen = parse("1500 20 3\n").unwrap();
        assert_eq!((seen.ran, seen.waited), (ns(1500), ns(20)));
        assert!(parse("1500").is_none() && parse("a b c").is_none());
        let stat = "cpu  1 2 3 4 5 6 7 12 9 10\ncpu0 1\n";
        assert_eq!(parse_stolen(stat), Some(Duration::from_millis(120)));
        assert!(parse_stolen("cpu0 1 2 3 4 5 6 7 8").is_none() && parse_stolen("").is_none());
        assert!(stolen().is_ok());
        let mine = Scheduled::of_main_thread(std::process::id()).unwrap();
        assert!(mine.ran > Duration::ZERO);
        assert_eq!(mine.since(&mine), Scheduled::default());
    }
}
