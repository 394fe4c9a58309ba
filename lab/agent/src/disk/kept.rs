// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the medium of a disk that is gone holds what was written to it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::plan::{Kind, Plan, Step};
use super::{BLOCK_BYTES, Block, compare_block};
use crate::protocol::DiskStatus;

/// Looks in a disk's image for what work of this `status` has written: each block must hold the last write to it that was
/// completed. Blocks are left out which a write was for that failed or was never answered: they may hold either. The work
/// was on all of the disk, with `verify`, and once an operation had failed no other went well. Returns how many blocks were
/// compared.
///
/// # Errors
/// The image can't be read; a completed write is not in it.
pub fn kept(image: &File, status: &DiskStatus) -> Result<u64> {
    let blocks = image.metadata().context("image")?.len() / BLOCK_BYTES as u64;
    ensure!(blocks > 0, "the image is empty");
    let written = completed(blocks, status);
    let mut block = Block([0; BLOCK_BYTES]);
    let mut lost = Vec::new();
    for (&number, &write) in &written {
        let read = image.read_exact_at(&mut block.0, number * BLOCK_BYTES as u64);
        read.with_context(|| format!("read block {number} of the image"))?;
        if let Err(what) = compare_block(&block, status.seed, number, write) {
            lost.push(format!("block {number}, write {write}: {what}"));
        }
    }
    ensure!(
        lost.is_empty(),
        "{} of {} blocks are not what was written: {}",
        lost.len(),
        written.len(),
        lost.iter().take(3).cloned().collect::<Vec<_>>().join("; ")
    );
    Ok(written.len() as u64)
}

/// The last completed write to each block, found by going through the same operations.
fn completed(blocks: u64, status: &DiskStatus) -> HashMap<u64, u64> {
    let mut plan = Plan::new(status.seed, blocks);
    let mut written = HashMap::new();
    let mut next_write = |written: &HashMap<u64, u64>| {
        loop {
            let Step { kind, block, count } = plan.next(!written.is_empty());
            if kind == Kind::Write {
                return block..block + count;
            }
        }
    };
    for write in 1..=status.writes {
        let blocks = next_write(&written);
        written.extend(blocks.map(|number| (number, write)));
    }
    // Some of what failed were reads and flushes: of as many writes none that failed is missing.
    for _ in 0..status.errors {
        for number in next_write(&written) {
            written.remove(&number);
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::Session;
    use super::super::tests::image;
    use super::*;

    const BYTES: u64 = 4 << 20;
    const BLOCKS: u64 = BYTES / BLOCK_BYTES as u64;
    const WRITES: u64 = 60;
    const FAILURES: u64 = 20;

    /// A disk that fails after some writes: its image, and how the work on it went.
    fn failed() -> (PathBuf, Session) {
        let (path, start) = image(BYTES);
        let mut session = Session::open(&start.path, start.seed, 0).unwrap();
        while session.status.writes < WRITES {
            assert!(session.step(true).is_ok());
        }
        // It can be neither read nor written.
        session.file = File::open("/").unwrap();
        for _ in 0..FAILURES {
            assert!(session.step(true).is_err());
        }
        (path, session)
    }

    #[test]
    fn what_was_completed_is_known_and_found() {
        let (path, session) = failed();
        let status = session.status(false);
        let kept = kept(&File::open(&path).unwrap(), &status);
        std::fs::remove_file(path).unwrap();
        assert_eq!((status.writes, status.errors), (WRITES, FAILURES));
        let known = completed(BLOCKS, &status);
        assert_eq!(kept.unwrap(), known.len() as u64);
        for (number, write) in &known {
            assert_eq!(session.written.get(number), Some(write), "{number}");
        }
        // Only what writes that failed were for, and as many after them.
        let left_out = session.written.len() - known.len();
        assert!(known.len() > 100 && left_out < 16 * FAILURES as usize);
    }

    #[test]
    fn a_write_that_is_lost_is_named() {
        let (path, session) = failed();
        let status = session.status(false);
        let (number, write) = completed(BLOCKS, &status).into_iter().next().unwrap();
        let medium = File::options().read(true).write(true).open(&path).unwrap();
        let at = number * BLOCK_BYTES as u64;
        medium.write_all_at(&[0; BLOCK_BYTES], at).unwrap();
        let said = kept(&medium, &status).unwrap_err().to_string();
        let other = kept(&medium, &DiskStatus { seed: 12, ..status });
        std::fs::remove_file(path).unwrap();
        let expected = format!("block {number}, write {write}: holds zeros");
        assert!(said.contains(&expected), "{said}");
        assert!(other.is_err(), "work of before counts for the work of now");
    }
}
