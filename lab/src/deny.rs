// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must not stand in a guest's kernel log: `lab/dmesg-deny.txt`.

const LIST: &str = include_str!("../dmesg-deny.txt");

/// The patterns, each a plain substring.
pub fn patterns() -> Vec<String> {
    let lines = LIST.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(line: &str) -> bool {
        patterns().iter().any(|pattern| line.contains(pattern))
    }

    #[test]
    fn real_kernel_messages_are_denied() {
        for line in [
            "WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:606 fpu__init_system_xstate+0x5b0/0x8ea",
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "BUG: Bad page state in process swapper/0  pfn:3fc00",
            "Oops: 0000 [#1] PREEMPT SMP NOPTI",
            "virtio_mem virtio1: unknown error, marking device broken: -22",
            "INFO: task kworker/0:1:9 blocked for more than 120 seconds.",
            "I/O error, dev vda, sector 8 op 0x1:(WRITE) flags 0x8800 phys_seg 1 prio class 2",
            "Buffer I/O error on dev vda, logical block 1, async page read",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [kworker/0:2:45]",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
        ] {
            assert!(denied(line), "{line}");
        }
    }

    #[test]
    fn everyday_messages_are_not() {
        for line in [
            "Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)",
            "rcu: Hierarchical RCU implementation.",
            "virtio_mem virtio1: plugged size: 0x0",
            "Fallback order for Node 0: 0",
        ] {
            assert!(!denied(line), "{line}");
        }
    }
}
