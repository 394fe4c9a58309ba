// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Address spaces, and what a CPU's loads and stores do in them.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::dispatch::{self, Bytes, OnError};
use crate::guard::ReadGuard;
use crate::index::View;
use crate::reader::here::{self, HomeRow};
use crate::reader::hub::Hub;
use crate::reader::published::Published;
use crate::reader::row::Row;
use crate::{Error, FlatSection, Gpa, Listener, ListenerId, Memory, Reader};

/// A root region as CPUs and devices see it: memory, port I/O, a device's bus-master view.
pub struct AddressSpace {
    /// Replaced with every change.
    view: Published<View>,
    hub: &'static Hub,
    id: u64,
    name: String,
    memory: Arc<Memory>,
}

impl AddressSpace {
    pub(crate) fn new(
        memory: Arc<Memory>,
        id: u64,
        name: &str,
        view: Box<View>,
    ) -> Arc<AddressSpace> {
        let view = Published::new(view);
        let hub = memory.grace_worker().hub();
        Arc::new(AddressSpace {
            view,
            hub,
            id,
            name: name.to_owned(),
            memory,
        })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The memory it belongs to.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Opens a read section on the current view. Close it, by dropping the guard, before anything
    /// that can block: every grace period waits for it.
    ///
    /// # Panics
    /// When `reader` is registered with another memory.
    #[inline(always)]
    pub fn read<'r>(&self, reader: &'r Reader) -> ReadGuard<'r> {
        assert!(
            ptr::eq(reader.hub(), self.hub),
            "a reader of another memory"
        );
        reader.enter();
        // SAFETY: the section just opened lasts as long as the guard, which borrows the reader
        // (M2).
        let view = unsafe { self.view.get() };
        ReadGuard::new(reader, view, self)
    }

    /// Calls `f` with the current view, in a read section of the calling thread's row.
    ///
    /// # Panics
    /// When the row is one of another memory.
    #[cfg_attr(not(feature = "vm-memory"), allow(dead_code))]
    #[inline(always)]
    pub(crate) fn in_section<T>(&self, home: HomeRow<'_>, f: impl FnOnce(&View) -> T) -> T {
        struct Open(&'static Row);
        impl Drop for Open {
            #[inline(always)]
            fn drop(&mut self) {
                self.0.leave();
            }
        }
        assert!(ptr::eq(home.hub(), self.hub), "a reader of another memory");
        home.row().enter(self.hub);
        let _open = Open(home.row());
        // SAFETY: the section just opened lasts until `f` has returned (M2).
        f(unsafe { self.view.get() })
    }

    /// The calling thread's row, if it keeps one (see `reader::here`).
    #[cfg_attr(not(feature = "vm-memory"), allow(dead_code))]
    #[inline(always)]
    pub(crate) fn home_row(&self) -> Option<HomeRow<'_>> {
        here::row(self.hub)
    }

    /// Whether a section sees the newest view.
    pub(crate) fn is_current(&self, view: &View) -> bool {
        ptr::eq(self.view.as_ptr(), view)
    }

    /// Replaces the view; the old one must live until after a grace period.
    pub(crate) fn publish(&self, view: Box<View>) -> Box<View> {
        self.view.replace(view)
    }

    /// The sections of the current view, by address.
    ///
    /// # Errors
    /// `Reentrant` from within a change.
    pub fn sections(&self) -> Result<Vec<FlatSection>, Error> {
        let mut guard = self.memory.lock_tree()?;
        let state = guard.tree.space(self.id);
        Ok(state.map(|state| state.sections()).unwrap_or_default())
    }

    /// Adds a listener and shows it the current view. Listeners of lower priority hear of
    /// additions first, and of removals last.
    ///
    /// # Errors
    /// `Listener` when it refuses a part of the view; it has then seen everything taken back.
    /// `Reentrant` from within a change.
    pub fn add_listener(
        &self,
        listener: Box<dyn Listener>,
        priority: i32,
    ) -> Result<ListenerId, Error> {
        let mut guard = self.memory.lock_tree()?;
        let id = guard.tree.new_listener_id();
        let Some(state) = guard.tree.space(self.id) else {
            return Err(Error::Foreign(self.name.clone()));
        };
        let added = state.add_listener(id, listener, priority);
        added.map_err(|source| Error::Listener {
            space: self.name.clone(),
            source,
        })?;
        Ok(id)
    }

    /// Removes a listener: it sees everything go. `None` when there is no such listener, or from
    /// within a change.
    pub fn remove_listener(&self, id: ListenerId) -> Option<Box<dyn Listener>> {
        let mut guard = self.memory.lock_tree().ok()?;
        guard.tree.space(self.id)?.remove_listener(id)
    }

    /// What a CPU's load of `size` bytes (1 to 8) gives: RAM, or device registers, called outside
    /// the section in the pieces their rules want; all ones where nothing answers.
    pub fn load(&self, reader: &Reader, addr: u64, size: u8) -> u64 {
        let size = usize::from(size.min(8));
        let mut bytes = [0; 8];
        let into = Bytes::Load(&mut bytes[..size]);
        // A CPU is not told: what does not answer is all ones already.
        let _ = dispatch::transfer(self, reader, addr, into, OnError::GoOn);
        u64::from_le_bytes(bytes)
    }

    /// What a CPU's store of `size` bytes (1 to 8) does; dropped by ROM and where nothing
    /// answers.
    pub fn store(&self, reader: &Reader, addr: u64, size: u8, value: u64) {
        let size = usize::from(size.min(8));
        let from = value.to_le_bytes();
        let from = Bytes::Store(&from[..size]);
        // As above: what is refused is dropped already.
        let _ = dispatch::transfer(self, reader, addr, from, OnError::GoOn);
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // Sections may still use the view: it is handed on to be freed after a grace period.
        let view = self.view.replace(Box::new(View::empty()));
        self.memory.space_dropped(self.id, view);
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Gpa {
    /// The address as a plain number.
    pub(crate) fn raw(self) -> u64 {
        self.0
    }
}
