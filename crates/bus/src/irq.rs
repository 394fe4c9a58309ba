// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a device reaches the guest's interrupt controllers.
//!
//! The traits are implemented by the hypervisor (in-kernel interrupt chips) and by test doubles; devices and buses only
//! ever hold them. Every call may come from any thread, must not block and must not take a lock that a vCPU could hold
//! while it waits for a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

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

/// Several sources that share one level-triggered line: the line is high as long as any source is.
///
/// Up to 8 sources; [`source`](Self::source) hands out one [`IrqLine`] for each.
pub struct SharedLine {
    line: Arc<dyn IrqLine>,
    level: std::sync::Mutex<u8>,
    next: AtomicU8,
}

impl SharedLine {
    /// Wraps the input pin `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            line,
            level: std::sync::Mutex::new(0),
            next: AtomicU8::new(0),
        })
    }

    /// A further source of the line, or `None` when all 8 are taken.
    pub fn source(self: &Arc<Self>) -> Option<Arc<dyn IrqLine>> {
        let bit = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < 8).then(|| n + 1)
            })
            .ok()?;
        Some(Arc::new(SharedSource {
            shared: Arc::clone(self),
            mask: 1 << bit,
        }))
    }

    fn set(&self, mask: u8, high: bool) {
        // The line is driven under the lock: two sources changing at once must not leave it at a stale level.
        let mut level = self
            .level
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let was = *level != 0;
        *level = if high { *level | mask } else { *level & !mask };
        let is = *level != 0;
        if was != is {
            self.line.set(is);
        }
    }
}

struct SharedSource {
    shared: Arc<SharedLine>,
    mask: u8,
}

impl IrqLine for SharedSource {
    fn set(&self, high: bool) {
        self.shared.set(self.mask, high);
    }
}

impl Drop for SharedSource {
    fn drop(&mut self) {
        // A source that goes away must not hold the line up for the others.
        self.shared.set(self.mask, false);
    }
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
    fn shared_line_is_high_while_any_source_is() {
        let pin = Arc::new(Pin::default());
        let shared = SharedLine::new(pin.clone());
        let (a, b) = (shared.source().unwrap(), shared.source().unwrap());
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(*pin.0.lock().unwrap(), [true]);
        drop(b);
        assert_eq!(*pin.0.lock().unwrap(), [true, false]);
    }

    #[test]
    fn shared_line_has_eight_sources() {
        let shared = SharedLine::new(Arc::new(Pin::default()));
        let sources: Vec<_> = (0..8).map(|_| shared.source().unwrap()).collect();
        assert!(shared.source().is_none());
        assert_eq!(sources.len(), 8);
    }

    #[test]
    fn pulse_ends_low() {
        let pin = Pin::default();
        pulse(&pin);
        assert_eq!(*pin.0.lock().unwrap(), [true, false]);
    }
}
