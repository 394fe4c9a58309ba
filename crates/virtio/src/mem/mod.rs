// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory device (virtio 1.3, 5.15): guest RAM that is plugged and unplugged in blocks while the guest runs.
//!
//! * `request.rs` is the wire format, `size.rs` the sizes and the configuration space, `verdict.rs` the answer each
//!   request deserves: functions of values.
//! * `blocks.rs` changes the host's side: plug, and seal, drain, discard; late answers instead of "busy".
//! * `resize/` is a resize as a transaction: where it stands, why it does not go on, when to tell the driver again.
//! * `shared.rs` is the state all of this is applied to; `serve.rs` the task of the queue, `pace.rs` the task that lets
//!   time pass.
//!
//! What never happens: ERROR for anything but a request that is wrong by the specification (it is the end of a Linux
//! driver), BUSY where a late answer does (a Linux driver sleeps for a minute), memory discarded under a transfer.

mod blocks;
pub mod fault;
mod metrics;
mod pace;
mod request;
mod resize;
mod serve;
mod shared;
mod size;
mod verdict;

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebbtide_iothread::{Blocking, Remote, Sender, channel};
use ebbtide_memory::{DiscardToken, Gpa, RamBlock};

use self::blocks::Blocks;
pub use self::blocks::Patience;
use self::fault::HostFaults;
use self::metrics::Counters;
pub use self::metrics::{MemMetrics, RequestMetrics};
pub use self::request::RequestKind;
use self::resize::Resize;
pub use self::resize::{DriverState, Pacing, Progress, Reason};
use self::serve::{Setup, serve};
pub use self::shared::MemEvent;
use self::shared::Shared;
use self::size::Region;
use crate::control::TransportControl;
use crate::device::{ActivateError, Activation, VirtioDevice};

/// The device type (5.15.1).
pub const DEVICE_TYPE: u16 = 24;

/// Requests are few and one at a time.
const QUEUE_SIZES: [u16; 1] = [128];

/// Feature bits (5.15.3).
pub mod feature {
    /// The node of the memory is told.
    pub const ACPI_PXM: u64 = 1 << 0;
    /// The driver does not touch unplugged memory.
    pub const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
}

/// What a memory device is to be.
pub struct MemSpec {
    /// Its name in events and logs.
    pub id: String,
    /// The memory: a sparse block, which is the device's region from end to end. Nobody else plugs or unplugs it.
    pub block: Arc<RamBlock>,
    /// Where the guest sees it: a multiple of its block size, better of 2 GiB, for Linux leaves out what does not fill
    /// its own memory blocks.
    pub addr: Gpa,
    /// The NUMA node the guest is to put the memory on.
    pub node: Option<u16>,
    /// What is to be plugged at first, in bytes; a multiple of the block size.
    pub requested_bytes: u64,
    /// Allocate memory when it is plugged rather than when it is first touched: what the host lacks is found out then.
    pub populate: bool,
    /// When a silent driver is told again.
    pub pacing: Pacing,
    /// How long a driver is kept waiting.
    pub patience: Patience,
    /// Failures on order, for tests.
    pub faults: Option<HostFaults>,
}

impl MemSpec {
    /// A device that asks for nothing at first and does not populate.
    pub fn new(id: impl Into<String>, block: &Arc<RamBlock>, addr: Gpa) -> MemSpec {
        MemSpec {
            id: id.into(),
            block: Arc::clone(block),
            addr,
            node: None,
            requested_bytes: 0,
            populate: false,
            pacing: Pacing::default(),
            patience: Patience::default(),
            faults: None,
        }
    }
}

/// Why a memory device cannot be made, or asked for that.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The RAM block has no blocks to plug.
    #[error("memory device '{id}': RAM block '{block}' is not sparse")]
    NotSparse {
        /// The device.
        id: String,
        /// The RAM block.
        block: String,
    },
    /// The block size is not one the specification allows.
    #[error(
        "memory device '{id}': block size {block_size_bytes} is not a power of two, or does not divide {size_bytes}"
    )]
    BlockSize {
        /// The device.
        id: String,
        /// The block size, in bytes.
        block_size_bytes: u64,
        /// The size of the region, in bytes.
        size_bytes: u64,
    },
    /// The place is not one the specification allows.
    #[error(
        "memory device '{id}': address {addr} is not a multiple of the block size {block_size_bytes}, or too high"
    )]
    Address {
        /// The device.
        id: String,
        /// The address.
        addr: Gpa,
        /// The block size, in bytes.
        block_size_bytes: u64,
    },
    /// A requested size that cannot be.
    #[error(
        "memory device '{id}': requested size {requested_bytes} must be a multiple of {block_size_bytes} and at most {size_bytes}"
    )]
    Requested {
        /// The device.
        id: Arc<str>,
        /// What was asked for, in bytes.
        requested_bytes: u64,
        /// The block size, in bytes.
        block_size_bytes: u64,
        /// The size of the region, in bytes.
        size_bytes: u64,
    },
    /// The thread that was to serve the device has ended.
    #[error("memory device '{id}': its iothread has stopped")]
    ThreadStopped {
        /// The device.
        id: String,
    },
    /// The host did not take memory back, or it must not be given back.
    #[error("memory device '{id}': {source}")]
    Memory {
        /// The device.
        id: Arc<str>,
        /// What it said.
        #[source]
        source: ebbtide_memory::Error,
    },
}

/// How a memory device is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemStatus {
    /// The device.
    pub id: Arc<str>,
    /// Where the guest sees its region.
    pub addr: Gpa,
    /// The node the guest was told.
    pub node: Option<u16>,
    /// The unit of plugging, in bytes.
    pub block_size_bytes: u64,
    /// The size of the region: the most that can be plugged, in bytes.
    pub max_bytes: u64,
    /// What the operator wants plugged, in bytes.
    pub requested_bytes: u64,
    /// How far into the region the driver may plug, in bytes.
    pub usable_bytes: u64,
    /// What is plugged, in bytes.
    pub plugged_bytes: u64,
    /// What is known of the driver.
    pub driver: DriverState,
    /// Where the last resize stands.
    pub progress: Progress,
    /// How long ago the driver last sent a request.
    pub last_request_age: Option<Duration>,
}

/// A virtio memory device over a sparse RAM block. The block's place in the guest's memory map is not its business.
pub struct VirtioMem {
    shared: Arc<Shared>,
    remote: Remote,
    /// What discards its block's memory cannot live with who cannot bear discards.
    _discards: DiscardToken,
}

impl VirtioMem {
    /// A device whose queue is served on `remote`; what may block runs on `blocking`; `events` hears what happens.
    ///
    /// # Errors
    /// The RAM block, its place or the requested size cannot be; somebody has disabled discarding of RAM; the iothread
    /// has stopped.
    pub fn new(
        spec: MemSpec,
        remote: Remote,
        blocking: Arc<Blocking>,
        events: Sender<MemEvent>,
    ) -> Result<Arc<VirtioMem>, MemError> {
        let region = region_of(&spec)?;
        let MemSpec {
            id,
            block,
            requested_bytes,
            populate,
            pacing,
            patience,
            faults,
            ..
        } = spec;
        let discards = block.discards().require_coordinated(&id);
        let discards = discards.map_err(|source| MemError::Memory {
            id: id.as_str().into(),
            source,
        })?;
        let counters = Arc::new(Counters::default());
        let blocks = Blocks {
            block: Arc::new(Mutex::new(block)),
            populate,
            patience,
            blocking,
            faults,
            counters,
            complaints: Arc::default(),
        };
        let resize = Resize::new(pacing, requested_bytes, Instant::now());
        let (news, hear) = channel();
        let shared = Shared::new(
            id.as_str().into(),
            region,
            blocks,
            resize,
            requested_bytes,
            events,
            news,
        );
        let device = VirtioMem {
            shared: Arc::new(shared),
            remote,
            _discards: discards,
        };
        device.check_requested(requested_bytes)?;
        let weak = Arc::downgrade(&device.shared);
        device
            .remote
            .spawn(move |local| pace::pace(local, weak, hear))
            .map_err(|_| MemError::ThreadStopped { id })?;
        Ok(Arc::new(device))
    }

    /// Wants `bytes` plugged from now on. Never blocks. The driver gets an interrupt, also for the size it was asked
    /// for before: that sets an idle driver going again. What comes of it is told by [`MemEvent`]s and
    /// [`status`](Self::status).
    ///
    /// # Errors
    /// [`MemError::Requested`], and nothing has changed.
    pub fn set_requested(&self, bytes: u64) -> Result<(), MemError> {
        self.check_requested(bytes)?;
        self.shared.request(bytes, Instant::now());
        Ok(())
    }

    /// Tells the driver again what is wanted, whatever it is doing.
    pub fn rekick(&self) {
        self.shared.retry(Instant::now());
    }

    /// The guest is stopped: that its driver does nothing is no stall, and it is not told again until [`guest_runs`](Self::guest_runs).
    pub fn guest_stopped(&self) {
        self.shared.guest_stopped(Instant::now());
    }

    /// The guest runs, again or still. The time it was stopped for does not count.
    pub fn guest_runs(&self) {
        self.shared.guest_runs(Instant::now());
    }

    /// How it is doing.
    pub fn status(&self) -> MemStatus {
        let Region {
            addr,
            bytes,
            block_bytes,
            node,
        } = self.shared.region;
        let sizes = self.shared.sizes();
        let (driver, progress, last_request) = self
            .shared
            .resize(|resize| (resize.driver(), resize.progress(), resize.last_request()));
        MemStatus {
            id: Arc::clone(&self.shared.id),
            addr: Gpa(addr),
            node,
            block_size_bytes: block_bytes,
            max_bytes: bytes,
            requested_bytes: sizes.requested,
            usable_bytes: sizes.usable,
            plugged_bytes: sizes.plugged,
            driver,
            progress,
            last_request_age: last_request.map(|at| at.elapsed()),
        }
    }

    /// What it has done so far.
    pub fn metrics(&self) -> MemMetrics {
        self.shared.counters.snapshot()
    }

    /// For a system reset, when the transport is quiet: unplugs everything, waiting for transfers as long as they take.
    /// The requested size stays, the usable size shrinks to what that needs. Independent of the device's life.
    ///
    /// When the future is dropped before it is ready, either nothing has been unplugged or everything that could be.
    ///
    /// # Errors
    /// The host did not take all memory back; what is left stays plugged, and the next driver unplugs it.
    pub fn system_reset(&self) -> impl Future<Output = Result<(), MemError>> + Send + 'static {
        let shared = Arc::clone(&self.shared);
        async move {
            let after = Arc::clone(&shared);
            let emptied = shared
                .blocks
                .empty(move || after.emptied(Instant::now()))
                .await;
            emptied.map_err(|source| MemError::Memory {
                id: Arc::clone(&shared.id),
                source,
            })
        }
    }

    /// For a system reset, when the transport is quiet and the memory is still in use: goes on with `block`, which was
    /// [renewed](ebbtide_memory::RamList::renew) from the one it has and is shown in its place. Nothing of it is plugged.
    pub fn renew(&self, block: &Arc<RamBlock>) {
        self.shared.blocks.renew(Arc::clone(block));
        self.shared.emptied(Instant::now());
    }

    /// The RAM block.
    pub fn block(&self) -> Arc<RamBlock> {
        self.shared.blocks.block()
    }

    fn check_requested(&self, bytes: u64) -> Result<(), MemError> {
        let region = &self.shared.region;
        if bytes <= region.bytes && bytes.is_multiple_of(region.block_bytes) {
            return Ok(());
        }
        Err(MemError::Requested {
            id: Arc::clone(&self.shared.id),
            requested_bytes: bytes,
            block_size_bytes: region.block_bytes,
            size_bytes: region.bytes,
        })
    }
}

fn region_of(spec: &MemSpec) -> Result<Region, MemError> {
    let MemSpec {
        id,
        block,
        addr,
        node,
        ..
    } = spec;
    let id = || id.clone();
    let size_bytes = block.size_bytes();
    let Some(block_size_bytes) = block.block_size_bytes() else {
        return Err(MemError::NotSparse {
            id: id(),
            block: block.name().to_owned(),
        });
    };
    if !block_size_bytes.is_power_of_two() || !size_bytes.is_multiple_of(block_size_bytes) {
        return Err(MemError::BlockSize {
            id: id(),
            block_size_bytes,
            size_bytes,
        });
    }
    if !addr.0.is_multiple_of(block_size_bytes) || addr.0.checked_add(size_bytes).is_none() {
        return Err(MemError::Address {
            id: id(),
            addr: *addr,
            block_size_bytes,
        });
    }
    Ok(Region {
        addr: addr.0,
        bytes: size_bytes,
        block_bytes: block_size_bytes,
        node: *node,
    })
}

impl VirtioDevice for VirtioMem {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let pxm = if self.shared.region.node.is_some() {
            feature::ACPI_PXM
        } else {
            0
        };
        feature::UNPLUGGED_INACCESSIBLE | pxm
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let sizes = self.shared.sizes();
        self.shared.region.read_config(&sizes, offset, data);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Unplugged memory cannot be read, so a driver that wants to is none for this device.
    fn accept_features(&self, driver: u64) -> bool {
        driver & feature::UNPLUGGED_INACCESSIBLE != 0
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            queues,
            memory,
            gate,
            control,
            features: _,
        } = activation;
        let queue = queues.into_iter().find(|queue| queue.index == 0);
        let queue = queue.ok_or(ActivateError::QueueMissing { index: 0 })?;
        let device = Arc::clone(&self.shared);
        let activation = device.driver_ready(Instant::now());
        let setup = Setup {
            device,
            activation,
            queue,
            gate,
            space: memory,
            control,
        };
        self.remote
            .spawn(move |local| serve(local, setup))
            .map_err(|_| ActivateError::ThreadStopped)
    }

    fn attach(&self, control: TransportControl) {
        self.shared.attach(control);
    }
}
