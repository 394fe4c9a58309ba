// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contract between a virtio device and the transport that carries it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_gate::{Drained, Entry, Gate, Lease};
use ebbtide_iothread::{Event, Local};
use ebbtide_memory::{AddressSpace, ReadGuard};

use crate::control::TransportControl;
use crate::interrupt::QueueInterrupt;
use crate::removal::{Removal, Removed};
use crate::virtq::{Queue, QueueError};

/// A device model, whatever the transport.
///
/// Every method is called from a vCPU thread or the control thread and must not block: no I/O, no waiting for a lock
/// that is held across I/O. The transport calls [`read_config`](Self::read_config) and
/// [`write_config`](Self::write_config) under its configuration lock (see [`TransportControl::change_config`]); none of
/// these may call back into [`TransportControl::change_config`].
pub trait VirtioDevice: Send + Sync {
    /// The device type (virtio 1.3, 5): 2 for a block device, 24 for a memory device.
    fn device_type(&self) -> u16;

    /// The feature bits of the device itself; the transport adds [`features::TRANSPORT`](crate::features::TRANSPORT).
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two each. The length is the number of queues and never changes.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the device's configuration at `offset`; bytes behind its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver wrote `data` (1, 2, 4 or 8 bytes) to the device's configuration at `offset`. Ignored unless the field
    /// is writable.
    fn write_config(&self, offset: u64, data: &[u8]);

    /// Whether the device works with the features the `driver` accepted, a subset of those offered. False leaves
    /// FEATURES_OK clear, which tells the driver.
    fn accept_features(&self, driver: u64) -> bool;

    /// The driver set DRIVER_OK: start to serve the queues, on another thread, and return.
    ///
    /// # Errors
    /// The device cannot serve them. The transport then sets NEEDS_RESET.
    fn activate(&self, activation: Activation) -> Result<(), ActivateError>;

    /// Called once, before anything else, with a control that lives as long as the transport. A device whose
    /// configuration can change while no driver is active needs it to keep the configuration generation true.
    fn attach(&self, control: TransportControl) {
        let _ = control;
    }

    /// Gives up what requests in flight wait for: what the backend has begun ends when it ends, nothing more is begun.
    /// False: there is nothing to give up.
    fn abandon(&self) -> bool {
        false
    }

    /// The requests a backend works on, for reports; `None`: the device does not count them.
    fn in_flight(&self) -> Option<InFlight> {
        None
    }

    /// The host addresses of guest memory that the requests counted by [`in_flight`](Self::in_flight) have pinned. A
    /// device that has pinned anything longer than a read section lasts names all of it, and nothing it has let go of.
    fn pinned(&self) -> Vec<PinnedList> {
        Vec::new()
    }
}

/// Host addresses that are pinned together, with one pin for each RAM block that they are in.
pub type PinnedList = Vec<Range<u64>>;

/// Requests a backend works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// How many.
    pub requests: u64,
    /// The age of the oldest, where that is known.
    pub oldest: Option<Duration>,
}

/// What a device gets to serve its queues from DRIVER_OK to the next reset.
///
/// Whoever touches a queue, guest memory or the configuration on behalf of this activation holds a [`Lease`] of `gate`
/// while doing so, and every request holds one from its pop until its chain is given back. When the gate closes, tasks
/// end: finish what is in flight, drop the leases, start nothing new. The driver learns that the reset is complete when
/// the last lease is gone.
///
/// A device that is removed under a live driver closes the gate, too. A task that [listens](Removed::listen) has a lease
/// then to answer what is in its queue, so that nothing in the guest waits for an answer that never comes.
///
/// A chain that waits for something the host may never have (a frame to receive, random bytes, room in a pipe) waits
/// without a lease and without pins, as the addresses it is. It is served under a lease taken then, or dropped when there
/// is none to be had any more: so nothing outside can hold up a reset.
pub struct Activation {
    /// The negotiated features.
    pub features: u64,
    /// The queues the driver enabled, in order of their index. There may be fewer than the device has.
    pub queues: Vec<ActiveQueue>,
    /// The memory the device may access.
    pub memory: Arc<AddressSpace>,
    /// Closed by the reset or the removal that ends this activation.
    pub gate: Arc<Gate>,
    /// The device's way to talk to the driver besides the queues.
    pub control: TransportControl,
}

/// One enabled queue.
pub struct ActiveQueue {
    /// Which of the device's queues it is.
    pub index: u16,
    /// The rings.
    pub queue: Queue,
    /// Signalled by the driver's kicks.
    pub kick: Event,
    /// Tells the driver about used chains.
    pub interrupt: QueueInterrupt,
    /// Tells the task that the device is removed. To whom does not listen a removal is the same as a reset.
    pub removed: Removed,
    /// What [`kicked`](Self::kicked) waits for besides a kick, kept from one call to the next.
    end: Option<Drained>,
}

impl ActiveQueue {
    /// Puts the parts together; also the transport's way to say that the device is removed.
    pub fn new(
        index: u16,
        queue: Queue,
        kick: Event,
        interrupt: QueueInterrupt,
    ) -> (Self, Removal) {
        let (removal, removed) = Removal::new();
        let queue = Self {
            index,
            queue,
            kick,
            interrupt,
            removed,
            end: None,
        };
        (queue, removal)
    }

    /// Waits for a kick and enters `gate`, the one of the activation. `None`: the gate is closed, the device is removed, or
    /// the kick can never come; the task is to end.
    pub async fn kicked(&mut self, local: &Local, gate: &Arc<Gate>) -> Option<Lease> {
        if gate.is_closed() {
            return None;
        }
        let drained = self.end.get_or_insert_with(|| gate.drained());
        let end = self.removed.ended(drained);
        let kicked = crate::select::first(self.kick.wait(local), end).await;
        match kicked {
            Some(Ok(_)) => gate.enter(Entry::Io),
            Some(Err(error)) => {
                tracing::error!(queue = self.index, %error, "waiting for a kick failed");
                None
            }
            None => None,
        }
    }

    /// Interrupts the driver if it wants that for what was published since the last time.
    ///
    /// # Errors
    /// As [`Queue::needs_interrupt`].
    pub fn notify(&mut self, guard: &ReadGuard<'_>) -> Result<(), QueueError> {
        if self.queue.needs_interrupt(guard)? {
            self.interrupt.signal();
        }
        Ok(())
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The thread that was to serve the queues has ended.
    #[error("the thread that serves the queues has stopped")]
    ThreadStopped,
    /// A queue the device cannot work without was not enabled.
    #[error("queue {index} is not enabled")]
    QueueMissing {
        /// Which one.
        index: u16,
    },
    /// A queue is unusable.
    #[error("queue {index}: {source}")]
    Queue {
        /// Which one.
        index: u16,
        /// Why.
        #[source]
        source: QueueError,
    },
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was wanted.
        what: &'static str,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
}
