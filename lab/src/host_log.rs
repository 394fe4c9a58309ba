// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel under a failed VMM has said: the capsule's own troubles look like the guest's.

use std::fs;
use std::time::{Duration, Instant};

use ebbtide_agent::kernel_log;

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
    match kernel_log::search(&[], TAIL_LINES) {
        Ok(log) => log
            .tail
            .iter()
            .for_each(|line| all = format!("{all}\n{line}")),
        Err(e) => all = format!("{all}\n{e:#}"),
    }
    all
}

/// How long a short sleep takes: much longer where timers are late.
fn sleep() -> Duration {
    let begun = Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    begun.elapsed()
}
