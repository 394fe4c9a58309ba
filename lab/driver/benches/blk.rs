// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a request costs the iothread of a virtio disk, without a guest: this thread is the driver, and puts as many
//! requests into the queue as are to be under way as soon as all those before are answered.
//!
//! `cargo bench -p ebbtide-lab-driver --bench blk [null|file [DEPTH]]`

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebbtide_block::{Disk, DiskSpec};
use ebbtide_lab_driver::{Board, DriverQueue, Layout, VirtioDriver, blk};
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};

const QUEUE_SIZE: u16 = 256;
const BLOCK_BYTES: usize = 4096;
const DISK_BYTES: u64 = 64 << 20;
const TIME: Duration = Duration::from_secs(1);

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let disks = match words.first() {
        Some(disk) => vec![disk.as_str()],
        None => vec!["null", "file"],
    };
    let depths = match words.get(1) {
        Some(depth) => vec![depth.parse().expect("DEPTH is a number")],
        None => vec![1, 32, 128],
    };
    for disk in disks {
        for &depth in &depths {
            measure(disk, depth);
        }
    }
}

fn open(disk: &str, image: &mut tempfile::NamedTempFile) -> Disk {
    match disk {
        "null" => Disk::null_co(&ebbtide_block::NullSpec {
            size_bytes: DISK_BYTES,
            ..Default::default()
        })
        .expect("a disk without a medium"),
        "file" => {
            let chunk = vec![0x5a; 1 << 20];
            for _ in 0..DISK_BYTES >> 20 {
                image.write_all(&chunk).expect("write the image");
            }
            Disk::open(&DiskSpec::new(image.path())).expect("open the image")
        }
        other => panic!("{other} is neither null nor file"),
    }
}

fn measure(name: &str, depth: usize) {
    let mut image = tempfile::NamedTempFile::new().expect("an image");
    let disk = open(name, &mut image);
    let board = Board::new(32 << 20).expect("a board");
    let spec = BlkSpec {
        queue_size: QUEUE_SIZE,
        ..BlkSpec::new("disk0")
    };
    let device = VirtioBlk::new(spec, Arc::new(disk), board.remote());
    let function = VirtioPci::new(
        "disk0",
        device,
        board.space(),
        board.interrupts(),
        &board.remote(),
    )
    .expect("a function");
    let driver = VirtioDriver::attach(&board, function, u64::MAX).expect("a driver");
    let mut queue = driver.add_queue(0, QUEUE_SIZE);
    driver.driver_ok().expect("a device that works");
    let requests: Vec<_> = (0..depth as u64)
        .map(|at| blk::Request::read(board.ram(), at * 8 % (DISK_BYTES / 512), BLOCK_BYTES))
        .collect();
    let parts: Vec<_> = requests.iter().map(blk::Request::parts).collect();
    let batch = |driver: &VirtioDriver, queue: &mut DriverQueue| {
        for parts in &parts {
            queue
                .add(parts, Layout::Indirect)
                .expect("room in the queue");
        }
        if queue.needs_kick() {
            driver.kick(0);
        }
        let mut answered = 0;
        while answered < depth {
            answered += std::iter::from_fn(|| queue.poll_used()).count();
        }
    };
    for _ in 0..100 {
        batch(&driver, &mut queue);
    }
    let (begun, before) = (Instant::now(), iothread_ns());
    let mut batches = 0;
    while begun.elapsed() < TIME {
        batch(&driver, &mut queue);
        batches += 1;
    }
    let (time, spent) = (begun.elapsed(), iothread_ns() - before);
    let requests = (batches * depth) as f64;
    println!(
        "{name:<5} {depth:>3} under way: {:>8.0} 1/s, {:>6.0} ns of the iothread each",
        requests / time.as_secs_f64(),
        spent as f64 / requests
    );
}

/// Processor time of the board's iothread.
fn iothread_ns() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("own threads");
    for task in tasks.flatten() {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if read("comm").trim() == "iothread0" {
            let stat = read("schedstat");
            let ns = stat
                .split_whitespace()
                .next()
                .and_then(|ns| ns.parse().ok());
            return ns.expect("schedstat begins with nanoseconds");
        }
    }
    panic!("no thread is called iothread0");
}
