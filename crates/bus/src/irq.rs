// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a device reaches the guest's interrupt controllers.
//!
//! The traits are implemented by the hypervisor (in-kernel interrupt chips) and by test doubles; devices and buses only
//! ever hold them. Every call may come from any thread, must not block and must not take a lock that a vCPU could hold
//! while it waits for a device.

use std::sync::Arc;

/// The memory write that is an MSI: what a guest programmed into a vector (PCI 3.0, 6.8.1.3 and 6.8.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Message address, both dwords.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Hands out message-signalled interrupt routes.
pub trait MsiController: Send + Sync {
    /// Allocates a route. It holds no message yet.
    ///
    /// # Errors
    /// The host has no route (GSI, eventfd) left or refused it.
    fn route(&self) -> Result<Arc<dyn MsiRoute>, IrqError>;
}

/// One message-signalled interrupt source. Dropping the last reference gives its host resources back.
pub trait MsiRoute: Send + Sync {
    /// Sets what [`signal`](Self::signal) delivers from now on; `None` makes it deliver nothing.
    ///
    /// # Errors
    /// The host refused the message. The route then delivers nothing.
    fn program(&self, message: Option<MsiMessage>) -> Result<(), IrqError>;

    /// Delivers the programmed message once. Without one the signal is dropped: the caller keeps its own pending bits.
    fn signal(&self);
}

/// One input pin of an interrupt controller.
///
/// For an edge-triggered input a transition from low to high is the interrupt; for a level-triggered one the input
/// requests service as long as it is high. Setting the level it already has is allowed and has no effect.
pub trait IrqLine: Send + Sync {
    /// Drives the line.
    fn set(&self, high: bool);
}

/// Raises an edge-triggered line: low to high and back.
pub fn pulse(line: &dyn IrqLine) {
    line.set(true);
    line.set(false);
}

/// Why an interrupt could not be routed.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// No interrupt source is left.
    #[error("no interrupt source left: all {limit} are in use")]
    Exhausted {
        /// How many there are.
        limit: usize,
    },
    /// The host refused the operation named.
    #[error("{operation}: {source}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

impl IrqError {
    /// The host refused `operation` with `source`.
    pub fn host(operation: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self::Host {
            operation,
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Pin(Mutex<Vec<bool>>);
    impl IrqLine for Pin {
        fn set(&self, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }

    #[test]
    fn pulse_ends_low() {
        let pin = Pin::default();
        pulse(&pin);
        assert_eq!(*pin.0.lock().unwrap(), [true, false]);
    }
}
