// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entropy device: its bytes, its limit, sources that fail or never answer.

mod device;

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use device::{ALL, Rig};
use ebbtide_iothread::{Local, ManualClock};
use ebbtide_lab_driver::{Board, Layout, Part, poll};
use ebbtide_memory::Gpa;
use ebbtide_virtio::features;
use ebbtide_virtio::rng::{
    Builtin, EntropySource, File, Reading, RngBackend, RngError, RngSpec, VirtioRng,
};

fn rig_of(spec: RngSpec, backend: &Arc<RngBackend>) -> (Rig, Arc<VirtioRng>) {
    rig_on(Board::new(16 << 20).unwrap(), spec, backend)
}

fn rig_on(board: Board, spec: RngSpec, backend: &Arc<RngBackend>) -> (Rig, Arc<VirtioRng>) {
    let rng = VirtioRng::new(spec, backend, board.remote()).unwrap();
    (Rig::new(board, Arc::clone(&rng) as _, ALL, &[8]), rng)
}

fn rig(source: impl EntropySource + 'static) -> (Rig, Arc<VirtioRng>) {
    rig_of(RngSpec::new("rng0"), &RngBackend::new("source0", source))
}

/// Asks for `len` bytes and waits for them.
fn ask(rig: &mut Rig, len: usize) -> Vec<u8> {
    let gpa = rig.board.ram().alloc(len, 1);
    rig.add(0, &[Part::writable(gpa, len)], Layout::Direct);
    let written = rig.used(0).written as usize;
    let bytes = rig.board.ram().read(gpa, written);
    rig.board.ram().free(gpa, len);
    bytes
}

/// A file with `len` bytes that tell their place.
fn numbered(len: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
    let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    (file, bytes)
}

/// A source that answers after a while, and counts the reads that began and those that were dropped unanswered.
#[derive(Clone, Default)]
struct Late {
    delay: Duration,
    began: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

struct Unanswered(Arc<AtomicUsize>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl EntropySource for Late {
    fn read<'a>(&'a self, local: &'a Local, max: usize) -> Reading<'a> {
        Box::pin(async move {
            self.began.fetch_add(1, Ordering::SeqCst);
            let unanswered = Unanswered(Arc::clone(&self.dropped));
            local.sleep(self.delay).await;
            std::mem::forget(unanswered);
            Ok(vec![7; max])
        })
    }
}

fn late(delay: Duration) -> Late {
    Late {
        delay,
        ..Late::default()
    }
}

#[test]
fn there_is_nothing_to_negotiate_or_configure() {
    let (rig, _) = rig(Builtin);
    assert_eq!(rig.driver.pci().read_config(2, 2), 0x1044);
    assert_eq!(rig.driver.offered(), features::TRANSPORT);
    assert_eq!(rig.driver.max_queue_size(0), 8);
    assert_eq!(rig.driver.max_queue_size(1), 0);
    for offset in [0, 4, 60] {
        assert_eq!(rig.driver.read_config(offset, 4), 0);
        rig.driver.write_config(offset, 4, 0xffff_ffff);
    }
}

#[test]
fn bytes_of_the_kernel() {
    let (mut builtin, rng) = rig(Builtin);
    let (mut urandom, _) = rig(File::open(Path::new(File::DEFAULT_PATH)).unwrap());
    for rig in [&mut builtin, &mut urandom] {
        let (one, other) = (ask(rig, 64), ask(rig, 64));
        assert_eq!((one.len(), other.len()), (64, 64));
        assert_ne!(one, other);
        assert_eq!(ask(rig, 1).len(), 1);
    }
    let metrics = rng.metrics();
    assert_eq!((metrics.requests, metrics.bytes), (3, 129));
}

#[test]
fn a_file_is_read_in_order_into_whatever_buffers() {
    let (file, bytes) = numbered(200_000);
    let (mut rig, _) = rig(File::open(file.path()).unwrap());
    let ram = rig.board.ram().clone();
    let gpa = ram.alloc(96, 1);
    let whole = Part::writable(gpa, 96);
    let [front, rest] = whole.split(5);
    let [middle, back] = rest.split(1);
    for (round, layout) in [Layout::Direct, Layout::Indirect, Layout::Mixed(1)]
        .into_iter()
        .enumerate()
    {
        rig.add(0, &[front, middle, back], layout);
        assert_eq!(rig.used(0).written, 96);
        assert_eq!(ram.read(gpa, 96), bytes[round * 96..][..96]);
    }
    // More than the device gives at once.
    let much = ask(&mut rig, 150_000);
    assert!(!much.is_empty() && much.len() <= 64 << 10, "{}", much.len());
    assert_eq!(much, bytes[3 * 96..][..much.len()]);
}

#[test]
fn requests_that_wait_together_are_all_answered() {
    let (mut rig, rng) = rig(late(Duration::from_millis(2)));
    let gpa = rig.board.ram().alloc(8 * 16, 1);
    let mut heads: Vec<_> = (0..8)
        .map(|i| {
            rig.add(
                0,
                &[Part::writable(Gpa(gpa.0 + i * 16), 16)],
                Layout::Direct,
            )
        })
        .collect();
    let mut used: Vec<_> = (0..8).map(|_| rig.used(0).head).collect();
    heads.sort_unstable();
    used.sort_unstable();
    assert_eq!(used, heads);
    assert_eq!(rig.board.ram().read(gpa, 128), [7; 128]);
    assert_eq!(rng.metrics().requests, 8);
}

#[test]
fn the_limit_holds() {
    let spec = RngSpec {
        max_bytes: 100,
        period: Duration::from_millis(400),
        ..RngSpec::new("rng0")
    };
    let (clock, period) = (ManualClock::new(), spec.period);
    let backend = RngBackend::new("source0", Builtin);
    let board = Board::with_clock(16 << 20, &clock).unwrap();
    let (mut rig, _) = rig_on(board, spec, &backend);
    assert_eq!(ask(&mut rig, 64).len(), 64);
    assert_eq!(ask(&mut rig, 64).len(), 36);
    // A reset does not give a new allowance.
    rig.restart(ALL);
    let gpa = rig.board.ram().alloc(200, 1);
    rig.add(0, &[Part::writable(gpa, 200)], Layout::Direct);
    assert!(rig.stays_unused_by_the_board(0));
    let moment = Duration::from_millis(1);
    clock.advance(period - moment);
    assert!(rig.stays_unused_by_the_board(0));
    clock.advance(moment);
    assert_eq!(rig.used(0).written, 100);
}

#[test]
fn a_guest_that_is_out_of_bytes_can_go() {
    let spec = RngSpec {
        max_bytes: 1,
        period: Duration::from_secs(3600),
        ..RngSpec::new("rng0")
    };
    let (mut rig, _) = rig_of(spec, &RngBackend::new("source0", Builtin));
    assert_eq!(ask(&mut rig, 8).len(), 1);
    let gpa = rig.board.ram().alloc(8, 1);
    rig.add(0, &[Part::writable(gpa, 8)], Layout::Direct);
    assert!(rig.stays_unused(0));
    rig.reset_ends();
    rig.restart(ALL);
    rig.add(0, &[Part::writable(gpa, 8)], Layout::Direct);
    rig.close_ends();
}

#[test]
fn specs_that_cannot_be() {
    let backend = RngBackend::new("source0", Builtin);
    let board = Board::new(1 << 20).unwrap();
    let refused = |spec| match VirtioRng::new(spec, &backend, board.remote()) {
        Ok(_) => panic!("it was made"),
        Err(error) => error.to_string(),
    };
    let spec = RngSpec::new("rng0");
    let error = refused(RngSpec {
        max_bytes: 1 << 63,
        ..spec.clone()
    });
    assert_eq!(
        error,
        "rng0: max-bytes=9223372036854775808 is not below 2^63"
    );
    let error = refused(RngSpec {
        period: Duration::ZERO,
        ..spec
    });
    assert!(error.contains("period=0"), "{error}");
    assert_eq!(backend.users(), 0);
    for path in ["/nowhere/at/all", "/tmp"] {
        let error = File::open(Path::new(path)).err().unwrap().to_string();
        assert!(error.contains(path), "{error}");
    }
}

/// Nothing a driver does but break its queue makes the device want a reset.
#[test]
fn requests_that_make_no_sense() {
    let (mut rig, rng) = rig(Builtin);
    let ram = rig.board.ram().clone();
    let gpa = ram.alloc(64, 1);
    let nowhere = Gpa(1 << 35);
    // Nothing to write to.
    rig.add(0, &[Part::readable(gpa, 64)], Layout::Direct);
    assert_eq!(rig.used(0).written, 0);
    rig.add(0, &[Part::writable(gpa, 0)], Layout::Direct);
    assert_eq!(rig.used(0).written, 0);
    // No RAM there.
    rig.add(0, &[Part::writable(nowhere, 64)], Layout::Direct);
    assert_eq!(rig.used(0).written, 0);
    assert_eq!(rng.metrics().bad_memory, 1);
    // Something to read in front is left alone.
    rig.add(
        0,
        &[Part::readable(nowhere, 8), Part::writable(gpa, 64)],
        Layout::Direct,
    );
    assert_eq!(rig.used(0).written, 64);
    // A host is not made to allocate what a guest asks for.
    let huge = Part {
        len: u32::MAX,
        ..Part::writable(ram.alloc(64 << 10, 1), 1)
    };
    rig.add(0, &[huge], Layout::Direct);
    assert!(rig.used(0).written <= 64 << 10);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn a_broken_queue_wants_a_reset() {
    let (mut rig, _) = rig(Builtin);
    rig.queues[0].set_avail_idx(100);
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    rig.restart(ALL);
    assert_eq!(ask(&mut rig, 16).len(), 16);
}

/// The read is cancelled, the reset does not wait for it, and what it would have brought goes nowhere.
#[test]
fn a_source_that_is_an_hour_late() {
    let source = late(Duration::from_secs(3600));
    let (mut rig, rng) = rig(source.clone());
    let ram = rig.board.ram().clone();
    let gpa = ram.alloc(64, 1);
    for round in 1..=3 {
        rig.add(0, &[Part::writable(gpa, 64)], Layout::Direct);
        assert!(poll(|| source.began.load(Ordering::SeqCst) == round));
        rig.reset_ends();
        assert!(poll(|| source.dropped.load(Ordering::SeqCst) == round));
        assert_eq!(rig.queues[0].device_used_idx(), 0);
        assert_eq!(ram.read(gpa, 64), [0; 64]);
        rig.restart(ALL);
    }
    rig.add(0, &[Part::writable(gpa, 64)], Layout::Direct);
    assert!(poll(|| source.began.load(Ordering::SeqCst) == 4));
    rig.close_ends();
    assert!(poll(|| source.dropped.load(Ordering::SeqCst) == 4));
    assert_eq!(ram.read(gpa, 64), [0; 64]);
    assert_eq!(rng.metrics().requests, 0);
}

/// Others do not wait for it either: its memory is not pinned.
#[test]
fn memory_that_waits_for_bytes_can_go() {
    use ebbtide_memory::{Backing, RamSpec, Region};
    let source = late(Duration::from_millis(500));
    let clock = ManualClock::new();
    let backend = RngBackend::new("source0", source.clone());
    let (mut rig, rng) = rig_on(
        Board::with_clock(16 << 20, &clock).unwrap(),
        RngSpec::new("rng0"),
        &backend,
    );
    let block = rig.board.memory().ram().add(RamSpec {
        name: "dimm".into(),
        size_bytes: 4 << 20,
        max_size_bytes: 4 << 20,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: Some(2 << 20),
    });
    let block = block.unwrap();
    let region = Region::ram("dimm", &block);
    let (memory, root) = (rig.board.memory(), rig.board.root());
    memory
        .update(|map| map.add(root, &region, 8 << 30, 0))
        .unwrap();
    block.plug(0..2 << 20, false).unwrap();
    rig.add(0, &[Part::writable(Gpa(8 << 30), 64)], Layout::Direct);
    assert!(poll(|| source.began.load(Ordering::SeqCst) == 1));
    let seal = block.seal(0..2 << 20).unwrap();
    let drained = ebbtide_lab_driver::block_on(seal.drained(), ebbtide_lab_driver::LIMIT);
    assert!(drained.is_some());
    assert!(seal.discard().is_ok());
    assert!(rig.stays_unused_by_the_board(0));
    clock.advance(source.delay);
    assert_eq!(rig.used(0).written, 0);
    assert_eq!(rng.metrics().bad_memory, 1);
}

/// A pipe: without a writer it is at its end, later it is not.
#[test]
fn a_pipe_that_is_filled_later() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let (mut rig, rng) = rig(File::open(&path).unwrap());
    let gpa = rig.board.ram().alloc(5, 1);
    rig.add(0, &[Part::writable(gpa, 5)], Layout::Direct);
    assert!(poll(|| rng.metrics().source_failures > 0));
    let mut writer = std::fs::File::options().write(true).open(&path).unwrap();
    assert!(rig.stays_unused(0));
    writer.write_all(b"abc").unwrap();
    assert_eq!(rig.used(0).written, 3);
    assert_eq!(rig.board.ram().read(gpa, 3), b"abc");
    // With a writer that has nothing the read waits, and can be left.
    rig.add(0, &[Part::writable(gpa, 5)], Layout::Direct);
    assert!(rig.stays_unused(0));
    rig.close_ends();
}

/// Fails, gives nothing, gives too much, in turn.
struct Moody(AtomicUsize);

impl EntropySource for Moody {
    fn read<'a>(&'a self, _: &'a Local, max: usize) -> Reading<'a> {
        let turn = self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            match turn {
                0 => Err(io::ErrorKind::TimedOut.into()),
                _ => Ok(vec![9; max + 100]),
            }
        })
    }
}

#[test]
fn a_source_that_fails_is_asked_again() {
    let (mut rig, rng) = rig(Moody(AtomicUsize::new(0)));
    let gpa = rig.board.ram().alloc(32, 1);
    rig.add(0, &[Part::writable(gpa, 16)], Layout::Direct);
    assert_eq!(rig.used(0).written, 16);
    let mut expected = [9; 32];
    expected[16..].fill(0);
    assert_eq!(rig.board.ram().read(gpa, 32), expected);
    assert_eq!(rng.metrics().source_failures, 1);
}

#[test]
fn a_backend_in_use_stays() {
    let backend = RngBackend::new("source0", late(Duration::from_secs(3600)));
    let (mut rig, rng) = rig_of(RngSpec::new("rng0"), &backend);
    let gpa = rig.board.ram().alloc(8, 1);
    rig.add(0, &[Part::writable(gpa, 8)], Layout::Direct);
    let error = backend.remove().unwrap_err().to_string();
    assert_eq!(error, "rng backend `source0` is in use by 1 device(s)");
    rig.close_ends();
    assert!(backend.remove().is_err(), "the device is still there");
    drop(rng);
    let board = rig.remove();
    assert!(poll(|| backend.users() == 0));
    backend.remove().unwrap();
    let again = VirtioRng::new(RngSpec::new("rng1"), &backend, board.remote());
    assert!(matches!(again, Err(RngError::Removed { .. })));
}

#[test]
fn resets_at_any_moment() {
    let (mut rig, _) = rig(late(Duration::from_micros(300)));
    let gpa = rig.board.ram().alloc(64, 1);
    for round in 0..100_u64 {
        for _ in 0..4 {
            rig.add(0, &[Part::writable(gpa, 16)], Layout::Direct);
        }
        std::thread::sleep(Duration::from_micros(round * 13 % 900));
        rig.driver.reset().unwrap();
        let used = rig.queues[0].device_used_idx();
        std::thread::sleep(Duration::from_micros(400));
        assert_eq!(rig.queues[0].device_used_idx(), used, "round {round}");
        rig.restart(ALL);
    }
    assert_eq!(ask(&mut rig, 16), [7; 16]);
}
