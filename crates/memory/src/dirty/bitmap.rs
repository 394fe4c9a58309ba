// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bits of one RAM block for one client.

use std::hint::cold_path;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use ebbtide_models::seeded;

use super::PAGE_SHIFT;
use super::snapshot::Word;
use crate::ram::fence::masks;
use crate::sync::AtomicU64;

/// log2 of the bytes of RAM that one word stands for.
const WORD_SHIFT: u32 = PAGE_SHIFT + 6;
/// Words looked at together when most are expected to be 0: a line.
const TOGETHER: usize = 8;

/// One bit per page of a block. The memory comes from the host as bits are set.
pub(super) struct Bitmap {
    words: NonNull<AtomicU64>,
    /// Words, at least 1.
    count: usize,
    pages: u64,
}

// SAFETY: gives out shared references to atomics only, and owns what it points to.
unsafe impl Send for Bitmap {}
// SAFETY: as above.
unsafe impl Sync for Bitmap {}

impl Bitmap {
    /// A bitmap of `pages` clean pages, at least one.
    pub(super) fn new(pages: u64) -> io::Result<Bitmap> {
        let count = pages.div_ceil(64) as usize;
        Ok(Bitmap {
            words: map_words(count)?,
            count,
            pages,
        })
    }

    /// Where the word of host address 0 would be, were it in the block that starts at `host`.
    /// Blocks start at a multiple of what a word stands for.
    pub(super) fn word_zero(&self, host: u64) -> *mut AtomicU64 {
        debug_assert!(host.is_multiple_of(1 << WORD_SHIFT));
        self.words
            .as_ptr()
            .wrapping_sub((host >> WORD_SHIFT) as usize)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `count` words, valid until the bitmap is dropped.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    /// The words of `pages`, as far as they exist, with a mask each.
    fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let pages = pages.start..pages.end.min(self.pages);
        masks(pages).map(|(word, mask)| (word as usize, mask))
    }

    /// Makes `pages` dirty.
    pub(super) fn set(&self, pages: Range<u64>) {
        let words = self.words();
        for (at, mask) in self.parts(pages) {
            if mask == u64::MAX {
                words[at].store(mask, Release);
            } else {
                words[at].fetch_or(mask, Release);
            }
        }
    }

    /// Makes those pages dirty whose bits are set in `bits`, of which the first is that of page
    /// `first`. Bits past the last page count for nothing.
    pub(super) fn merge(&self, first: u64, bits: &[u64]) {
        let words = self.words();
        let or = |at: u64, bits: u64| {
            let valid = match (self.pages).saturating_sub(at * 64) {
                left @ 0..64 => bits & ((1 << left) - 1),
                _ => bits,
            };
            if valid != 0 {
                words[at as usize].fetch_or(valid, Release);
            }
        };
        let shift = first % 64;
        for (at, bits) in (first / 64..).zip(bits) {
            or(at, bits << shift);
            if shift != 0 {
                or(at + 1, bits >> (64 - shift));
            }
        }
    }

    /// Moves what is dirty of `pages` to `found`.
    pub(super) fn take(&self, pages: Range<u64>, found: &mut Vec<Word>) {
        let (start, end) = (pages.start, pages.end.min(self.pages));
        if start >= end {
            return;
        }
        let words = self.words();
        let mut take = |at: usize, mask: u64| {
            let bits = take_bits(&words[at], mask);
            if bits != 0 {
                found.push(Word::new(at, bits));
            }
        };
        // Part of a word at either end, whole words in between.
        let (first, last) = ((start / 64) as usize, ((end - 1) / 64) as usize);
        let (head, tail) = (u64::MAX << (start % 64), u64::MAX >> (63 - (end - 1) % 64));
        if first == last {
            return take(first, head & tail);
        }
        take(first, head);
        let chunks = words[first + 1..last].chunks(TOGETHER);
        for (chunk, from) in chunks.zip((first + 1..).step_by(TOGETHER)) {
            if chunk.iter().fold(0, |any, word| any | word.load(Relaxed)) != 0 {
                (from..from + chunk.len()).for_each(|at| take(at, u64::MAX));
            }
        }
        take(last, tail);
    }

    /// What is dirty of `pages`.
    pub(super) fn look(&self, pages: Range<u64>) -> impl Iterator<Item = Word> {
        let words = self.words();
        let parts = self.parts(pages);
        parts.filter_map(|(at, mask)| {
            let bits = words[at].load(Acquire) & mask;
            (bits != 0).then(|| Word::new(at, bits))
        })
    }

    /// Makes everything clean and gives the memory back. Marks of whoever has not seen yet that
    /// the client is gone may stay.
    #[cfg(not(loom))]
    pub(super) fn forget(&self) {
        let bytes = self.count * size_of::<AtomicU64>();
        // SAFETY: the bitmap's own private mapping, of which every content is valid.
        let result =
            unsafe { libc::madvise(self.words.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
        if result != 0 {
            // The next start makes all pages dirty anyway.
            tracing::debug!(error = %io::Error::last_os_error(), "a dirty bitmap keeps its memory");
        }
    }

    #[cfg(loom)]
    pub(super) fn forget(&self) {
        self.words().iter().for_each(|word| word.store(0, Relaxed));
    }
}

/// Takes the bits of `mask` out of a word.
#[inline]
fn take_bits(word: &AtomicU64, mask: u64) -> u64 {
    // Most words have nothing: a load costs less than an exchange, and leaves the line shared.
    if word.load(Relaxed) & mask == 0 {
        0
    } else if mask == u64::MAX {
        word.swap(0, AcqRel)
    } else {
        word.fetch_and(!mask, AcqRel) & mask
    }
}

/// Marks the page with the host page number `page`.
///
/// # Safety
/// `word_zero` is that of a bitmap that has the page, and the bitmap stays for this call.
#[inline(always)]
pub(super) unsafe fn mark_page(word_zero: *const AtomicU64, page: u64) {
    // SAFETY: the bitmap has the page.
    let word = unsafe { &*word_zero.wrapping_add((page / 64) as usize) };
    let bits = word.load(Relaxed);
    if (bits >> (page % 64)) & 1 == 0 {
        // Who finds the bit set does not jump.
        cold_path();
        set_page(word, bits, page);
    }
}

/// Makes the mask of a page out of the way, too: who finds the bit set needs none.
#[cold]
#[inline(never)]
fn set_page(word: &AtomicU64, bits: u64, page: u64) {
    set_bits(word, bits, 1 << (page % 64));
}

/// Marks the pages with the host page numbers `first..=last`.
///
/// # Safety
/// As for [`mark_page`], of all the pages.
#[cold]
pub(super) unsafe fn mark_pages(word_zero: *const AtomicU64, first: u64, last: u64) {
    for (word, mask) in masks(first..last + 1) {
        // SAFETY: the bitmap has the pages.
        let word = unsafe { &*word_zero.wrapping_add(word as usize) };
        let bits = word.load(Relaxed);
        if bits & mask != mask {
            set_bits(word, bits, mask);
        }
    }
}

/// Sets bits of a word that were not all set in `bits`: the less likely part of marking.
fn set_bits(word: &AtomicU64, bits: u64, mask: u64) {
    if seeded!("mark_by_store") {
        word.store(bits | mask, Release);
    } else {
        word.fetch_or(mask, Release);
    }
}

#[cfg(not(loom))]
fn map_words(count: usize) -> io::Result<NonNull<AtomicU64>> {
    let bytes = count * size_of::<AtomicU64>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at 0"))
}

#[cfg(not(loom))]
impl Drop for Bitmap {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<AtomicU64>();
        // SAFETY: the mapping made by `new`; the table has taken it away (see `Table`).
        let result = unsafe { libc::munmap(self.words.as_ptr().cast(), bytes) };
        if result != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "cannot unmap a dirty bitmap");
        }
    }
}

#[cfg(loom)]
fn map_words(count: usize) -> io::Result<NonNull<AtomicU64>> {
    let words: Box<[AtomicU64]> = (0..count).map(|_| AtomicU64::new(0)).collect();
    Ok(NonNull::from(Box::leak(words)).cast())
}

#[cfg(loom)]
impl Drop for Bitmap {
    fn drop(&mut self) {
        let words = std::ptr::slice_from_raw_parts_mut(self.words.as_ptr(), self.count);
        // SAFETY: leaked by `map_words`, and not used any more.
        drop(unsafe { Box::from_raw(words) });
    }
}
