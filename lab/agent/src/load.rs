// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads a disk at random as fast as it goes, with a fixed number of requests under way, and counts.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, types};

use crate::disk::{BLOCK_BYTES, Block};
use crate::pattern::mix;
use crate::protocol::{DiskLoad, DiskLoaded};

/// Most requests under way: what one ring has entries for.
const DEPTH_MAX: u32 = 1024;

/// Reads blocks of 4 KiB past the page cache. As soon as some are there, as many are asked for anew.
///
/// # Errors
/// The disk can't be opened or is smaller than a block, a read fails or is short, the kernel gives no ring.
pub fn run(load: &DiskLoad) -> Result<DiskLoaded> {
    ensure!(
        (1..=DEPTH_MAX).contains(&load.depth),
        "depth {} is not 1 to {DEPTH_MAX}",
        load.depth
    );
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT);
    let path = &load.path;
    let mut file = options.open(path).with_context(|| format!("open {path}"))?;
    let bytes = file
        .seek(SeekFrom::End(0))
        .with_context(|| format!("size of {path}"))?;
    let blocks = bytes / BLOCK_BYTES as u64;
    ensure!(
        blocks > 0,
        "{path} holds {bytes} bytes: less than one block"
    );
    let ring = IoUring::builder()
        .setup_single_issuer()
        .build(load.depth.next_power_of_two())
        .context("io_uring")?;
    let mut reader = Reader {
        ring,
        buffers: vec![Block([0; BLOCK_BYTES]); load.depth as usize],
        file,
        blocks,
        random: mix(load.seed),
        under_way: 0,
    };
    let loaded = reader.run(load.depth, Duration::from_millis(load.ms));
    loaded.with_context(|| format!("read {path}"))
}

struct Reader {
    ring: IoUring,
    buffers: Vec<Block>,
    file: File,
    blocks: u64,
    random: u64,
    under_way: u32,
}

impl Reader {
    fn run(&mut self, depth: u32, time: Duration) -> Result<DiskLoaded> {
        let begun = Instant::now();
        for slot in 0..depth as usize {
            self.ask(slot);
        }
        let (mut reads, mut done) = (0, Vec::with_capacity(depth as usize));
        let mut last = begun;
        while self.under_way > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error.into());
                }
                _ => {}
            }
            done.clear();
            done.extend(
                self.ring
                    .completion()
                    .map(|cqe| (cqe.user_data(), cqe.result())),
            );
            last = Instant::now();
            let goes_on = last - begun < time;
            for &(slot, result) in &done {
                self.under_way -= 1;
                check(result)?;
                reads += 1;
                if goes_on {
                    self.ask(slot as usize);
                }
            }
        }
        let ns = u64::try_from((last - begun).as_nanos()).unwrap_or(u64::MAX);
        Ok(DiskLoaded { reads, ns })
    }

    /// Asks for a block somewhere, into the buffer of `slot`, which nobody uses.
    fn ask(&mut self, slot: usize) {
        self.random = self.random.wrapping_add(1);
        let block = mix(self.random) % self.blocks;
        let Some(buffer) = self.buffers.get_mut(slot) else {
            return;
        };
        let entry = opcode::Read::new(
            types::Fd(self.file.as_raw_fd()),
            buffer.0.as_mut_ptr(),
            BLOCK_BYTES as u32,
        )
        .offset(block * BLOCK_BYTES as u64)
        .build()
        .user_data(slot as u64);
        // SAFETY: the buffer and the file live in `self` behind the ring, and nobody looks at the buffer before the next
        // request for it; the queue has an entry for each slot.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.under_way += 1;
        }
    }
}

impl Drop for Reader {
    /// The buffers must outlive what is under way, also after an error.
    fn drop(&mut self) {
        while self.under_way > 0 && self.ring.submit_and_wait(1).is_ok() {
            let ended = self.ring.completion().count();
            let ended = u32::try_from(ended).unwrap_or(u32::MAX);
            self.under_way = self.under_way.saturating_sub(ended);
        }
        if self.under_way > 0 {
            // The kernel may still write there.
            std::mem::forget(std::mem::take(&mut self.buffers));
        }
    }
}

fn check(result: i32) -> Result<()> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result).into());
    }
    if result as usize != BLOCK_BYTES {
        bail!("{result} bytes came instead of {BLOCK_BYTES}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(path: &std::path::Path, depth: u32) -> DiskLoad {
        DiskLoad {
            path: path.to_str().unwrap().to_owned(),
            depth,
            ms: 20,
            seed: 3,
        }
    }

    #[test]
    fn it_reads_and_counts() {
        // Beside this test: /tmp may be a tmpfs, which knows no O_DIRECT in older kernels.
        let name = format!("agent-load-{}", std::process::id());
        let path = std::env::current_exe().unwrap().with_file_name(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        for depth in [1, 3, 128] {
            let loaded = run(&load(&path, depth)).unwrap();
            assert!(loaded.reads >= u64::from(depth), "{loaded:?}");
            assert!(loaded.ns >= 20_000_000, "{loaded:?}");
        }
        File::create(&path).unwrap().set_len(100).unwrap();
        let error = format!("{:#}", run(&load(&path, 1)).unwrap_err());
        assert!(error.contains("less than one block"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_is_no_depth_is_refused() {
        for depth in [0, DEPTH_MAX + 1] {
            let error = run(&load("/dev/null".as_ref(), depth)).unwrap_err();
            assert!(error.to_string().contains("is not 1 to"), "{error}");
        }
    }
}
