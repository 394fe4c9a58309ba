// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory balloon (virtio 1.3, 5.5): a guest hands pages in and the host has them, reports free pages, tells how it
//! is doing.
//!
//! * `pages.rs` finds the host's pages for what the driver names, and knows which larger pages are in the balloon whole;
//!   `serve.rs` gives them back.
//! * `stats.rs` is the statistics queue.
//! * `shared.rs` is the configuration space and what else the queues share.
//!
//! Pages are given back without telling anybody: see [`ebbtide_memory::RamBlock::discard_pages`]. While somebody
//! disables such discards (a device with a way of its own to the pages), the balloon inflates all the same and the host
//! keeps the pages. The balloon itself claims nothing: it is in nobody's way.
//!
//! The driver counts in pages of 4 KiB. Where RAM is made of larger pages (`hugetlb`), one is given back when all of it
//! is in the balloon. Transparent huge pages are split by the host.
//!
//! A page in the balloon with a transfer under way to it is the driver's mistake. The transfer's memory stays where it
//! is, and what is transferred is lost.
//!
//! Not offered: hints of free pages (they need a migration), page poison (a driver that poisons then does not report
//! free pages), "must tell host" (deflating needs nothing of the host).
//!
//! A Linux guest needs `virtio_balloon`.

mod metrics;
mod pages;
mod serve;
mod shared;
mod stats;

use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_iothread::{Remote, Sender};

pub use self::metrics::BalloonMetrics;
use self::serve::{Kind, Pages};
use self::shared::Shared;
pub use self::stats::{BalloonStats, Stat};
use crate::control::TransportControl;
use crate::device::{ActivateError, Activation, VirtioDevice};
use crate::service::{self, Setup};

/// The device type (5.5.1).
pub const DEVICE_TYPE: u16 = 5;

/// Bytes of a page of the balloon, whatever the host's are.
pub const PAGE_BYTES: u64 = 4096;

/// Feature bits (5.5.3).
pub mod feature {
    /// The statistics queue.
    pub const STATS_VQ: u64 = 1 << 1;
    /// The driver may deflate when it runs out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The driver reports free pages.
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// Inflating, deflating, statistics, and two places for the reporting queue: drivers leave the numbers of queues out
/// that they did not negotiate, the specification does not.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// What a balloon is to be.
#[derive(Debug, Clone)]
pub struct BalloonSpec {
    /// `id`: its name in events and logs.
    pub id: String,
    /// `deflate-on-oom`: a guest that runs out of memory may take pages back by itself.
    pub deflate_on_oom: bool,
    /// `free-page-reporting`: the guest reports pages that are free, and the host has them until they are used.
    pub free_page_reporting: bool,
    /// `guest-stats-polling-interval`: how often the guest's statistics are asked for; zero: only when
    /// [`VirtioBalloon::refresh_stats`] is called.
    pub stats_interval: Duration,
}

impl BalloonSpec {
    /// No feature but statistics, and those on demand.
    pub fn new(id: impl Into<String>) -> BalloonSpec {
        BalloonSpec {
            id: id.into(),
            deflate_on_oom: false,
            free_page_reporting: false,
            stats_interval: Duration::ZERO,
        }
    }
}

/// What a balloon tells who owns it. Nothing waits for it to be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BalloonEvent {
    /// The driver says that its balloon has another size now: `BALLOON_CHANGE`.
    Changed {
        /// The device.
        id: Arc<str>,
        /// Bytes in the balloon.
        ballooned_bytes: u64,
    },
}

/// A size that a guest cannot have.
#[derive(Debug, thiserror::Error)]
#[error(
    "balloon '{id}': a guest of {ram_bytes} bytes cannot be made {size_bytes} bytes large by a balloon: the least is {least_bytes}"
)]
pub struct TargetError {
    /// The device.
    pub id: Arc<str>,
    /// What was asked for, in bytes.
    pub size_bytes: u64,
    /// All RAM of the guest, in bytes.
    pub ram_bytes: u64,
    /// The least that can be asked for, in bytes.
    pub least_bytes: u64,
}

/// A virtio balloon. Its iothread blocks for as long as the host takes to free pages: better one of its own.
pub struct VirtioBalloon {
    shared: Arc<Shared>,
    remote: Remote,
    features: u64,
    control: OnceLock<TransportControl>,
    complaints: Arc<LogLimit>,
}

impl VirtioBalloon {
    /// An empty balloon whose queues are served on `remote`; `events` hears what happens.
    pub fn new(
        spec: BalloonSpec,
        remote: Remote,
        events: Sender<BalloonEvent>,
    ) -> Arc<VirtioBalloon> {
        let BalloonSpec {
            id,
            deflate_on_oom,
            free_page_reporting,
            stats_interval,
        } = spec;
        let when = |condition, bit| if condition { bit } else { 0 };
        let features = feature::STATS_VQ
            | when(deflate_on_oom, feature::DEFLATE_ON_OOM)
            | when(free_page_reporting, feature::PAGE_REPORTING);
        Arc::new(VirtioBalloon {
            shared: Shared::new(id.into(), events, stats_interval),
            remote,
            features,
            control: OnceLock::new(),
            complaints: Arc::default(),
        })
    }

    /// Asks the driver to leave the guest `size_bytes` of its `ram_bytes` (QMP `balloon`): rounded up to pages of 4 KiB,
    /// and to all of it if that is more. Never blocks. What comes of it is told by [`BalloonEvent`]s.
    ///
    /// # Errors
    /// The balloon would need more pages than it can count.
    pub fn set_size(&self, size_bytes: u64, ram_bytes: u64) -> Result<(), TargetError> {
        let pages = ram_bytes.saturating_sub(size_bytes) / PAGE_BYTES;
        let pages = u32::try_from(pages).map_err(|_| TargetError {
            id: Arc::clone(&self.shared.id),
            size_bytes,
            ram_bytes,
            least_bytes: ram_bytes.saturating_sub(u64::from(u32::MAX) * PAGE_BYTES),
        })?;
        let change = || self.shared.set_target(pages);
        match self.control.get() {
            Some(control) => control.change_config(change),
            None => change(),
        }
        Ok(())
    }

    /// What the guest has left of its `ram_bytes` (QMP `query-balloon`), as its driver says.
    pub fn actual_bytes(&self, ram_bytes: u64) -> u64 {
        ram_bytes.saturating_sub(self.ballooned_bytes())
    }

    /// Bytes in the balloon, as the driver says.
    pub fn ballooned_bytes(&self) -> u64 {
        u64::from(self.shared.actual()) * PAGE_BYTES
    }

    /// Bytes that are to be in the balloon.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.shared.target()) * PAGE_BYTES
    }

    /// What the guest last told (`guest-stats`).
    pub fn stats(&self) -> BalloonStats {
        self.shared.stats.last()
    }

    /// Asks for statistics every `interval`, or not any more when that is zero (`guest-stats-polling-interval`).
    pub fn set_stats_interval(&self, interval: Duration) {
        self.shared.stats.set_interval(interval);
    }

    /// Asks for statistics once. [`stats`](Self::stats) has them when the driver has answered.
    pub fn refresh_stats(&self) {
        self.shared.stats.refresh();
    }

    /// What it has done so far.
    pub fn metrics(&self) -> BalloonMetrics {
        self.shared.counters.snapshot()
    }

    fn start(&self, setup: Setup, features: u64) -> Result<(), ActivateError> {
        let shared = Arc::clone(&self.shared);
        let kind = match setup.queue.index {
            0 => Some(Kind::Inflate),
            1 => Some(Kind::Deflate),
            2 if features & feature::STATS_VQ != 0 => None,
            _ => Some(Kind::Report),
        };
        if kind.is_some() {
            setup.queue.removed.listen();
        }
        let spawned = match kind {
            Some(kind) => self.remote.spawn(move |local| {
                let pages = Pages::new(kind, shared, local.clone(), &setup);
                service::serve(local, setup, pages)
            }),
            None => self
                .remote
                .spawn(move |local| stats::serve(local, setup, shared)),
        };
        spawned.map_err(|_| ActivateError::ThreadStopped)
    }
}

impl VirtioDevice for VirtioBalloon {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.read_config(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.shared.write_config(offset, data);
    }

    /// All choices will do. A driver comes here once after each reset: it begins with an empty balloon.
    fn accept_features(&self, _driver: u64) -> bool {
        self.shared.reset();
        true
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            queues,
            memory,
            gate,
            control,
        } = activation;
        for queue in queues {
            let reports = features & feature::PAGE_REPORTING != 0;
            let stats = features & feature::STATS_VQ != 0 && queue.index == 2;
            if queue.index >= 2 && !stats && !reports {
                // Whatever the driver wants with it was not negotiated.
                continue;
            }
            let setup = Setup {
                name: Arc::clone(&self.shared.id),
                queue,
                gate: Arc::clone(&gate),
                space: Arc::clone(&memory),
                control: control.clone(),
                complaints: Arc::clone(&self.complaints),
            };
            self.start(setup, features)?;
        }
        Ok(())
    }

    fn attach(&self, control: TransportControl) {
        // Called once.
        let _ = self.control.set(control);
    }
}
