// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A board with any one virtio device, its driver and the driver's queues.
#![allow(dead_code)] // Not every test file uses all of it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_iothread::{Local, Remote};
use ebbtide_lab_driver::{
    Board, DriverQueue, LIMIT, Layout, Part, Used, VirtioDriver, block_on, common, poll,
};
use ebbtide_virtio::{VirtioDevice, VirtioPci};

/// Every feature there is.
pub const ALL: u64 = u64::MAX;
/// Long enough for a task to do what it should not.
pub const SOON: Duration = Duration::from_millis(50);

pub struct Rig {
    pub board: Board,
    pub function: Arc<VirtioPci>,
    pub driver: VirtioDriver,
    pub queues: Vec<DriverQueue>,
    sizes: Vec<u16>,
}

impl Rig {
    /// The driver is ready, with queues of these sizes.
    pub fn new(board: Board, device: Arc<dyn VirtioDevice>, wanted: u64, sizes: &[u16]) -> Rig {
        let function = function(&board, device);
        let mut driver =
            VirtioDriver::attach(&board, Arc::clone(&function) as _, wanted).expect("features");
        let queues = start(&mut driver, sizes);
        Rig {
            board,
            function,
            driver,
            queues,
            sizes: sizes.to_vec(),
        }
    }

    /// Starts the driver again, after a reset.
    pub fn restart(&mut self, wanted: u64) {
        self.driver.negotiate(wanted).expect("features");
        self.queues = start(&mut self.driver, &self.sizes);
    }

    /// Adds a chain to a queue and kicks.
    pub fn add(&mut self, index: u16, parts: &[Part], layout: Layout) -> u16 {
        let queue = &mut self.queues[usize::from(index)];
        let head = queue.add(parts, layout).expect("free descriptors");
        if queue.needs_kick() {
            self.driver.kick(index);
        }
        head
    }

    /// Waits for the next used chain of a queue.
    pub fn used(&mut self, index: u16) -> Used {
        self.driver
            .wait_used(&mut self.queues[usize::from(index)])
            .expect("a used chain")
    }

    /// Whether a chain that was just added stays unused although the board's iothread has seen to it.
    pub fn stays_unused_by_the_board(&mut self, index: u16) -> bool {
        let queue = &mut self.queues[usize::from(index)];
        for _ in 0..100 {
            if queue.poll_used().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        goes_round(&self.board.remote());
        queue.poll_used().is_none()
    }

    /// Whether a queue has no used chain, now and a moment later.
    pub fn stays_unused(&mut self, index: u16) -> bool {
        std::thread::sleep(SOON);
        self.queues[usize::from(index)].poll_used().is_none()
    }

    /// Resets the device, which must not wait for what never comes.
    pub fn reset_ends(&mut self) {
        self.driver.write_common(common::STATUS, 1, 0);
        assert!(poll(|| self.driver.status() == 0), "the reset never ends");
    }

    /// Takes the function away, whose drain must not wait for what never comes.
    pub fn close_ends(&self) {
        block_on(self.function.close(), LIMIT).expect("the drain never ends");
    }

    /// Takes the function off the bus and everything with it, but the board.
    pub fn remove(self) -> Board {
        let Rig {
            board,
            function,
            driver,
            queues,
            sizes: _,
        } = self;
        let closed = function.close();
        let devfn = driver.pci().devfn();
        board.bridge().unmap(devfn).expect("it is there");
        board.wait(closed).expect("the drain never ends");
        queues.into_iter().for_each(DriverQueue::free);
        let detached = board.bridge().detach(devfn.slot());
        drop(detached.expect("it has drained"));
        board
    }
}

/// Waits until an iothread has had time for all it is to do.
pub fn goes_round(iothread: &Remote) {
    let (told, hear) = std::sync::mpsc::channel();
    let rounds = move |local: Local| async move {
        for _ in 0..20 {
            local.yield_now().await;
        }
        told.send(()).expect("somebody waits");
    };
    for _ in 0..2 {
        iothread.spawn(rounds.clone()).expect("it is there");
        hear.recv_timeout(LIMIT).expect("it is stuck");
    }
}

pub fn function(board: &Board, device: Arc<dyn VirtioDevice>) -> Arc<VirtioPci> {
    VirtioPci::new(
        "device0",
        device,
        board.space(),
        board.interrupts(),
        &board.remote(),
    )
    .expect("a function")
}

pub fn start(driver: &mut VirtioDriver, sizes: &[u16]) -> Vec<DriverQueue> {
    let queues = (0..)
        .zip(sizes)
        .map(|(index, &size)| driver.add_queue(index, size))
        .collect();
    driver.driver_ok().expect("activation");
    queues
}

/// Everything countable.
#[derive(Debug, PartialEq, Eq)]
pub struct Residue {
    fds: usize,
    threads: Vec<String>,
    routes: usize,
    map: String,
    /// Of all RAM, by the thread that took them.
    pins: Vec<(String, u64)>,
    free_ram: u64,
}

fn count(directory: impl AsRef<Path>) -> usize {
    std::fs::read_dir(directory).expect("proc").count()
}

/// The names of the threads, but for two that may outlive a board by a moment: the memory's sweeper, the kernel's workers.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("proc");
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        // One that has just ended has no name.
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    let mut names: Vec<_> = tasks.filter_map(name).collect();
    names.retain(|name| name != "memory-sweeper\n" && !name.starts_with("iou-wrk"));
    names.sort();
    names
}

fn pins(board: &Board) -> Vec<(String, u64)> {
    let blocks = board.memory().ram().blocks();
    let holders = blocks.iter().flat_map(|block| block.pin_holders());
    holders.collect()
}

impl Residue {
    pub fn of(board: &Board) -> Residue {
        Residue {
            fds: count("/proc/self/fd"),
            threads: threads(),
            routes: board.interrupts().routes(),
            map: board.memory().mtree(true),
            pins: pins(board),
            free_ram: board.ram().free_bytes(),
        }
    }

    /// What there is once all that is on its way out has gone, as far as somebody can be asked for it: views go on the memory's
    /// thread, tasks on the board's.
    pub fn settled(board: &Board) -> Residue {
        let (mut last, mut same) = (Residue::of(board), 0);
        while same < 5 {
            board.memory().synchronize();
            goes_round(&board.remote());
            std::thread::sleep(Duration::from_millis(20));
            let now = Residue::of(board);
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        last
    }

    /// Views and tasks go when nobody uses them any more, which may be a moment later.
    pub fn assert_same(&self, board: &Board) {
        let same = poll(|| Residue::of(board) == *self);
        assert!(same, "was {self:#?}, is {:#?}", Residue::of(board));
    }
}
