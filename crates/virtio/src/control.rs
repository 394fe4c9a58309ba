// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device tells its driver besides used chains: "my configuration changed", "reset me".

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_gate::{Entry, Gate, Lease};
use ebbtide_models::seeded;

use crate::interrupt::Interrupts;
use crate::status::{self, Session, Status};
use crate::sync::{Mutex, MutexGuard, lock};

/// What a transport and the device's threads share. It knows neither of them, so both may own it.
pub struct Link {
    pub(crate) status: Status,
    pub(crate) interrupts: Arc<dyn Interrupts>,
    config: Mutex<Config>,
    /// The driver puts nothing into its queues any more. For good, as a function that was ejected does not come back.
    let_go: AtomicBool,
    /// Entered to write to the guest's memory that a request has ended. Closed when another guest gets that memory.
    answers: Arc<Gate>,
}

/// State of the configuration space's change protocol (2.5.1, 4.1.4.3.1).
#[derive(Debug, Default)]
struct Config {
    generation: u8,
    /// The driver has read something since the generation last changed.
    read: bool,
    /// A change the driver is to hear of as soon as it is set up.
    pending: bool,
}

/// What a driver is to notice of a change of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing has changed.
    None,
    /// The generation changes, so that a driver that is reading reads again. For what follows from the driver's own
    /// requests.
    Silent,
    /// The generation changes and the driver is interrupted.
    Announced,
}

impl Link {
    /// At power-on.
    pub fn new(interrupts: Arc<dyn Interrupts>) -> Arc<Link> {
        Arc::new(Link {
            status: Status::new(),
            interrupts,
            config: Mutex::new(Config::default()),
            let_go: AtomicBool::new(false),
            answers: Gate::new("answers"),
        })
    }

    /// The guest has ejected the function.
    pub(crate) fn set_let_go(&self) {
        self.let_go.store(true, Ordering::Release);
    }

    /// Whether it has: what its driver put into the queues before can be seen now, and is all.
    pub(crate) fn has_let_go(&self) -> bool {
        self.let_go.load(Ordering::Acquire)
    }

    /// Whether a driver may be waiting for a device that is gone: it has not let go of it, and belongs to the guest that is
    /// there now.
    pub(crate) fn may_be_awaited(&self) -> bool {
        !self.has_let_go() && !self.answers.is_closed()
    }

    /// The right to write an answer to the guest's memory, for as long as the lease is held; none once that memory is
    /// another guest's.
    pub fn answer(&self) -> Option<Lease> {
        self.answers.enter(Entry::Io)
    }

    /// No answer is written from now on, for good; ready when none is being written.
    pub fn end_answers(&self) -> impl Future<Output = ()> + Send + 'static {
        if !seeded!("answers_stay_open") {
            self.answers.close();
        }
        let drained = self.answers.drained();
        async move {
            if !seeded!("answer_not_waited_for") {
                drained.await;
            }
        }
    }

    /// The status register.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// The configuration generation as the driver reads it.
    pub fn config_generation(&self) -> u8 {
        lock(&self.config).generation
    }

    /// Reads the device's configuration: no change comes in between.
    pub fn read_config<T>(&self, read: impl FnOnce() -> T) -> T {
        let mut config = lock(&self.config);
        config.read = true;
        read()
    }

    /// The driver writes to the device's configuration: no change comes in between.
    pub fn write_config(&self, write: impl FnOnce()) {
        let _config = lock(&self.config);
        write();
    }

    /// The driver is set up: a change it could not be told of before is announced now.
    pub fn driver_ok(&self) -> Session {
        if seeded!("driver_ok_unlocked") {
            let pending = std::mem::take(&mut lock(&self.config).pending);
            self.status.set(status::DRIVER_OK);
            if pending {
                self.interrupts.config();
            }
            return self.status.session();
        }
        // Under the lock, a change comes either before DRIVER_OK and is pending here, or after it.
        let mut config = lock(&self.config);
        let before = self.status.set(status::DRIVER_OK);
        // An error is not marked under the lock: either it finds DRIVER_OK set, or it is found here.
        let failed = before & status::NEEDS_RESET != 0 && !seeded!("early_needs_reset_unannounced");
        if std::mem::take(&mut config.pending) || failed {
            self.interrupts.config();
        }
        self.status.session()
    }

    /// Begins a reset; see [`Status::begin_reset`].
    pub fn begin_reset(&self) -> Session {
        let mut config = lock(&self.config);
        config.pending = false;
        self.status.begin_reset()
    }

    /// Ends the reset that began `session`; see [`Status::finish_reset`].
    pub fn finish_reset(&self, session: Session) -> bool {
        self.status.finish_reset(session)
    }

    /// A control for `session`, or for whatever session is current when it is used.
    pub fn control(self: &Arc<Self>, session: Option<Session>) -> TransportControl {
        TransportControl {
            link: Arc::clone(self),
            session,
        }
    }

    fn update_config<T>(&self, change: impl FnOnce() -> (T, Change)) -> T {
        if seeded!("config_change_unlocked") {
            let (result, change) = change();
            self.changed(&mut lock(&self.config), change);
            return result;
        }
        let mut config = lock(&self.config);
        let (result, change) = change();
        self.changed(&mut config, change);
        result
    }

    fn changed(&self, config: &mut MutexGuard<'_, Config>, change: Change) {
        if change == Change::None
            || change == Change::Silent && seeded!("silent_change_keeps_generation")
        {
            return;
        }
        // Without a read in between the driver cannot have an older state; and a generation that stands still cannot
        // run once around while the driver reads.
        if std::mem::take(&mut config.read) {
            config.generation = config.generation.wrapping_add(1);
        }
        if change == Change::Silent {
            return;
        }
        let status = self.status.get();
        if status & status::DRIVER_OK != 0 {
            self.interrupts.config();
        } else if status & status::DRIVER != 0 {
            config.pending = true;
        }
    }

    /// Takes no lock, so that it can be called under any.
    fn needs_reset(&self, session: Session) {
        let Some(before) = self.status.set_needs_reset(session) else {
            return;
        };
        if before & status::DRIVER_OK != 0 {
            self.interrupts.config();
        }
    }
}

/// A device's way to talk to its driver besides the queues. Clones are the same thing.
///
/// The one in an [`Activation`](crate::Activation) belongs to it: after the reset that ends the activation, its
/// [`needs_reset`](Self::needs_reset) does nothing. Use it while holding a lease of the activation's gate.
#[derive(Clone)]
pub struct TransportControl {
    link: Arc<Link>,
    session: Option<Session>,
}

impl TransportControl {
    /// The device met an error that only a reset mends (2.1.2): the driver is told, once.
    pub fn needs_reset(&self) {
        let session = self.session.unwrap_or_else(|| self.link.status.session());
        self.link.needs_reset(session);
    }

    /// Changes the device's configuration and tells the driver, as one step: a driver that reads the configuration sees
    /// all of the change or nothing of it, the generation it reads tells which, and the interrupt comes after.
    ///
    /// `change` runs under the transport's configuration lock, which is also held around
    /// [`VirtioDevice::read_config`](crate::VirtioDevice::read_config): do not hold a lock here that `read_config`
    /// takes; take it inside `change`.
    pub fn change_config<T>(&self, change: impl FnOnce() -> T) -> T {
        self.update_config(|| (change(), Change::Announced))
    }

    /// As [`change_config`](Self::change_config), for a change of which only `change` itself knows whether the driver
    /// is to be interrupted for it.
    pub fn update_config<T>(&self, change: impl FnOnce() -> (T, Change)) -> T {
        self.link.update_config(change)
    }

    /// The same for a change that was atomic in itself (one field of at most the width the driver reads it with) and has
    /// been made already.
    pub fn config_changed(&self) {
        self.change_config(|| ());
    }
}
