// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory whose guest-physical address is known and which the kernel can't move for a while: a disk reads it, or a pipe
//! holds it.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::pipe::{IoSliceRaw, SpliceFlags, vmsplice};

use crate::boot::millis;
use crate::pattern::{Mapping, mix};
use crate::protocol::{Place, Written};

const PAGE_BYTES: u64 = 4096;
/// What a pipe takes at once, whatever the page size and the limits of a user.
const PIPE_BYTES: u64 = 64 << 10;
/// In an entry of /proc/PID/pagemap: the page is there.
const PRESENT: u64 = 1 << 63;
/// Where the number of its frame is.
const FRAME: u64 = (1 << 55) - 1;

/// Writes the words of `seed` from memory at `place` to the beginning of a disk, past the page cache.
///
/// # Errors
/// The memory that the kernel gave is elsewhere; the disk can't be opened or written.
pub fn write(path: &str, place: &Place, seed: u64) -> Result<Written> {
    let mut buffer = memory_at(place)?;
    for (word, value) in buffer.words_mut().iter_mut().zip(words(seed)) {
        *word = value;
    }
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_DIRECT);
    let disk = options.open(path).with_context(|| format!("open {path}"))?;
    let begun = Instant::now();
    let written = disk.write_at(buffer.bytes(), 0);
    let written = written.with_context(|| format!("write {path}"))?;
    ensure!(
        written == buffer.bytes().len(),
        "{path}: {written} bytes were written, not {}",
        buffer.bytes().len()
    );
    Ok(Written {
        bytes: written as u64,
        ms: millis(begun.elapsed()),
    })
}

/// What [`write`] writes, word by word.
pub fn words(seed: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |at: u64| mix(seed ^ mix(at)))
}

/// Memory that a pipe holds where it is, until dropped.
#[derive(Debug)]
pub struct Pinned {
    // Before the memory, which is then its owner's alone.
    _pipe: (PipeReader, PipeWriter),
    memory: Mapping,
}

impl Pinned {
    /// Takes memory at `place`, and puts it into a pipe without a copy.
    ///
    /// # Errors
    /// It is more than a pipe takes; the memory that the kernel gave is elsewhere.
    pub fn at(place: &Place) -> Result<Pinned> {
        ensure!(
            place.bytes <= PIPE_BYTES,
            "{} bytes are more than a pipe takes, {PIPE_BYTES}",
            place.bytes
        );
        let mut memory = memory_at(place)?;
        let (reader, writer) = std::io::pipe().context("pipe")?;
        let slice = IoSliceRaw::from_slice_mut(memory.bytes_mut());
        // SAFETY: the pipe only reads from the memory, which lives as long as the pipe and is written by nobody.
        let spliced = unsafe { vmsplice(writer.as_fd(), &[slice], SpliceFlags::empty()) };
        let spliced = spliced.context("vmsplice")?;
        ensure!(
            spliced == memory.bytes().len(),
            "the pipe took {spliced} bytes, not {}",
            memory.bytes().len()
        );
        Ok(Pinned {
            _pipe: (reader, writer),
            memory,
        })
    }

    /// How much it is.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes().len() as u64
    }
}

/// Memory of this process at `place`.
fn memory_at(place: &Place) -> Result<Mapping> {
    let Place { bytes, from, to } = *place;
    ensure!(bytes > 0, "bytes is 0");
    let bytes = bytes.next_multiple_of(PAGE_BYTES);
    let mut memory = Mapping::new(usize::try_from(bytes)?)?;
    // Until it is written to it is no memory at all.
    memory.words_mut().fill(u64::MAX);
    for frame in frames(&memory)? {
        ensure!(
            (from..to).contains(&frame),
            "the kernel gave memory at {frame:#x}, which is not in {from:#x}..{to:#x}"
        );
    }
    Ok(memory)
}

/// The guest-physical addresses of the pages of `mapping`.
fn frames(mapping: &Mapping) -> Result<Vec<u64>> {
    let Range { start, end } = mapping.addresses();
    let pages = (end - start) / PAGE_BYTES;
    let mut entries = vec![0; usize::try_from(pages * 8)?];
    let table = File::open("/proc/self/pagemap").context("open /proc/self/pagemap")?;
    table
        .read_exact_at(&mut entries, start / PAGE_BYTES * 8)
        .context("read /proc/self/pagemap")?;
    let (entries, _) = entries.as_chunks();
    let frame = |entry: &[u8; 8]| {
        let entry = u64::from_ne_bytes(*entry);
        let number = entry & FRAME;
        ensure!(entry & PRESENT != 0, "a page of the memory is not there");
        ensure!(
            number != 0,
            "the kernel does not tell where memory is: that takes a privilege"
        );
        Ok(number * PAGE_BYTES)
    };
    entries.iter().map(frame).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_tell_seed_and_place() {
        let first: Vec<u64> = words(1).take(3).collect();
        assert_ne!(first[0], first[1]);
        assert_ne!(first, words(2).take(3).collect::<Vec<u64>>());
    }

    #[test]
    fn memory_elsewhere_is_refused() {
        let nowhere = Place {
            bytes: 1,
            from: 0,
            to: 0,
        };
        for error in [
            write("/dev/null", &nowhere, 1).map(drop),
            Pinned::at(&nowhere).map(drop),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(
                error.contains("not in 0x0..0x0") || error.contains("privilege"),
                "{error}"
            );
        }
        let much = Place {
            bytes: PIPE_BYTES + 1,
            ..nowhere
        };
        let error = Pinned::at(&much).unwrap_err().to_string();
        assert!(error.contains("65537 bytes are more"), "{error}");
    }
}
