// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device (virtio 1.3, 5.2).
//!
//! * `request.rs` is the wire format and its rules, as functions of bytes; `config.rs` the configuration space.
//! * `prepare.rs` makes a job of a chain: finds header, data and status in whatever descriptors, checks, pins.
//! * `run.rs` carries a job out on an [`ebbtide_block`] disk; the task of a queue is that of `service.rs`.
//!
//! A request that names bad memory or a bad range gets an error status and nothing else happens. Only a chain that has
//! no place for a status makes the device want a reset.

mod config;
mod metrics;
mod prepare;
mod request;
mod run;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ebbtide_block::Disk;
use ebbtide_bus::log_limit::LogLimit;
use ebbtide_iothread::Remote;

use self::config::{Config, WRITEBACK_OFFSET};
use self::metrics::Counters;
pub use self::metrics::{BlkMetrics, KindMetrics};
use self::prepare::Spare;
use self::request::{Terms, id_bytes};
use self::run::Requests;
use crate::device::{ActivateError, Activation, InFlight, PinnedList, VirtioDevice};
use crate::flights::Flights;
use crate::service::{Setup, serve};
use crate::virtq::segments_max;

/// The device type (5.2.1).
pub const DEVICE_TYPE: u16 = 2;

/// Feature bits (5.2.3).
pub mod feature {
    /// The number of buffers of a request is limited.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// The logical block size is told.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Flush requests.
    pub const FLUSH: u64 = 1 << 9;
    /// The physical block size is told.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver may switch the cache between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard requests.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// What a block device is to be.
#[derive(Debug, Clone)]
pub struct BlkSpec {
    /// Its name in logs.
    pub id: String,
    /// What the guest reads as its serial number: the first 20 bytes of it.
    pub serial: String,
    /// Number of queues, at least 1.
    pub queues: u16,
    /// Size of each, a power of two.
    pub queue_size: u16,
    /// Iothreads to serve queues on besides the one the device is made with, which is the first:
    /// `iothread-vq-mapping` without explicit queues.
    pub more_iothreads: Vec<Remote>,
}

impl BlkSpec {
    /// One queue of 256, no serial number.
    pub fn new(id: impl Into<String>) -> BlkSpec {
        BlkSpec {
            id: id.into(),
            serial: String::new(),
            queues: 1,
            queue_size: 256,
            more_iothreads: Vec::new(),
        }
    }
}

/// A virtio block device on an opened disk. Its queues are spread over its iothreads: queue i is served by the
/// (i mod n)-th of n.
pub struct VirtioBlk {
    name: Arc<str>,
    id: [u8; request::ID_BYTES],
    queue_sizes: Vec<u16>,
    disk: Arc<Disk>,
    /// At least one.
    remotes: Vec<Remote>,
    config: Config,
    /// The one field a driver can write: 5.2.5.
    writeback: Arc<AtomicBool>,
    /// By queue.
    counters: Box<[Arc<Counters>]>,
    flights: Arc<Flights>,
    complaints: Arc<LogLimit>,
}

impl VirtioBlk {
    /// A device for `disk` whose queues are served on `remote`.
    pub fn new(spec: BlkSpec, disk: Arc<Disk>, remote: Remote) -> Arc<VirtioBlk> {
        let mut remotes = vec![remote];
        remotes.extend(spec.more_iothreads);
        let queues = spec.queues.max(1);
        let queue_sizes = vec![spec.queue_size; usize::from(queues)];
        let config = Config {
            capacity_bytes: disk.size_bytes(),
            logical_block_bytes: disk.logical_block_bytes(),
            physical_block_bytes: disk.physical_block_bytes(),
            // Besides header and status.
            segments_max: segments_max(spec.queue_size),
            queues,
            discard: disk.features().discard,
            write_zeroes: disk.features().write_zeroes,
        };
        Arc::new(VirtioBlk {
            name: spec.id.into(),
            id: id_bytes(&spec.serial),
            flights: Arc::new(Flights::new(&queue_sizes)),
            queue_sizes,
            disk,
            remotes,
            config,
            writeback: Arc::new(AtomicBool::new(true)),
            counters: (0..queues).map(|_| Arc::default()).collect(),
            complaints: Arc::default(),
        })
    }

    /// What it has done so far.
    pub fn metrics(&self) -> BlkMetrics {
        Counters::snapshot(&self.counters)
    }

    /// Where a queue is served, and its counters, which nobody else counts with.
    fn place_of(&self, queue: u16) -> Result<(&Remote, &Arc<Counters>), ActivateError> {
        let index = usize::from(queue);
        let remote = self.remotes.get(index % self.remotes.len().max(1));
        remote
            .zip(self.counters.get(index))
            .ok_or(ActivateError::ThreadStopped)
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }
}

impl VirtioDevice for VirtioBlk {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        use feature::{
            BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, MQ, RO, SEG_MAX, TOPOLOGY, WRITE_ZEROES,
        };
        let when = |condition, bit| if condition { bit } else { 0 };
        SEG_MAX
            | BLK_SIZE
            | TOPOLOGY
            | FLUSH
            | when(self.disk.readonly(), RO)
            | when(!self.disk.readonly(), CONFIG_WCE)
            | when(self.config.discard, DISCARD)
            | when(self.config.write_zeroes, WRITE_ZEROES)
            | when(self.config.queues > 1, MQ)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config
            .read(self.writeback.load(Ordering::Relaxed), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_OFFSET, &[value]) = (offset, data) {
            // Which of the two it is matters to the next write that begins; nothing else depends on it.
            self.writeback.store(value != 0, Ordering::Relaxed);
        }
    }

    /// All choices will do. This is also where the one writable field gets its initial value (5.2.5.2).
    fn accept_features(&self, driver: u64) -> bool {
        let cannot_flush = driver & (feature::CONFIG_WCE | feature::FLUSH) == feature::CONFIG_WCE;
        self.writeback.store(!cannot_flush, Ordering::Relaxed);
        true
    }

    fn abandon(&self) -> bool {
        // The requests under way keep what they need by themselves.
        let _ = self.disk.abandon();
        true
    }

    fn in_flight(&self) -> Option<InFlight> {
        Some(self.flights.in_flight(Instant::now()))
    }

    fn pinned(&self) -> Vec<PinnedList> {
        self.flights.pinned()
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            queues,
            memory,
            gate,
            control,
        } = activation;
        let has = |bit| features & bit != 0;
        let terms = Terms {
            capacity_bytes: self.config.capacity_bytes,
            readonly: self.disk.readonly(),
            discard: has(feature::DISCARD),
            write_zeroes: has(feature::WRITE_ZEROES),
        };
        for queue in queues {
            let (remote, counters) = self.place_of(queue.index)?;
            queue.removed.listen();
            let index = queue.index;
            let setup = Setup {
                name: Arc::clone(&self.name),
                queue,
                gate: Arc::clone(&gate),
                space: Arc::clone(&memory),
                control: control.clone(),
                complaints: Arc::clone(&self.complaints),
            };
            let disk = Arc::clone(&self.disk);
            let (counters, writeback) = (Arc::clone(counters), Arc::clone(&self.writeback));
            let flights = Arc::clone(&self.flights);
            let (id, flushes, may_unmap) = (self.id, has(feature::FLUSH), self.config.discard);
            remote
                .spawn(move |local| {
                    let requests = Requests {
                        disk: disk.attach(&local),
                        local: local.clone(),
                        terms,
                        id,
                        counters,
                        flights,
                        queue: index,
                        gate: Arc::clone(&setup.gate),
                        writeback,
                        flushes,
                        may_unmap,
                        spare: Spare::default(),
                        turn: Cell::new(None),
                    };
                    serve(local, setup, requests)
                })
                .map_err(|_| ActivateError::ThreadStopped)?;
        }
        Ok(())
    }
}
