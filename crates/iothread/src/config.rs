// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an executor can be told at its start.

use std::time::Duration;

use crate::clock::Clock;

/// Settings of one executor. The defaults are right for everything but tests.
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission queue entries of the ring. More operations than this may be in flight; they are handed to the
    /// kernel in several calls then.
    pub entries: u32,
    /// How long stopping waits for operations that were cancelled and do not end. What is left then keeps its
    /// memory for good, and is logged.
    pub stop_limit: Duration,
    /// The time source of its timers.
    pub clock: Clock,
    /// What the ring can be asked for. The kernel keeps to it, whatever this process does later.
    pub operations: Operations,
    /// Use only what an older kernel has. For tests of those paths.
    #[doc(hidden)]
    pub kernel: Kernel,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            entries: 256,
            stop_limit: Duration::from_secs(10),
            clock: Clock::system(),
            operations: Operations::All,
            kernel: Kernel::Newest,
        }
    }
}

/// What a ring can be asked for.
///
/// A seccomp filter sees none of a ring's operations: a thread that may not open a file could have its ring open it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operations {
    /// All that the kernel has.
    #[default]
    All,
    /// What moves data through open descriptors, waits and cancels: NOP, READ, WRITE, READV, WRITEV, FSYNC, FALLOCATE,
    /// POLL_ADD, TIMEOUT, ASYNC_CANCEL; with no flags but [`Local::submit`](crate::Local::submit)'s. Anything else,
    /// OPENAT and CONNECT among it, is answered `-EACCES`, and nothing more can be registered with the ring. Needs
    /// Linux 5.10.
    OpenFiles,
}

/// Generations of io_uring as far as they differ for an executor.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Linux 6.1: completions are posted when the ring's thread asks for them, without interrupting it.
    Newest,
    /// Linux 5.19: completions are posted at the next system call, without an interrupt.
    Linux5_19,
    /// Linux 5.6: neither, and a wait has no time-out of its own (5.11).
    Linux5_6,
}
