// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device to test the transport with: it answers, or holds on to what it was asked until told to answer.
#![allow(dead_code)] // Not every test file uses all of it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ebbtide_gate::{Entry, Gate, Lease};
use ebbtide_iothread::{Local, Remote};
use ebbtide_lab_driver::{Board, Part, VirtioDriver};
use ebbtide_memory::{AddressSpace, Gpa};
use ebbtide_virtio::virtq::{Chain, QueueError};
use ebbtide_virtio::{
    ActivateError, Activation, ActiveQueue, TransportControl, VirtioDevice, VirtioPci,
};

/// A feature [`Echo`] offers.
pub const OFFERED: u64 = 1 << 3;
/// A feature [`Echo`] offers and then does not accept.
pub const DISLIKED: u64 = 1 << 4;
pub const QUEUE_SIZES: [u16; 3] = [16, 8, 256];
pub const CONFIG_BYTES: usize = 16;

/// Copies what it reads of a chain to what it may write of it, and returns the chain.
pub struct Echo {
    me: Weak<Echo>,
    remote: Remote,
    /// Keep chains instead.
    pub hold: AtomicBool,
    held: Mutex<Vec<(Chain, Lease)>>,
    pub activations: AtomicU32,
    /// Tasks that serve a queue.
    pub tasks: AtomicU32,
    pub config: Mutex<[u8; CONFIG_BYTES]>,
    pub config_writes: Mutex<Vec<(u64, Vec<u8>)>>,
    control: Mutex<Option<TransportControl>>,
    /// The control of the last activation.
    active_control: Mutex<Option<TransportControl>>,
    fail_activation: AtomicBool,
    /// Why queues broke.
    pub errors: Mutex<Vec<String>>,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Echo {
    pub fn new(remote: Remote) -> Arc<Echo> {
        Arc::new_cyclic(|me| Echo {
            me: me.clone(),
            remote,
            hold: AtomicBool::new(false),
            held: Mutex::default(),
            activations: AtomicU32::new(0),
            tasks: AtomicU32::new(0),
            config: Mutex::new([0; CONFIG_BYTES]),
            config_writes: Mutex::default(),
            control: Mutex::default(),
            active_control: Mutex::default(),
            fail_activation: AtomicBool::new(false),
            errors: Mutex::default(),
        })
    }

    /// Chains it holds.
    pub fn held(&self) -> usize {
        lock(&self.held).len()
    }

    /// Forgets what it holds, as if the requests had ended.
    pub fn release(&self) {
        lock(&self.held).clear();
    }

    pub fn fail_activation(&self) {
        self.fail_activation.store(true, Ordering::SeqCst);
    }

    pub fn control(&self) -> TransportControl {
        lock(&self.control).clone().expect("attached")
    }

    pub fn active_control(&self) -> TransportControl {
        lock(&self.active_control).clone().expect("activated")
    }
}

/// What a task needs besides its queue.
struct Serve {
    echo: Arc<Echo>,
    gate: Arc<Gate>,
    space: Arc<AddressSpace>,
    control: TransportControl,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        // Bits that are not a device's to offer must not get through: the packed ring among them.
        OFFERED | DISLIKED | 1 << 33 | 1 << 34 | 1 << 40
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = lock(&self.config);
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| config.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        lock(&self.config_writes).push((offset, data.to_vec()));
    }

    fn accept_features(&self, driver: u64) -> bool {
        driver & DISLIKED == 0
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        if self.fail_activation.load(Ordering::SeqCst) {
            return Err(ActivateError::QueueMissing { index: 0 });
        }
        self.activations.fetch_add(1, Ordering::SeqCst);
        let Activation {
            features: _,
            queues,
            memory,
            gate,
            control,
        } = activation;
        *lock(&self.active_control) = Some(control.clone());
        for queue in queues {
            let Some(echo) = self.me.upgrade() else {
                return Err(ActivateError::ThreadStopped);
            };
            let serve = Serve {
                echo,
                gate: Arc::clone(&gate),
                space: Arc::clone(&memory),
                control: control.clone(),
            };
            self.remote
                .spawn(move |local| serve.run(queue, local))
                .map_err(|_| ActivateError::ThreadStopped)?;
        }
        Ok(())
    }

    fn attach(&self, control: TransportControl) {
        *lock(&self.control) = Some(control);
    }
}

impl Serve {
    async fn run(self, mut queue: ActiveQueue, local: Local) {
        self.echo.tasks.fetch_add(1, Ordering::SeqCst);
        while let Some(lease) = queue.kicked(&local, &self.gate).await {
            if let Err(error) = self.serve(&mut queue) {
                lock(&self.echo.errors).push(error.to_string());
                self.control.needs_reset();
                break;
            }
            drop(lease);
        }
        self.echo.tasks.fetch_sub(1, Ordering::SeqCst);
    }

    fn serve(&self, queue: &mut ActiveQueue) -> Result<(), QueueError> {
        let echo = &self.echo;
        let reader = self.space.memory().register();
        loop {
            queue.queue.disable_kick(&self.space.read(&reader))?;
            loop {
                let guard = self.space.read(&reader);
                let Some(chain) = queue.queue.pop(&guard)? else {
                    break;
                };
                if echo.hold.load(Ordering::SeqCst) {
                    let Some(lease) = self.gate.enter(Entry::Io) else {
                        return Ok(());
                    };
                    lock(&echo.held).push((chain, lease));
                    continue;
                }
                let mut bytes = vec![0; chain.readable.total_len().min(1 << 20) as usize];
                let copied = chain
                    .readable
                    .copy_to(&guard, &mut bytes)
                    .and_then(|read| chain.writable.copy_from(&guard, &bytes[..read]));
                // A buffer that is not RAM is a driver's mistake like any other here.
                let Ok(written) = copied else {
                    return Err(QueueError::Broken);
                };
                queue.queue.push_used(
                    &guard,
                    chain.head,
                    u32::try_from(written).unwrap_or(u32::MAX),
                )?;
            }
            let guard = self.space.read(&reader);
            queue.notify(&guard)?;
            if !queue.queue.enable_kick(&guard)? {
                return Ok(());
            }
        }
    }
}

/// A board with an [`Echo`] on it.
pub struct Rig {
    pub board: Board,
    pub echo: Arc<Echo>,
    pub function: Arc<VirtioPci>,
    pub driver: VirtioDriver,
}

impl Rig {
    /// The driver has found the device and done nothing yet, except that MSI-X is on.
    pub fn new() -> Rig {
        let board = Board::new(16 << 20).expect("a board");
        let echo = Echo::new(board.remote());
        let function = VirtioPci::new(
            "echo0",
            Arc::clone(&echo) as _,
            board.space(),
            board.interrupts(),
            &board.remote(),
        )
        .expect("a function");
        let pci = board.attach(Arc::clone(&function) as _).expect("a slot");
        pci.enable_msix();
        let driver = VirtioDriver::new(&board, pci).expect("a virtio device");
        Rig {
            board,
            echo,
            function,
            driver,
        }
    }

    /// The driver has queue 0 and is ready.
    pub fn ready(features: u64) -> (Rig, ebbtide_lab_driver::DriverQueue) {
        let mut rig = Rig::new();
        let queue = rig.start(features);
        (rig, queue)
    }

    /// (Re)starts the driver with queue 0.
    pub fn start(&mut self, features: u64) -> ebbtide_lab_driver::DriverQueue {
        self.driver.negotiate(features).expect("features");
        let queue = self.driver.add_queue(0, QUEUE_SIZES[0]);
        self.driver.driver_ok().expect("activation");
        queue
    }
}

/// A chain that echoes `text`, and where the echo goes.
pub fn echo(rig: &Rig, text: &[u8]) -> (Vec<Part>, Gpa) {
    let ram = rig.board.ram();
    let (from, to) = (ram.alloc(text.len(), 1), ram.alloc(text.len(), 1));
    ram.write(from, text);
    (
        vec![
            Part::readable(from, text.len()),
            Part::writable(to, text.len()),
        ],
        to,
    )
}
