// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Telling the driver that something happened.

use std::sync::Arc;

use ebbtide_gate::Lease;

use crate::control::Link;
use crate::status::Session;

/// How a transport delivers interrupts. Any thread; must not block.
pub trait Interrupts: Send + Sync {
    /// Chains of queue `index` were used.
    fn queue(&self, index: u16);
    /// The device's configuration or its status changed.
    fn config(&self);
}

/// The interrupt of one queue, for one activation: after a reset it does nothing.
///
/// Whether the driver wants an interrupt is the queue's to say:
/// [`Queue::needs_interrupt`](crate::virtq::Queue::needs_interrupt).
#[derive(Clone)]
pub struct QueueInterrupt {
    link: Arc<Link>,
    session: Session,
    index: u16,
}

impl QueueInterrupt {
    pub(crate) fn new(link: &Arc<Link>, session: Session, index: u16) -> Self {
        Self {
            link: Arc::clone(link),
            session,
            index,
        }
    }

    /// Whether the activation goes on: no reset has begun.
    pub(crate) fn is_active(&self) -> bool {
        self.link.status.is_active(self.session)
    }

    /// Whether the driver puts nothing into the queue any more.
    pub(crate) fn driver_has_let_go(&self) -> bool {
        self.link.has_let_go()
    }

    /// The right to write to the driver's memory that a request has ended, however long that took; none if the machine was
    /// reset meanwhile without waiting for the request.
    pub(crate) fn answer(&self) -> Option<Lease> {
        self.link.answer()
    }

    /// Interrupts the driver.
    pub fn signal(&self) {
        if self.is_active() {
            self.link.interrupts.queue(self.index);
        }
    }
}
