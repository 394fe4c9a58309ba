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
    /// Use only what the oldest supported kernel has. For tests of those paths.
    #[doc(hidden)]
    pub old_kernel: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            entries: 256,
            stop_limit: Duration::from_secs(10),
            clock: Clock::system(),
            old_kernel: false,
        }
    }
}
