// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI host device (virtio 1.3, 5.6): disks that come and go under one adapter.
//!
//! * `request.rs` is the wire format, `config.rs` the configuration space: functions of bytes. What commands mean is in
//!   [`ebbtide_scsi`].
//! * `targets.rs` is the table of units; `tasks.rs` the commands under way.
//! * `command.rs` makes a job of a chain, `perform.rs` carries it out on an [`ebbtide_block`] disk.
//! * `control.rs` is the control queue, `events.rs` the event queue.
//!
//! A unit is removed in this order: its gate is closed, new commands get "bad target"; those under way end; the driver
//! is told; the unit and its disk go. The other units of its target hear that the list of units has changed.
//!
//! A command that the backend never answers keeps its unit, closed, and with it the address: nothing is taken from under
//! a transfer. [`ebbtide_block::Disk::abandon`] makes sure that nothing else of the disk is begun then.
//!
//! A Linux guest needs `virtio_scsi`, `scsi_mod` and `sd_mod`.

mod answer;
mod command;
mod config;
mod control;
mod events;
mod metrics;
mod perform;
mod request;
mod shared;
mod targets;
mod tasks;

use std::sync::Arc;
use std::time::Instant;

use ebbtide_block::Disk;
use ebbtide_bus::log_limit::LogLimit;
use ebbtide_gate::Gate;
use ebbtide_iothread::Remote;
use ebbtide_scsi::{Condition, LogicalUnit, Lun};
pub use ebbtide_scsi::{Identity, IdentityError};

use self::command::Commands;
use self::config::Config;
use self::control::Controls;
pub use self::metrics::ScsiMetrics;
use self::request::{Address, Event};
use self::shared::Shared;
use self::targets::{Targets, Unit};
use self::tasks::Tasks;
#[cfg(loom)]
#[doc(hidden)]
pub use self::tasks::modelled;
use crate::device::{ActivateError, Activation, InFlight, PinnedList, VirtioDevice};
use crate::flights::Flights;
use crate::service::{self, Setup};
use crate::virtq::segments_max;

/// The device type (5.6.1).
pub const DEVICE_TYPE: u16 = 8;

/// Feature bits (5.6.3).
pub mod feature {
    /// The driver hears of units that come and go.
    pub const HOTPLUG: u64 = 1 << 1;
    /// The driver hears of capacities that change.
    pub const CHANGE: u64 = 1 << 2;
}

const CONTROL_QUEUE: u16 = 0;
const EVENT_QUEUE: u16 = 1;
const REQUEST_QUEUES: u16 = 2;

/// What a SCSI host device is to be.
#[derive(Debug, Clone)]
pub struct ScsiSpec {
    /// `id`: its name in logs.
    pub id: String,
    /// `num_queues`: number of request queues, at least 1.
    pub queues: u16,
    /// `virtqueue_size`: size of each queue, a power of two.
    pub queue_size: u16,
    /// `max_sectors`: the most sectors of 512 bytes a driver should move with one command.
    pub max_sectors: u32,
    /// `cmd_per_lun`: the most commands a driver should have under way at one unit.
    pub cmd_per_lun: u32,
    /// `hotplug`: tell the driver of units that come and go.
    pub hotplug: bool,
    /// `param_change`: tell the driver of capacities that change.
    pub param_change: bool,
    /// Iothreads to serve request queues on besides the one the device is made with, which is the first and has the
    /// control and event queues, too: `iothread-vq-mapping` without explicit queues.
    pub more_iothreads: Vec<Remote>,
}

impl ScsiSpec {
    /// One request queue of 256, everything offered.
    pub fn new(id: impl Into<String>) -> ScsiSpec {
        ScsiSpec {
            id: id.into(),
            queues: 1,
            queue_size: 256,
            max_sectors: 0xffff,
            cmd_per_lun: 128,
            hotplug: true,
            param_change: true,
            more_iothreads: Vec::new(),
        }
    }
}

/// Why a unit cannot be added, removed or changed.
#[derive(Debug, thiserror::Error)]
pub enum ScsiError {
    /// There is a unit at that address, perhaps on its way out.
    #[error("scsi device '{id}': target {target} has a LUN {lun} already")]
    Occupied {
        /// The device.
        id: Arc<str>,
        /// The target.
        target: u8,
        /// The unit.
        lun: u16,
    },
    /// There is none.
    #[error("scsi device '{id}': target {target} has no LUN {lun}")]
    NoUnit {
        /// The device.
        id: Arc<str>,
        /// The target.
        target: u8,
        /// The unit.
        lun: u16,
    },
    /// A number that is none of a unit.
    #[error("scsi device '{id}': LUN {lun} is more than 16383")]
    Lun {
        /// The device.
        id: Arc<str>,
        /// The number.
        lun: u16,
    },
}

/// A virtio SCSI host device. Request queue i is served by the (i mod n)-th of its n iothreads.
pub struct VirtioScsi {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    /// At least one.
    remotes: Vec<Remote>,
    hotplug: bool,
    param_change: bool,
    complaints: Arc<LogLimit>,
}

impl VirtioScsi {
    /// A device without units.
    pub fn new(spec: ScsiSpec, remote: Remote) -> Arc<VirtioScsi> {
        let ScsiSpec {
            id,
            queues,
            queue_size,
            max_sectors,
            cmd_per_lun,
            hotplug,
            param_change,
            more_iothreads,
        } = spec;
        let queues = queues.clamp(1, u16::MAX - REQUEST_QUEUES);
        let mut remotes = vec![remote];
        remotes.extend(more_iothreads);
        let queue_sizes = vec![queue_size; usize::from(queues + REQUEST_QUEUES)];
        let shared = Shared {
            name: id.into(),
            flights: Flights::new(&queue_sizes),
            config: Config::new(queues, segments_max(queue_size), max_sectors, cmd_per_lun),
            targets: Targets::default(),
            tasks: Tasks::new(queues.into()),
            events: Arc::default(),
            counters: metrics::Counters::default(),
        };
        Arc::new(VirtioScsi {
            shared: Arc::new(shared),
            queue_sizes,
            remotes,
            hotplug,
            param_change,
            complaints: Arc::default(),
        })
    }

    /// What it has done so far.
    pub fn metrics(&self) -> ScsiMetrics {
        self.shared.counters.snapshot()
    }

    /// The units there are, as target and LUN; those on their way out among them.
    pub fn luns(&self) -> Vec<(u8, u16)> {
        let units = self.shared.targets.read();
        let addresses = units.keys();
        addresses
            .map(|address| (address.target, address.lun.number()))
            .collect()
    }

    /// Adds a disk as a unit (`scsi-hd` with `scsi-id` and `lun`) and tells the driver. Never waits.
    ///
    /// # Errors
    /// [`ScsiError::Lun`], [`ScsiError::Occupied`].
    pub fn add_lun(
        &self,
        target: u8,
        lun: u16,
        disk: Arc<Disk>,
        identity: Identity,
    ) -> Result<(), ScsiError> {
        let address = self.address(target, lun)?;
        let unit = Unit {
            disk,
            logical: LogicalUnit::new(identity),
        };
        let name = format!("{}:{target}:{lun}", self.shared.name);
        let told = || self.shared.events.push(Event::Added(address));
        if !self.shared.targets.add(address, name, unit, told) {
            let id = Arc::clone(&self.shared.name);
            return Err(ScsiError::Occupied { id, target, lun });
        }
        Ok(())
    }

    /// The gate of a unit: who closes it lets no command in any more. The unit stays until
    /// [`remove_lun`](Self::remove_lun).
    ///
    /// # Errors
    /// [`ScsiError::Lun`], [`ScsiError::NoUnit`].
    pub fn lun_gate(&self, target: u8, lun: u16) -> Result<Arc<Gate>, ScsiError> {
        let address = self.address(target, lun)?;
        let units = self.shared.targets.read();
        let owned = units.get(&address).ok_or_else(|| self.no_unit(address))?;
        Ok(Arc::clone(owned.gate()))
    }

    /// Begins to remove a unit: no command gets in any more when this returns. Never waits; the rest is
    /// [`LunRemoval::gone`]. Asked again while that is under way, it can be waited for twice.
    ///
    /// # Errors
    /// [`ScsiError::Lun`], [`ScsiError::NoUnit`].
    pub fn remove_lun(&self, target: u8, lun: u16) -> Result<LunRemoval, ScsiError> {
        let address = self.address(target, lun)?;
        match self.shared.targets.close(address) {
            Some(gate) => Ok(LunRemoval {
                shared: Arc::clone(&self.shared),
                address,
                gate,
            }),
            None => Err(self.no_unit(address)),
        }
    }

    /// The disk of a unit has another size now: the driver is told.
    ///
    /// # Errors
    /// [`ScsiError::Lun`], [`ScsiError::NoUnit`].
    pub fn capacity_changed(&self, target: u8, lun: u16) -> Result<(), ScsiError> {
        let address = self.address(target, lun)?;
        let units = self.shared.targets.read();
        let owned = units.get(&address).ok_or_else(|| self.no_unit(address))?;
        let attention = owned.get().logical.attention();
        attention.establish(Condition::CapacityChanged);
        drop(units);
        self.shared.events.push(Event::CapacityChanged(address));
        Ok(())
    }

    fn address(&self, target: u8, number: u16) -> Result<Address, ScsiError> {
        let id = || Arc::clone(&self.shared.name);
        match Lun::new(number) {
            Some(lun) => Ok(Address { target, lun }),
            None => Err(ScsiError::Lun {
                id: id(),
                lun: number,
            }),
        }
    }

    fn no_unit(&self, address: Address) -> ScsiError {
        ScsiError::NoUnit {
            id: Arc::clone(&self.shared.name),
            target: address.target,
            lun: address.lun.number(),
        }
    }

    fn remote_of(&self, index: u16) -> Result<&Remote, ActivateError> {
        let request_queue = usize::from(index.saturating_sub(REQUEST_QUEUES));
        let remote = self.remotes.get(request_queue % self.remotes.len().max(1));
        remote.ok_or(ActivateError::ThreadStopped)
    }

    fn start(&self, setup: Setup) -> Result<(), ActivateError> {
        let index = setup.queue.index;
        let remote = self.remote_of(index)?;
        let shared = Arc::clone(&self.shared);
        if index != EVENT_QUEUE {
            setup.queue.removed.listen();
        }
        let spawned = match index {
            CONTROL_QUEUE => {
                remote.spawn(move |local| service::serve(local, setup, Controls { shared, index }))
            }
            EVENT_QUEUE => remote.spawn(move |local| events::serve(local, setup, shared)),
            _ => remote.spawn(move |local| {
                let commands = Commands {
                    shared,
                    local: local.clone(),
                    gate: Arc::clone(&setup.gate),
                    index,
                    queue: usize::from(index - REQUEST_QUEUES),
                };
                service::serve(local, setup, commands)
            }),
        };
        spawned.map_err(|_| ActivateError::ThreadStopped)
    }
}

/// A unit on its way out. Dropping this leaves it there, closed.
#[must_use = "the unit goes when `gone` is awaited"]
pub struct LunRemoval {
    shared: Arc<Shared>,
    address: Address,
    gate: Arc<Gate>,
}

impl LunRemoval {
    /// The unit's gate, closed: who is still inside.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Waits for the commands under way, which takes as long as their backend does, tells the driver, and gives the disk
    /// back. `None`: another removal of the same unit was first.
    ///
    /// It may be dropped and asked for again.
    pub async fn gone(&self) -> Option<Arc<Disk>> {
        self.gate.drained().await;
        let told = || self.shared.events.push(Event::Removed(self.address));
        let unit = self.shared.targets.take(self.address, &self.gate, told)?;
        Some(unit.disk)
    }
}

impl VirtioDevice for VirtioScsi {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let when = |condition, bit| if condition { bit } else { 0 };
        when(self.hotplug, feature::HOTPLUG) | when(self.param_change, feature::CHANGE)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config.read(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.shared.config.write(offset, data);
    }

    /// All choices will do. A driver comes here once after each reset, before it writes to the configuration: this is
    /// where what it can change gets its initial value.
    fn accept_features(&self, _driver: u64) -> bool {
        self.shared.config.reset();
        self.shared.targets.power_on();
        true
    }

    fn abandon(&self) -> bool {
        let units = self.shared.targets.read();
        for unit in units.values() {
            // The commands under way keep what they need by themselves.
            let _ = unit.get().disk.abandon();
        }
        !units.is_empty()
    }

    fn in_flight(&self) -> Option<InFlight> {
        Some(self.shared.flights.in_flight(Instant::now()))
    }

    fn pinned(&self) -> Vec<PinnedList> {
        self.shared.flights.pinned()
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
        self.shared
            .events
            .start(has(feature::HOTPLUG), has(feature::CHANGE));
        for queue in queues {
            self.start(Setup {
                name: Arc::clone(&self.shared.name),
                queue,
                gate: Arc::clone(&gate),
                space: Arc::clone(&memory),
                control: control.clone(),
                complaints: Arc::clone(&self.complaints),
            })?;
        }
        Ok(())
    }
}
