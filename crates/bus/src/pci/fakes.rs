// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests of this module put around it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::irq::{IrqError, MsiController, MsiMessage, MsiRoute};

/// Remembers what its routes delivered.
#[derive(Default)]
pub(super) struct FakeController {
    pub(super) routes: Mutex<Vec<Arc<FakeRoute>>>,
    pub(super) limit: Option<usize>,
}

#[derive(Default)]
pub(super) struct FakeRoute {
    state: Mutex<RouteState>,
    pub(super) refuse: AtomicBool,
}

#[derive(Default)]
struct RouteState {
    message: Option<MsiMessage>,
    delivered: Vec<MsiMessage>,
    programmed: usize,
}

impl MsiController for FakeController {
    fn route(&self) -> Result<Arc<dyn MsiRoute>, IrqError> {
        let mut routes = self.routes.lock().unwrap();
        match self.limit {
            Some(limit) if routes.len() >= limit => Err(IrqError::Exhausted { limit }),
            _ => {
                let route = Arc::new(FakeRoute::default());
                routes.push(route.clone());
                Ok(route)
            }
        }
    }
}

impl FakeController {
    pub(super) fn route_of(&self, vector: usize) -> Arc<FakeRoute> {
        self.routes.lock().unwrap()[vector].clone()
    }
}

impl FakeRoute {
    /// The messages delivered since the last call.
    pub(super) fn delivered(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.state.lock().unwrap().delivered)
    }

    /// How often the route was programmed since the last call.
    pub(super) fn programmed(&self) -> usize {
        std::mem::take(&mut self.state.lock().unwrap().programmed)
    }

    pub(super) fn message(&self) -> Option<MsiMessage> {
        self.state.lock().unwrap().message
    }
}

impl MsiRoute for FakeRoute {
    fn program(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        let mut state = self.state.lock().unwrap();
        state.programmed += 1;
        if self.refuse.load(Ordering::SeqCst) {
            state.message = None;
            return Err(IrqError::host(
                "route an interrupt",
                std::io::ErrorKind::Other,
            ));
        }
        state.message = message;
        Ok(())
    }

    fn signal(&self) {
        let mut state = self.state.lock().unwrap();
        let message = state.message;
        state.delivered.extend(message);
    }
}
