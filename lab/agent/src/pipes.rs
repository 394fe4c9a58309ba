// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory the kernel can't move: pages that sit in pipes.

use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Most a pipe may hold without a changed sysctl.
const PIPE_BYTES: usize = 1 << 20;

/// Pipes that nobody reads.
#[derive(Debug, Default)]
pub struct Pipes {
    held: Vec<(PipeReader, PipeWriter)>,
    bytes: u64,
}

impl Pipes {
    /// Fills pipes with `bytes` more bytes.
    ///
    /// # Errors
    /// No more pipes or no more memory; what was filled so far stays.
    pub fn hold(&mut self, bytes: u64) -> Result<u64> {
        allow_many_files();
        let target = self.bytes.saturating_add(bytes);
        while self.bytes < target {
            let (reader, mut writer) =
                std::io::pipe().with_context(|| format!("pipe number {}", self.held.len() + 1))?;
            // Root may go beyond the default; a smaller pipe does as well.
            let _ = fcntl_setpipe_size(writer.as_fd(), PIPE_BYTES);
            let size = fcntl_getpipe_size(writer.as_fd()).context("pipe size")?;
            writer.write_all(&vec![0x5a; size]).context("fill a pipe")?;
            self.bytes = self.bytes.saturating_add(size as u64);
            self.held.push((reader, writer));
        }
        Ok(self.bytes)
    }

    /// Closes all pipes, which frees their pages.
    pub fn free(&mut self) {
        self.held.clear();
        self.bytes = 0;
    }
}

fn allow_many_files() {
    let limit = Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    // Without the right to raise it the pipes run out earlier, with an error that says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_hold_what_was_asked_for_and_let_go() {
        let mut pipes = Pipes::default();
        let held = pipes.hold(100_000).unwrap();
        assert!(
            (100_000..=100_000 + PIPE_BYTES as u64).contains(&held),
            "{held}"
        );
        pipes.free();
        assert_eq!((pipes.bytes, pipes.held.len()), (0, 0));
    }
}
