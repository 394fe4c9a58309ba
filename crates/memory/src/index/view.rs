// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Views: what readers look addresses up in.

use std::hint::cold_path;
use std::ptr;

use super::{CHUNK, Entry, FIRST_CELL, Head, Index, Place, UNIT, Window, cell_of};
use crate::Access;

/// An immutable view: the top table. The nodes belong to the [`Index`].
pub(crate) struct View {
    /// Where cell 0 would be.
    cell_zero: *const *const Head,
    /// The same of `windows`.
    window_zero: *const *const Window,
    /// Number of the first cell that the table lacks.
    pub(super) end: usize,
    unmapped: Entry,
    /// The index it is of, and that index's version.
    of: (u64, u64),
    /// What `cell_zero` points into.
    cells: Vec<*const Head>,
    /// By cell, the window of the RAM that covers most of it: one look at it answers nearly all
    /// pins, without the node.
    windows: Vec<*const Window>,
}

// SAFETY: immutable; what it points to is kept alive by its index until after its grace period
// (M2).
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// A view that shows nothing.
    pub(crate) fn empty() -> View {
        let mut view = View {
            cell_zero: ptr::null(),
            window_zero: ptr::null(),
            end: FIRST_CELL,
            unmapped: Entry::UNMAPPED,
            of: (0, 0),
            cells: Vec::new(),
            windows: Vec::new(),
        };
        view.settle();
        view
    }

    /// Makes it show what `index` says. Nobody else knows the view.
    pub(super) fn show(&mut self, index: &Index) {
        let (id, version) = std::mem::replace(&mut self.of, (index.id, index.version));
        let known = if id == index.id { self.cells.len() } else { 0 };
        let kept = known.min(index.cells.len());
        self.cells.truncate(kept);
        self.windows.truncate(kept);
        for (chunk, changed) in index.changed.iter().enumerate() {
            let cells = (chunk * CHUNK).min(kept)..((chunk + 1) * CHUNK).min(kept);
            if *changed > version && !cells.is_empty() {
                self.cells[cells.clone()].copy_from_slice(&index.cells[cells.clone()]);
                self.windows[cells.clone()].copy_from_slice(&index.windows[cells]);
            }
        }
        self.cells.extend_from_slice(&index.cells[kept..]);
        self.windows.extend_from_slice(&index.windows[kept..]);
        debug_assert!(self.cells == index.cells && self.windows == index.windows);
        self.settle();
    }

    /// The tables are where they are from here on.
    fn settle(&mut self) {
        self.cell_zero = self.cells.as_ptr().wrapping_sub(FIRST_CELL);
        self.window_zero = self.windows.as_ptr().wrapping_sub(FIRST_CELL);
        self.end = FIRST_CELL + self.cells.len();
    }

    /// The place of `len` bytes of RAM at `address`, if there is nothing special about them:
    /// `None` says that [`View::lookup`] must be asked. In a read section.
    #[inline(always)]
    pub(crate) fn place(&self, address: u64, len: u64, access: Access) -> Option<Place> {
        let cell = cell_of(address);
        if cell >= self.end {
            return None;
        }
        // SAFETY: as in `first`; the window belongs to a section of this view (M2), or is static.
        let window = unsafe { &**self.window_zero.wrapping_add(cell) };
        window.place(address, len, access)
    }

    /// What answers at `address`.
    ///
    /// The caller is in a read section in which it loaded the view (M2).
    #[inline(always)]
    pub(crate) fn lookup(&self, address: u64) -> Option<&Entry> {
        let mut entry = self.first(address);
        if entry.is_node() {
            entry = View::further(entry, address);
        }
        (!entry.to.is_null()).then_some(entry)
    }

    /// The first entry on the way to `address`: nearly always the last one, too.
    #[inline(always)]
    fn first(&self, address: u64) -> &Entry {
        let cell = cell_of(address);
        if cell >= self.end {
            cold_path();
            return &self.unmapped;
        }
        // SAFETY: no address has a cell below the first, and this one is below the end. The node
        // belongs to this view and outlives the section (M2).
        unsafe { View::step(*self.cell_zero.wrapping_add(cell), address) }
    }

    /// Follows further nodes.
    #[cold]
    #[inline(never)]
    fn further(mut entry: &Entry, address: u64) -> &Entry {
        while entry.is_node() {
            // SAFETY: a node entry names a node of the same view (M2), which covers the address.
            entry = unsafe { View::step(entry.target().cast(), address) };
        }
        entry
    }

    /// The entry of a node for an address at or behind its first.
    ///
    /// # Safety
    /// The node is alive for the lifetime of the result.
    #[inline(always)]
    unsafe fn step<'a>(head: *const Head, address: u64) -> &'a Entry {
        // SAFETY: the slot is clamped to the node's last, and each slot is the distance of an
        // entry of the node.
        unsafe {
            let node = &*head;
            let slot = (address >> (node.shift & 63)).min(node.last_slot);
            let distance = *node.slot_zero.wrapping_add(slot as usize);
            &*head.byte_add(usize::from(distance) * UNIT).cast::<Entry>()
        }
    }
}
