// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The reset of a device that has requests in flight: it is complete when the last of them is.

use std::sync::Arc;

use ebbtide_gate::Gate;
use ebbtide_models::seeded;

use crate::control::Link;
use crate::status::Session;

/// A reset on its way, from the driver's wish to the status that reads 0. Clones are the same reset.
///
/// What the ended activation did under leases of its gate happened before the driver reads 0: the driver can then use
/// the memory of its rings and buffers for something else.
#[derive(Clone)]
pub struct Reset {
    link: Arc<Link>,
    gate: Arc<Gate>,
    session: Session,
}

impl Reset {
    /// Begins it: ends the activation behind `gate`. Never waits.
    pub fn begin(link: &Arc<Link>, gate: &Arc<Gate>) -> Reset {
        let session = link.begin_reset();
        gate.close();
        Reset {
            link: Arc::clone(link),
            gate: Arc::clone(gate),
            session,
        }
    }

    /// Whether it can be completed.
    pub fn is_drained(&self) -> bool {
        seeded!("reset_before_drain") || self.gate.is_drained()
    }

    /// Ready when it can be completed.
    pub async fn drained(&self) {
        if !self.is_drained() {
            self.gate.drained().await;
        }
    }

    /// Completes it: the status reads 0. Registers have to be as at power-on already.
    pub fn finish(&self) {
        self.link.finish_reset(self.session);
    }

    /// Whether both are one.
    pub fn is(&self, other: &Reset) -> bool {
        self.session == other.session
    }
}
