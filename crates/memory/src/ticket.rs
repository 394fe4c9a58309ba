// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unplug tickets.

use std::future::Future;
use std::time::Duration;

use crate::Error;

/// How far an unplug is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The change that unplugs has not been published (or was taken back).
    Live,
    /// No new section finds the memory; sections that did may run.
    Unpublished,
    /// Only pins and holds are left.
    Draining,
    /// Nobody is left.
    Drained,
    /// The memory is given back.
    Gone,
}

/// Who keeps memory that is to be unplugged.
#[derive(Clone, Debug)]
pub struct Holder {
    /// Thread or external mapper.
    pub what: String,
    /// How many.
    pub count: u64,
    /// At least this old.
    pub age: Duration,
}

/// The unplug of one RAM region.
pub struct Ticket {}

impl Ticket {
    /// How far it is.
    pub fn phase(&self) -> Phase {
        todo!()
    }
    /// Ready when drained.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        async { todo!() }
    }
    /// Ready when the phase is `phase` or later.
    pub fn reached(&self, _phase: Phase) -> impl Future<Output = ()> + Send + 'static {
        async { todo!() }
    }
    /// Who is left.
    pub fn holders(&self) -> Vec<Holder> {
        todo!()
    }
    /// Time since the memory was unpublished.
    pub fn age(&self) -> Duration {
        todo!()
    }
    /// Gives the memory back; may block.
    pub fn destroy(self) -> Result<(), (Ticket, Error)> {
        todo!()
    }
}
