// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Works on a disk and knows what must be on it.
//!
//! Every block of 4 KiB says whose it is (seed), where it belongs and the
//! how-manieth write it was, and is filled with words derived from these. A
//! map of block to last write decides what a read must bring. What comes next is decided by the seed alone ([`plan`]), so
//! that it is known of a disk that is gone what its medium must hold: [`kept`].

mod kept;
mod plan;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::boot::millis;
use crate::pattern::mix;
use crate::protocol::{DiskStart, DiskStatus};
use plan::{Kind, Plan, Step};

pub use kept::kept;

pub(crate) const BLOCK_BYTES: usize = 4096;
const BLOCK_WORDS: usize = BLOCK_BYTES / 8;
/// Longest single operation, in blocks.
const EXTENT_BLOCKS: u64 = 16;
const WRITES_PER_SYNC: u64 = 16;
const MAGIC: u64 = 0x6562_6274_6964_6521;

/// A buffer as O_DIRECT wants it: aligned to its block size.
#[repr(C, align(4096))]
#[derive(Clone)]
pub(crate) struct Block(pub [u8; BLOCK_BYTES]);

/// Work on one disk, going on in a thread of its own until stopped.
#[derive(Debug)]
pub struct Work {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Requests that want the session. The worker holds it nearly always and
    /// the mutex is unfair, so it must step back by itself.
    waiting: AtomicU32,
    session: Mutex<Session>,
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        session
    }

    fn work(&self, verify: bool, pause: Duration) {
        while !self.stop.load(Ordering::Relaxed) {
            let failed = self
                .session
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .step(verify)
                .is_err();
            // A dead disk would otherwise be asked as fast as it can fail.
            std::thread::sleep(if failed {
                pause.max(Duration::from_millis(10))
            } else {
                pause
            });
            while self.waiting.load(Ordering::Relaxed) > 0 {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

impl Work {
    /// Opens the disk and starts.
    ///
    /// # Errors
    /// The disk can't be opened or is smaller than a block.
    pub fn start(start: &DiskStart) -> Result<Work> {
        let session = Session::open(&start.path, start.seed, start.span_bytes)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            session: Mutex::new(session),
        });
        let (worker, verify, pause) = (
            shared.clone(),
            start.verify,
            Duration::from_micros(start.pause_us),
        );
        let thread = std::thread::spawn(move || worker.work(verify, pause));
        Ok(Work {
            shared,
            thread: Some(thread),
        })
    }

    /// How it goes.
    pub fn status(&self) -> DiskStatus {
        self.shared.session().status(self.thread.is_some())
    }

    /// Reads back every block written so far; the work waits for it.
    pub fn verify(&self) -> DiskStatus {
        let mut session = self.shared.session();
        let verified_all = session.verify_all();
        DiskStatus {
            verified_all,
            ..session.status(self.thread.is_some())
        }
    }

    /// Ends the work, flushes, and reads everything back when `verify` says so.
    pub fn stop(&mut self, verify: bool) -> DiskStatus {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut session = self.shared.session();
        let flushed = session.sync().is_ok();
        let verified_all = verify && session.verify_all() && flushed;
        DiskStatus {
            verified_all,
            ..session.status(false)
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// Writes the first `bytes` of a disk in order, flushes, and reads them back.
///
/// # Errors
/// The disk can't be opened or is smaller than `bytes`. A failing operation
/// is counted in the status instead.
pub fn once(path: &str, bytes: u64, seed: u64) -> Result<DiskStatus> {
    let mut session = Session::open(path, seed, 0)?;
    let blocks = bytes / BLOCK_BYTES as u64;
    if blocks > session.plan.blocks() {
        bail!(
            "{path} holds {} bytes, not {bytes}",
            session.plan.blocks() * BLOCK_BYTES as u64
        );
    }
    let mut block = 0;
    while block < blocks
        && session
            .write(block, EXTENT_BLOCKS.min(blocks - block))
            .is_ok()
    {
        block += EXTENT_BLOCKS;
    }
    let flushed = session.sync().is_ok();
    let verified_all = session.verify_all() && flushed && block >= blocks;
    Ok(DiskStatus {
        verified_all,
        ..session.status(false)
    })
}

#[derive(Debug)]
struct Session {
    path: String,
    file: File,
    seed: u64,
    plan: Plan,
    last_write: u64,
    written: HashMap<u64, u64>,
    status: DiskStatus,
    /// When the last operation ended, or the session began.
    last_end: Instant,
    longest_gap: Duration,
}

/// The operation failed or brought something else; the status says what.
struct Failed;

impl Session {
    fn open(path: &str, seed: u64, span_bytes: u64) -> Result<Session> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let mut file = options.open(path).with_context(|| format!("open {path}"))?;
        let bytes = file
            .seek(SeekFrom::End(0))
            .with_context(|| format!("size of {path}"))?;
        let span = if span_bytes == 0 {
            bytes
        } else {
            span_bytes.min(bytes)
        };
        let blocks = span / BLOCK_BYTES as u64;
        if blocks == 0 {
            bail!("{path} holds {span} bytes: less than one block of {BLOCK_BYTES}");
        }
        let status = DiskStatus {
            seed,
            ..DiskStatus::default()
        };
        let (plan, written) = (Plan::new(seed, blocks), HashMap::new());
        Ok(Session {
            path: path.to_owned(),
            file,
            seed,
            plan,
            last_write: 0,
            written,
            status,
            last_end: Instant::now(),
            longest_gap: Duration::ZERO,
        })
    }

    fn status(&self, running: bool) -> DiskStatus {
        // The time since the last end is a gap in the making only as long as there is somebody to end it.
        let open = if running {
            self.last_end.elapsed()
        } else {
            Duration::ZERO
        };
        DiskStatus {
            longest_gap_ms: millis(self.longest_gap.max(open)),
            ok: self.status.errors == 0 && self.status.mismatches == 0,
            running,
            blocks: self.written.len() as u64,
            ..self.status.clone()
        }
    }

    fn step(&mut self, verify: bool) -> Result<(), Failed> {
        let reads = verify && !self.written.is_empty();
        let Step { kind, block, count } = self.plan.next(reads);
        match kind {
            Kind::Read => self.read(block, count),
            Kind::Write => {
                self.write(block, count)?;
                if self.status.writes.is_multiple_of(WRITES_PER_SYNC) {
                    self.sync()?;
                }
                Ok(())
            }
        }
    }

    fn write(&mut self, block: u64, count: u64) -> Result<(), Failed> {
        self.last_write += 1;
        let write = self.last_write;
        let mut buffer = new_buffer(count);
        for (number, content) in (block..).zip(buffer.iter_mut()) {
            fill_block(content, self.seed, number, write);
        }
        // Whatever comes back, the disk may now hold either: until the write is
        // known to be complete the blocks are unknown.
        for number in block..block + count {
            self.written.remove(&number);
        }
        let start = Instant::now();
        let result = self
            .file
            .write_all_at(as_bytes(&buffer), block * BLOCK_BYTES as u64);
        self.note(start, "write", block, result)?;
        self.written
            .extend((block..block + count).map(|number| (number, write)));
        self.status.writes += 1;
        self.status.bytes_written += count * BLOCK_BYTES as u64;
        Ok(())
    }

    fn read(&mut self, block: u64, count: u64) -> Result<(), Failed> {
        let mut buffer = new_buffer(count);
        let start = Instant::now();
        let result = self
            .file
            .read_exact_at(as_bytes_mut(&mut buffer), block * BLOCK_BYTES as u64);
        self.note(start, "read", block, result)?;
        self.status.reads += 1;
        let mut outcome = Ok(());
        for (number, content) in (block..).zip(&buffer) {
            let Some(&write) = self.written.get(&number) else {
                continue;
            };
            match compare_block(content, self.seed, number, write) {
                Ok(()) => self.status.bytes_verified += BLOCK_BYTES as u64,
                Err(what) => {
                    self.status.mismatches += 1;
                    let error = format!("{}: block {number}, write {write}: {what}", self.path);
                    self.status.first_error.get_or_insert(error);
                    outcome = Err(Failed);
                }
            }
        }
        outcome
    }

    fn sync(&mut self) -> Result<(), Failed> {
        let start = Instant::now();
        let result = self.file.sync_data();
        self.note(start, "flush", 0, result)?;
        self.status.syncs += 1;
        Ok(())
    }

    /// Reads every block that holds something; goes on after a failure.
    fn verify_all(&mut self) -> bool {
        let mut numbers: Vec<u64> = self.written.keys().copied().collect();
        numbers.sort_unstable();
        let mut good = true;
        let mut at = 0;
        while let Some(&block) = numbers.get(at) {
            let run = (block..)
                .zip(numbers.iter().skip(at))
                .take_while(|(expected, found)| expected == *found);
            let count = run.take(EXTENT_BLOCKS as usize).count();
            good &= self.read(block, count as u64).is_ok();
            at += count;
        }
        good
    }

    fn note(
        &mut self,
        start: Instant,
        what: &str,
        block: u64,
        result: std::io::Result<()>,
    ) -> Result<(), Failed> {
        let end = Instant::now();
        let millis_since = |before| millis(end.saturating_duration_since(before));
        self.status.slowest_ms = self.status.slowest_ms.max(millis_since(start));
        self.longest_gap = self
            .longest_gap
            .max(end.saturating_duration_since(self.last_end));
        self.last_end = end;
        result.map_err(|error| {
            self.status.errors += 1;
            self.status
                .first_error
                .get_or_insert(format!("{}: {what} of block {block}: {error}", self.path));
            Failed
        })
    }
}

fn new_buffer(count: u64) -> Vec<Block> {
    vec![Block([0; BLOCK_BYTES]); count as usize]
}

fn as_bytes(buffer: &[Block]) -> &[u8] {
    // SAFETY: Block is repr(C) over bytes, its size equals its alignment, so the blocks lie back to back without padding.
    unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast(), std::mem::size_of_val(buffer)) }
}

fn as_bytes_mut(buffer: &mut [Block]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; every byte value is valid, and the borrow is exclusive.
    unsafe {
        std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), std::mem::size_of_val(buffer))
    }
}

fn expected_words(seed: u64, block: u64, write: u64) -> impl Iterator<Item = u64> {
    let start = mix(seed ^ mix(block ^ mix(write)));
    let step = mix(start) | 1;
    let body = (0..(BLOCK_WORDS - 4) as u64)
        .map(move |index| start.wrapping_add(index.wrapping_mul(step)));
    [MAGIC, seed, block, write].into_iter().chain(body)
}

fn fill_block(content: &mut Block, seed: u64, block: u64, write: u64) {
    for (bytes, word) in content
        .0
        .chunks_exact_mut(8)
        .zip(expected_words(seed, block, write))
    {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

fn compare_block(content: &Block, seed: u64, block: u64, write: u64) -> Result<(), String> {
    let found: Vec<u64> = content
        .0
        .chunks_exact(8)
        .map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes))
        .collect();
    if found.iter().copied().eq(expected_words(seed, block, write)) {
        return Ok(());
    }
    Err(match found.as_slice() {
        [MAGIC, s, b, w, ..] if (*s, *b, *w) == (seed, block, write) => {
            "right header, damaged content".to_owned()
        }
        [MAGIC, s, b, w, ..] if *s == seed => format!("holds block {b}, write {w}"),
        [MAGIC, s, ..] => format!("holds a block of seed {s}"),
        [0, 0, 0, 0, ..] => "holds zeros".to_owned(),
        _ => "holds something else".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn image(bytes: u64) -> (std::path::PathBuf, DiskStart) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "agent-disk-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        // Beside this test: /tmp may be a tmpfs, which knows no O_DIRECT in older kernels.
        let path = std::env::current_exe().unwrap().with_file_name(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let text = path.to_str().unwrap().to_owned();
        (
            path,
            DiskStart {
                path: text,
                seed: 5,
                verify: true,
                pause_us: 0,
                span_bytes: 0,
            },
        )
    }

    #[test]
    fn work_writes_and_verifies() {
        let (path, start) = image(1 << 20);
        let mut work = Work::start(&start).unwrap();
        while work.status().writes < 20 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let middle = work.verify();
        assert!(
            middle.verified_all && middle.running && middle.ok,
            "{middle:?}"
        );
        let end = work.stop(true);
        std::fs::remove_file(path).unwrap();
        assert!(end.ok && end.verified_all && !end.running, "{end:?}");
        assert!(end.longest_gap_ms >= end.slowest_ms, "{end:?}");
        assert!(end.bytes_verified >= end.blocks * BLOCK_BYTES as u64 && end.syncs > 0);
    }

    #[test]
    fn lost_and_misplaced_writes_are_found() {
        let (path, start) = image(64 << 10);
        let mut session = Session::open(&start.path, 5, 0).unwrap();
        assert!(session.write(0, 16).is_ok() && session.verify_all());
        let other = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut block = [0; BLOCK_BYTES];
        other.read_exact_at(&mut block, 0).unwrap();
        other.write_all_at(&block, 3 * BLOCK_BYTES as u64).unwrap();
        other.sync_all().unwrap();
        assert!(!session.verify_all());
        let status = session.status(false);
        std::fs::remove_file(path).unwrap();
        assert_eq!((status.ok, status.mismatches), (false, 1));
        assert!(
            status
                .first_error
                .unwrap()
                .ends_with("block 3, write 1: holds block 0, write 1")
        );
    }

    #[test]
    fn a_pause_is_a_gap() {
        let (path, start) = image(64 << 10);
        let mut session = Session::open(&start.path, 5, 0).unwrap();
        assert!(session.write(0, 1).is_ok());
        std::thread::sleep(Duration::from_millis(30));
        assert!(session.status(true).longest_gap_ms >= 30, "under way");
        assert!(session.write(0, 1).is_ok());
        let status = session.status(false);
        std::fs::remove_file(path).unwrap();
        assert!(status.longest_gap_ms >= 30, "{status:?}");
    }

    #[test]
    fn once_covers_the_range_and_refuses_too_much() {
        let (path, start) = image(200 << 10);
        let status = once(&start.path, 150 << 10, 9).unwrap();
        assert!(status.ok && status.verified_all, "{status:?}");
        assert_eq!(
            (status.bytes_written, status.bytes_verified),
            (148 << 10, 148 << 10)
        );
        assert!(once(&start.path, 300 << 10, 9).is_err());
        std::fs::remove_file(path).unwrap();
        assert!(once("/no/such", 4096, 1).is_err());
    }
}
