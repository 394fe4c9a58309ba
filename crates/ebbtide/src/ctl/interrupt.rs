// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ctrl-C, as something to look at between two steps.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Whether the user wants to stop; from its making until it is dropped, Ctrl-C does not end the process.
pub(super) struct Interrupt {
    seen: Arc<AtomicBool>,
    registered: Vec<SigId>,
}

impl Interrupt {
    pub(super) fn watch() -> io::Result<Self> {
        let seen = Arc::new(AtomicBool::new(false));
        let mut registered = Vec::new();
        for signal in [SIGINT, SIGTERM] {
            // The second one ends the process, should the first not be looked at.
            registered.push(signal_hook::flag::register_conditional_shutdown(
                signal,
                130,
                Arc::clone(&seen),
            )?);
            registered.push(signal_hook::flag::register(signal, Arc::clone(&seen))?);
        }
        Ok(Self { seen, registered })
    }

    pub(super) fn is_seen(&self) -> bool {
        self.seen.load(Ordering::Relaxed)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}
