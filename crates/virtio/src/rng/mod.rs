// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entropy device (virtio 1.3, 5.4).
//!
//! * `source.rs` is where the bytes come from, an object of its own that devices claim.
//! * `limit.rs` is how many of them the guest gets in a while.
//! * `serve.rs` is the task of the queue: one request at a time.
//!
//! A source may take as long as it likes: while the device waits for it, nothing holds the activation's gate, and the
//! bytes go into memory of the read's own. The end of the activation cancels the read; what comes late is dropped.

mod limit;
mod serve;
mod source;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_iothread::Remote;

use self::limit::Limit;
use self::serve::{Setup, serve};
pub use self::source::{Builtin, EntropySource, File, Reading, RngBackend, RngClaim};
use crate::device::{ActivateError, Activation, VirtioDevice};

/// The device type (5.4.1).
pub const DEVICE_TYPE: u16 = 4;

/// Why there can be no such device or source.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// `max-bytes` is too large.
    #[error("{id}: max-bytes={value} is not below 2^63")]
    MaxBytes {
        /// The device.
        id: String,
        /// What was asked for.
        value: u64,
    },
    /// `period` is zero.
    #[error("{id}: period=0 is no time: milliseconds, at least 1")]
    Period {
        /// The device.
        id: String,
    },
    /// The file cannot be read from.
    #[error("entropy source {path}: {source}")]
    Open {
        /// The file.
        path: std::path::PathBuf,
        /// What the host says.
        #[source]
        source: std::io::Error,
    },
    /// The backend is to go while a device has it.
    #[error("rng backend `{id}` is in use by {users} device(s)")]
    InUse {
        /// The backend.
        id: String,
        /// How many have it.
        users: usize,
    },
    /// The backend is gone.
    #[error("rng backend `{id}` has been removed")]
    Removed {
        /// The backend.
        id: String,
    },
}

/// What an entropy device is to be. The names in quotes are those of QEMU's properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngSpec {
    /// `id`: its name in logs.
    pub id: String,
    /// `max-bytes`: how many bytes the guest gets in each period at most, below 2^63.
    pub max_bytes: u64,
    /// `period`, in milliseconds: at least one.
    pub period: Duration,
}

impl RngSpec {
    /// Without a limit worth the name: 2^63 - 1 bytes in each 65.536 s, as in QEMU.
    pub fn new(id: impl Into<String>) -> RngSpec {
        RngSpec {
            id: id.into(),
            max_bytes: i64::MAX.unsigned_abs(),
            period: Duration::from_millis(1 << 16),
        }
    }
}

/// Size of the queue, as in QEMU: a driver has one request at a time.
const QUEUE_SIZES: [u16; 1] = [8];

/// What an entropy device has done, since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RngMetrics {
    /// Requests answered.
    pub requests: u64,
    /// Bytes given to the guest.
    pub bytes: u64,
    /// Requests with buffers that are not RAM.
    pub bad_memory: u64,
    /// Reads of the source that failed, or found it at its end.
    pub source_failures: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    bad_memory: AtomicU64,
    source_failures: AtomicU64,
}

/// A virtio entropy device. Its queue is served by one iothread.
pub struct VirtioRng {
    name: Arc<str>,
    backend: Arc<RngClaim>,
    remote: Remote,
    /// Outlives activations: a reset gives nobody a new allowance.
    limit: Arc<Mutex<Limit>>,
    counters: Arc<Counters>,
    complaints: Arc<LogLimit>,
    source_complaints: Arc<LogLimit>,
}

impl VirtioRng {
    /// A device that gives the guest what `backend` gives it, served on `remote`. The backend is in use until the device
    /// and all it had in work are gone.
    ///
    /// # Errors
    /// [`RngError::MaxBytes`], [`RngError::Period`], [`RngError::Removed`].
    pub fn new(
        spec: RngSpec,
        backend: &Arc<RngBackend>,
        remote: Remote,
    ) -> Result<Arc<VirtioRng>, RngError> {
        let RngSpec {
            id,
            max_bytes,
            period,
        } = spec;
        if i64::try_from(max_bytes).is_err() {
            return Err(RngError::MaxBytes {
                id,
                value: max_bytes,
            });
        }
        if period < Duration::from_millis(1) {
            return Err(RngError::Period { id });
        }
        Ok(Arc::new(VirtioRng {
            name: id.into(),
            backend: Arc::new(backend.claim()?),
            remote,
            limit: Arc::new(Mutex::new(Limit::new(max_bytes, period))),
            counters: Arc::default(),
            complaints: Arc::default(),
            source_complaints: Arc::default(),
        }))
    }

    /// What it has done so far.
    pub fn metrics(&self) -> RngMetrics {
        let Counters {
            requests,
            bytes,
            bad_memory,
            source_failures,
        } = &*self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RngMetrics {
            requests: load(requests),
            bytes: load(bytes),
            bad_memory: load(bad_memory),
            source_failures: load(source_failures),
        }
    }
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    /// None (5.4.3).
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// There is no configuration (5.4.4).
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn accept_features(&self, _driver: u64) -> bool {
        true
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features: _,
            queues,
            memory,
            gate,
            control,
        } = activation;
        for queue in queues {
            queue.removed.listen();
            let setup = Setup {
                name: Arc::clone(&self.name),
                queue,
                gate: Arc::clone(&gate),
                space: Arc::clone(&memory),
                control: control.clone(),
                backend: Arc::clone(&self.backend),
                limit: Arc::clone(&self.limit),
                counters: Arc::clone(&self.counters),
                complaints: Arc::clone(&self.complaints),
                source_complaints: Arc::clone(&self.source_complaints),
            };
            self.remote
                .spawn(move |local| serve(local, setup))
                .map_err(|_| ActivateError::ThreadStopped)?;
        }
        Ok(())
    }
}
