// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A seeded pattern over a large area of anonymous memory.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::boot::millis;
use crate::protocol::{Checked, Filled, Mismatch};

const HUGE_PAGE_BYTES: usize = 2 << 20;
const PAGE_WORDS: usize = 512;
/// Share of the work a thread takes at once, in words.
const SHARE_WORDS: usize = HUGE_PAGE_BYTES / 8;
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// What [`Area::fill`] leaves to the rest of the guest.
const RESERVE_BYTES: u64 = 24 << 20;

/// Anonymous memory, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u64>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory owned by this value alone; nothing about it belongs to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// `bytes` of memory, in whole pages.
    pub(crate) fn new(bytes: usize) -> Result<Mapping> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }
        .with_context(|| format!("map {bytes} bytes"))?;
        let base = NonNull::new(base.cast()).context("mapping at address 0")?;
        Ok(Mapping { base, bytes })
    }

    /// As [`new`](Self::new), in huge pages where the kernel has them.
    fn huge(bytes: usize) -> Result<Mapping> {
        let mapping = Mapping::new(bytes)?;
        // SAFETY: the range was mapped just now and belongs to nobody else.
        // A kernel without huge pages refuses; 4 KiB pages do as well.
        let _ = unsafe { madvise(mapping.base.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        Ok(mapping)
    }

    /// Where it is in this process.
    pub(crate) fn addresses(&self) -> Range<u64> {
        let start = self.base.as_ptr().addr() as u64;
        start..start + self.bytes as u64
    }

    pub(crate) fn words(&self) -> &[u64] {
        // SAFETY: `base` maps `bytes` readable bytes, page aligned, zeroed by the kernel, until drop.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes / 8) }
    }

    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `words`, and `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes / 8) }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: as in `words`; every byte is a value.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `words_mut`; every byte is a value.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().cast(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and no slice of it outlives `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Memory that holds a pattern.
#[derive(Debug)]
pub struct Area {
    mapping: Mapping,
    seed: u64,
}

impl Area {
    /// Allocates `bytes`, rounded up to 2 MiB, and writes the pattern of `seed`
    /// with `threads` threads. `progress` is told the bytes done about once a second.
    ///
    /// # Errors
    /// Refused when `available_bytes` can't hold it: running out of memory
    /// would end PID 1, and the guest with it.
    pub fn fill(
        bytes: u64,
        seed: u64,
        available_bytes: u64,
        threads: usize,
        progress: impl Fn(u64, u64),
    ) -> Result<(Area, Filled)> {
        let start = Instant::now();
        let rounded = bytes
            .checked_next_multiple_of(HUGE_PAGE_BYTES as u64)
            .context("bytes is too large")?;
        if rounded == 0 {
            bail!("bytes is 0: nothing to fill");
        }
        if rounded.saturating_add(RESERVE_BYTES) > available_bytes {
            bail!(
                "can't fill {rounded} bytes: the guest has {available_bytes} available and keeps {RESERVE_BYTES}"
            );
        }
        let mut area = Area {
            mapping: Mapping::huge(usize::try_from(rounded)?)?,
            seed,
        };
        area.write(threads, progress);
        Ok((
            area,
            Filled {
                bytes: rounded,
                ms: millis(start.elapsed()),
            },
        ))
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes as u64
    }

    fn write(&mut self, threads: usize, progress: impl Fn(u64, u64)) {
        let (seed, total) = (self.seed, self.bytes());
        let done = AtomicU64::new(0);
        let words = self.mapping.words_mut();
        let share = words
            .len()
            .div_ceil(threads.max(1))
            .next_multiple_of(SHARE_WORDS);
        std::thread::scope(|scope| {
            for (index, part) in words.chunks_mut(share).enumerate() {
                let done = &done;
                scope.spawn(move || {
                    for (offset, piece) in
                        (0..).step_by(SHARE_WORDS).zip(part.chunks_mut(SHARE_WORDS))
                    {
                        write_piece(piece, seed, (index * share + offset) / PAGE_WORDS);
                        done.fetch_add((piece.len() * 8) as u64, Ordering::Relaxed);
                    }
                });
            }
            watch(&done, total, || false, &progress);
        });
    }

    /// Compares the whole area with its pattern.
    pub fn check(&self, threads: usize, progress: impl Fn(u64, u64)) -> Checked {
        let start = Instant::now();
        let (seed, total) = (self.seed, self.bytes());
        let words = self.mapping.words();
        let share = words
            .len()
            .div_ceil(threads.max(1))
            .next_multiple_of(SHARE_WORDS);
        let (done, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        let mismatch = std::thread::scope(|scope| {
            let workers: Vec<_> = words
                .chunks(share)
                .enumerate()
                .map(|(index, part)| {
                    let (done, failed) = (&done, &failed);
                    scope.spawn(move || {
                        let found = check_part(part, seed, index * share, done);
                        failed.fetch_or(found.is_some(), Ordering::Relaxed);
                        found
                    })
                })
                .collect();
            watch(&done, total, || failed.load(Ordering::Relaxed), &progress);
            // Parts lie in address order, so the first one found is the lowest.
            workers
                .into_iter()
                .filter_map(|worker| worker.join().ok().flatten())
                .next()
        });
        Checked {
            bytes: total,
            ok: mismatch.is_none(),
            mismatch,
            ms: millis(start.elapsed()),
        }
    }
}

fn watch(done: &AtomicU64, total: u64, stop: impl Fn() -> bool, progress: &impl Fn(u64, u64)) {
    let mut last = Instant::now();
    while done.load(Ordering::Relaxed) < total && !stop() {
        std::thread::sleep(Duration::from_millis(5));
        if last.elapsed() >= PROGRESS_INTERVAL {
            last = Instant::now();
            progress(done.load(Ordering::Relaxed), total);
        }
    }
}

/// Start and step of the words of one page: a page in a wrong place, a stale
/// or an empty one differs in every word.
fn page_sequence(seed: u64, page: usize) -> (u64, u64) {
    (mix(seed ^ mix(page as u64)), mix(seed) | 1)
}

/// The finalizer of SplitMix64.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn write_piece(piece: &mut [u64], seed: u64, first_page: usize) {
    for (page, words) in (first_page..).zip(piece.chunks_mut(PAGE_WORDS)) {
        let (mut value, step) = page_sequence(seed, page);
        for word in words {
            *word = value;
            value = value.wrapping_add(step);
        }
    }
}

fn check_part(part: &[u64], seed: u64, first_word: usize, done: &AtomicU64) -> Option<Mismatch> {
    for (offset, piece) in (0..).step_by(SHARE_WORDS).zip(part.chunks(SHARE_WORDS)) {
        let found = check_piece(piece, seed, (first_word + offset) / PAGE_WORDS);
        if found.is_some() {
            return found;
        }
        done.fetch_add((piece.len() * 8) as u64, Ordering::Relaxed);
    }
    None
}

fn check_piece(piece: &[u64], seed: u64, first_page: usize) -> Option<Mismatch> {
    for (page, words) in (first_page..).zip(piece.chunks(PAGE_WORDS)) {
        let (mut value, step) = page_sequence(seed, page);
        // One branch per page: the differences are gathered first.
        let mut difference = 0;
        for word in words {
            difference |= *word ^ value;
            value = value.wrapping_add(step);
        }
        if difference != 0 {
            return first_mismatch(words, seed, page);
        }
    }
    None
}

fn first_mismatch(words: &[u64], seed: u64, page: usize) -> Option<Mismatch> {
    let (mut expected, step) = page_sequence(seed, page);
    for (index, &found) in words.iter().enumerate() {
        if found != expected {
            let offset = ((page * PAGE_WORDS + index) * 8) as u64;
            return Some(Mismatch {
                offset,
                expected,
                found,
            });
        }
        expected = expected.wrapping_add(step);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(bytes: u64, threads: usize) -> Area {
        Area::fill(bytes, 7, u64::MAX, threads, |_, _| {})
            .unwrap()
            .0
    }

    #[test]
    fn a_filled_area_checks_whatever_the_threads() {
        for threads in [1, 2, 3] {
            let area = filled(5 << 20, threads);
            assert_eq!(area.bytes(), 6 << 20);
            let checked = area.check(4 - threads, |_, _| {});
            assert!(checked.ok && checked.bytes == 6 << 20, "{checked:?}");
        }
    }

    #[test]
    fn every_kind_of_damage_is_found_and_the_first_one_named() {
        for damage in [
            |words: &mut [u64]| words[700_000] ^= 1 << 40,
            |words: &mut [u64]| words[699_904..700_416].fill(0),
            |words: &mut [u64]| words.copy_within(0..512, 699_904),
        ] {
            let mut area = filled(6 << 20, 2);
            damage(area.mapping.words_mut());
            area.mapping.words_mut()[720_000] = 0;
            let checked = area.check(2, |_, _| {});
            let mismatch = checked.mismatch.unwrap();
            assert!(!checked.ok);
            assert!(
                mismatch.offset / 8 == 700_000 || mismatch.offset / 8 == 699_904,
                "{mismatch:?}"
            );
            assert_ne!(mismatch.expected, mismatch.found);
        }
    }

    #[test]
    fn seeds_differ_and_too_much_is_refused() {
        let mut area = filled(2 << 20, 1);
        area.seed = 8;
        assert_eq!(
            area.check(1, |_, _| {}).mismatch.map(|found| found.offset),
            Some(0)
        );
        let refused = Area::fill(1 << 30, 1, 1 << 30, 1, |_, _| {})
            .unwrap_err()
            .to_string();
        assert!(refused.contains("1073741824 available"), "{refused}");
        assert!(Area::fill(0, 1, u64::MAX, 1, |_, _| {}).is_err());
        assert!(Area::fill(u64::MAX, 1, u64::MAX, 1, |_, _| {}).is_err());
    }
}
