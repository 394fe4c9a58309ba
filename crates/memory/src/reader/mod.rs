// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registered readers: read sections that cost two plain stores, and grace periods that wait
//! for them.

pub(crate) mod barrier;
pub(crate) mod counters;
#[cfg_attr(not(feature = "vm-memory"), allow(dead_code))]
pub(crate) mod here;
pub(crate) mod hub;
pub(crate) mod published;
pub(crate) mod row;
pub(crate) mod wake;

use std::marker::PhantomData;
use std::sync::Arc;

use crate::Memory;
use hub::Hub;
use row::Row;

/// A thread's right to open read sections of one [`Memory`].
///
/// Neither `Send` nor `Sync`: it names the row of the thread that registered it. Keep it for as
/// long as the thread uses the memory; [`Memory::register`] again gives the same row.
pub struct Reader {
    memory: Arc<Memory>,
    hub: &'static Hub,
    row: &'static Row,
    _thread: PhantomData<*const ()>,
}

impl Reader {
    pub(crate) fn new(memory: Arc<Memory>, hub: &'static Hub) -> Reader {
        let row = hub.adopt(row::make_token(), thread_name);
        Reader {
            memory,
            hub,
            row,
            _thread: PhantomData,
        }
    }

    /// The memory it reads.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Whether a read section is open on this thread.
    pub fn in_section(&self) -> bool {
        self.row.in_section()
    }

    #[inline(always)]
    pub(crate) fn hub(&self) -> &'static Hub {
        self.hub
    }

    #[inline(always)]
    pub(crate) fn row(&self) -> &'static Row {
        self.row
    }

    #[inline(always)]
    pub(crate) fn enter(&self) {
        self.row.enter(self.hub);
    }

    #[inline(always)]
    pub(crate) fn leave(&self) {
        self.row.leave();
    }
}

/// What the calling thread is called in reports.
fn thread_name() -> String {
    let thread = std::thread::current();
    thread.name().unwrap_or("unnamed thread").to_owned()
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.hub.disown(self.row);
    }
}
