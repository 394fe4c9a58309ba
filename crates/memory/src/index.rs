// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The index of a flat view: from an address to its section without a search.
//!
//! ```text
//!   address ──(octave, next bits)──► cell ──► Node ──(address >> shift)──► Entry
//! ```
//!
//! The top table divides every octave of the address space (2^n .. 2^(n+1)) into the same number
//! of cells, so that a 640 KiB hole and a DIMM that ends at 2^46 both find cells of fitting size
//! in a table of a few KiB. A cell names a node; a node divides its cell, up to the last border in
//! it, into slots as fine as the borders are aligned, so that each slot has one answer. Only when
//! a cell holds fine borders far from its start do some of its slots name further nodes.
//!
//! Pins go a shorter way: beside its node a cell names the *window* of the RAM that covers most
//! of it, and only what that window does not answer is looked up.
//!
//! Nodes of cells in which nothing changed are shared by successive views: a change copies the
//! top table and builds the nodes it touches.

mod solo;
mod view;
mod window;

pub(crate) use solo::Solo;
pub(crate) use view::View;
pub(crate) use window::{Place, Window};

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use crate::SectionKind;
use crate::flat::Flat;

/// log2 of the cells per octave.
const CELL_BITS: u32 = 6;
/// Cells that are copied together: a line or two of pointers is no less work than eight.
const CHUNK: usize = 64;
/// log2 of the address below which all cells have the same size.
const LOW_BITS: u32 = 16;
/// Slots of one node at most; above that, coarser slots with further nodes.
const MAX_SLOTS: u64 = 4096;
/// Slots of a node with further nodes.
const COARSE_SLOTS: u64 = 512;

/// Unit of the slots of a node, in bytes: 16 bits reach the last of `MAX_SLOTS` entries.
const UNIT: usize = 8;

/// The section is RAM or ROM.
pub(crate) const RAM: usize = 1;
/// Devices may not write.
pub(crate) const READONLY: usize = 2;
/// The entry names a further node.
const NODE: usize = 4;
/// All of them.
const KIND: usize = RAM | READONLY | NODE;

/// One answer of the index. Small: of a map of thousands of regions the entries are what does not fit into
/// the processor's nearest cache.
#[repr(C)]
pub(crate) struct Entry {
    /// Host address of address 0, were it in this section (wrapping).
    bias: u64,
    /// The `Flat`, or for `NODE` the node, and in the bits which its alignment leaves the kind. Null when
    /// nothing is mapped.
    to: *const u8,
}
const _: () = assert!(align_of::<Flat>() > KIND && align_of::<Head>() > KIND);

impl Entry {
    const UNMAPPED: Entry = Entry {
        bias: 0,
        to: ptr::null(),
    };

    fn section(flat: &Arc<Flat>) -> Entry {
        let section = &flat.section;
        let to: *const u8 = Arc::as_ptr(flat).cast();
        let mut entry = Entry { bias: 0, to };
        if let SectionKind::Ram {
            block,
            block_offset,
            readonly,
        } = &section.kind
        {
            let kind = RAM | if *readonly { READONLY } else { 0 };
            entry.to = to.wrapping_add(kind);
            let host = (block.host().as_ptr() as u64).wrapping_add(*block_offset);
            entry.bias = host.wrapping_sub(section.range.start);
        }
        entry
    }

    fn node(node: Node) -> Entry {
        let to = node.into_raw().cast::<u8>().wrapping_add(NODE);
        Entry { bias: 0, to }
    }

    /// `RAM` and `READONLY`.
    #[inline(always)]
    pub(crate) fn kind(&self) -> usize {
        self.to.addr() & KIND
    }

    #[inline(always)]
    fn is_node(&self) -> bool {
        self.to.addr() & NODE != 0
    }

    /// What `to` points to.
    #[inline(always)]
    fn target(&self) -> *const u8 {
        self.to.map_addr(|address| address & !KIND)
    }

    /// Last address of the section.
    #[inline(always)]
    pub(crate) fn last(&self) -> u64 {
        self.flat().section.range.end - 1
    }

    /// The host address of `address`.
    #[inline(always)]
    pub(crate) fn host(&self, address: u64) -> u64 {
        self.bias.wrapping_add(address)
    }

    /// The section as pins see it.
    #[inline(always)]
    pub(crate) fn window(&self) -> &Window {
        self.flat().window()
    }

    /// The section.
    #[inline(always)]
    pub(crate) fn flat(&self) -> &Flat {
        // SAFETY: not called for `NODE` or unmapped entries, which `View::lookup` never returns;
        // the view's `Flat`s outlive the view (M2).
        unsafe { &*self.target().cast() }
    }
}

/// Head of a node; its slots and its entries follow.
///
/// A slot (`u16`) is the distance of its entry from the head, in units of 8 bytes. Slots are
/// numbered through the whole address space: address `a` has slot `a >> shift`, and what lies
/// behind the last slot belongs to it.
#[repr(C)]
struct Head {
    /// Where slot 0 would be, were the node that long.
    slot_zero: *const u16,
    last_slot: u64,
    shift: u32,
    slot_count: u32,
    entry_count: u32,
}

/// An owned node.
pub(crate) struct Node(NonNull<Head>);

// SAFETY: a node is immutable from its making to its end; what it points to is kept alive by its
// view (M2).
unsafe impl Send for Node {}
// SAFETY: as above.
unsafe impl Sync for Node {}

impl Node {
    /// The layout of a node, and where its entries start, in bytes.
    fn layout(slots: usize, entries: usize) -> (Layout, usize) {
        let entry = size_of::<Entry>();
        let slots = (slots * size_of::<u16>()).next_multiple_of(align_of::<Entry>());
        let entries_at = size_of::<Head>() + slots;
        let layout = Layout::from_size_align(entries_at + entries * entry, 64);
        (
            layout.unwrap_or_else(|_| unreachable!("{slots} slots are too many")),
            entries_at,
        )
    }

    /// A node whose first slot has number `first_slot`; slots are indices of `entries`.
    fn new(first_slot: u64, shift: u32, slots: &[u16], entries: &[Entry]) -> Node {
        let (layout, entries_at) = Node::layout(slots.len(), entries.len());
        // SAFETY: the layout is not empty.
        let Some(memory) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout)
        };
        let head = Head {
            slot_zero: memory
                .as_ptr()
                .wrapping_add(size_of::<Head>())
                .cast::<u16>()
                .wrapping_sub(first_slot as usize),
            last_slot: first_slot + (slots.len() as u64 - 1),
            shift,
            slot_count: slots.len() as u32,
            entry_count: entries.len() as u32,
        };
        // SAFETY: head, slots and entries have their places in the layout just allocated. An
        // entry is plain data; what it names belongs to the node from here on.
        unsafe {
            memory.cast::<Head>().write(head);
            let to = memory.add(size_of::<Head>()).cast::<u16>();
            for (at, slot) in slots.iter().enumerate() {
                let distance = entries_at + usize::from(*slot) * size_of::<Entry>();
                to.add(at).write((distance / UNIT) as u16);
            }
            let to = memory.add(entries_at).cast::<Entry>();
            to.copy_from_nonoverlapping(NonNull::from(entries).cast(), entries.len());
        }
        Node(memory.cast())
    }

    fn into_raw(self) -> *const Head {
        let head = self.0.as_ptr();
        std::mem::forget(self);
        head
    }

    /// A node that shows nothing.
    fn empty() -> Node {
        Node::new(0, 63, &[0, 0], &[Entry::UNMAPPED])
    }

    /// A node for the addresses `first..=last` (a power of two of them, aligned), of which
    /// `flats` (sorted, all of them touching the range) show parts.
    fn build(first: u64, last: u64, flats: &[Arc<Flat>]) -> Node {
        let (high, align) = borders(first, last, flats);
        let mut shift = align.trailing_zeros();
        if (high - first) >> shift >= MAX_SLOTS {
            while (high - first) >> shift >= COARSE_SLOTS {
                shift += 1;
            }
        }
        let count = ((high - first) >> shift) + 1;
        let mut entries = vec![Entry::UNMAPPED];
        let mut slots = Vec::with_capacity(count as usize);
        let mut at = 0;
        let mut shown = None;
        for slot in 0..count {
            let from = first + (slot << shift);
            // The last slot covers all the rest; a further node needs a power of two.
            let to = from + ((1 << shift) - 1);
            while flats
                .get(at)
                .is_some_and(|flat| flat.section.range.end <= from)
            {
                at += 1;
            }
            let end = at + flats[at..].partition_point(|flat| flat.section.range.start <= to);
            let index = match &flats[at..end] {
                [] => 0,
                [flat] if covers(flat, from, to) => {
                    if shown != Some(at) {
                        entries.push(Entry::section(flat));
                        shown = Some(at);
                    }
                    entries.len() - 1
                }
                inside => {
                    entries.push(Entry::node(Node::build(from, to, inside)));
                    // The section may go on behind the further node.
                    shown = None;
                    entries.len() - 1
                }
            };
            slots.push(index as u16);
        }
        let rest = first
            .checked_add(count << shift)
            .filter(|rest| *rest <= last);
        if let Some(rest) = rest.filter(|_| shift > align.trailing_zeros()) {
            // The last slot has borders inside, so what follows them needs a slot of its own.
            let after = flats.iter().find(|flat| flat.section.range.contains(&rest));
            let index = after.map_or(0, |flat| {
                entries.push(Entry::section(flat));
                entries.len() - 1
            });
            slots.push(index as u16);
        }
        Node::new(first >> shift, shift, &slots, &entries)
    }

    fn head(&self) -> &Head {
        // SAFETY: valid from `new` to `drop`.
        unsafe { self.0.as_ref() }
    }

    /// The entries.
    fn entries(&self) -> &[Entry] {
        let head = self.head();
        let (_, entries_at) = Node::layout(head.slot_count as usize, head.entry_count as usize);
        // SAFETY: written by `new`.
        unsafe {
            let entries = self.0.byte_add(entries_at).cast::<Entry>();
            std::slice::from_raw_parts(entries.as_ptr(), head.entry_count as usize)
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let head = self.head();
        let (layout, _) = Node::layout(head.slot_count as usize, head.entry_count as usize);
        for entry in self.entries().iter().filter(|entry| entry.is_node()) {
            // SAFETY: made by `Entry::node`, owned by this entry alone.
            drop(Node(unsafe {
                NonNull::new_unchecked(entry.target().cast_mut().cast())
            }));
        }
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.0.as_ptr().cast(), layout) };
    }
}

fn covers(flat: &Flat, first: u64, last: u64) -> bool {
    flat.section.range.start <= first && flat.section.range.end > last
}

/// The window of the RAM that covers most of `first..=last`.
fn largest(flats: &[Arc<Flat>], first: u64, last: u64) -> *const Window {
    let covered = |flat: &Flat| {
        let range = &flat.section.range;
        (range.end - 1).min(last) - range.start.max(first)
    };
    let ram = flats.iter().filter(|flat| flat.block().is_some());
    let flat = ram.max_by_key(|flat| covered(flat));
    flat.map_or(Window::none(), |flat| flat.window())
}

/// The highest border inside `first..=last` (a border at `first` is none), and all of them
/// or-ed. There is at least one.
fn borders(first: u64, last: u64, flats: &[Arc<Flat>]) -> (u64, u64) {
    let (mut high, mut all) = (0, 0);
    for flat in flats {
        for border in [flat.section.range.start, flat.section.range.end] {
            if border > first && border <= last {
                high = high.max(border);
                all |= border;
            }
        }
    }
    (high, all)
}

/// Number of the first cell: numbers grow with the addresses, and what they start from is chosen
/// for the cheapest look-up.
const FIRST_CELL: usize = ((LOW_BITS - CELL_BITS) as usize) << CELL_BITS;

/// The number of the cell that covers `address`.
#[inline(always)]
fn cell_of(address: u64) -> usize {
    let shift = top_bit(address >> CELL_BITS | 1 << (LOW_BITS - CELL_BITS));
    ((shift << CELL_BITS) + (address >> shift)) as usize
}

/// The number of the highest bit set, of which there is one.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
fn top_bit(mut value: u64) -> u64 {
    // What `leading_zeros` compiles to leaves its target register as it was for 0, and so waits
    // for whatever computed it: here the look-up before, which makes look-ups wait for each other
    // (9 ns instead of 1). With source and target the same there is nothing to wait for.
    // SAFETY: computes on one register.
    unsafe {
        std::arch::asm!("bsr {0}, {0}", inout(reg) value, options(pure, nomem, nostack));
    }
    value
}

/// The number of the highest bit set, of which there is one.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
#[inline(always)]
fn top_bit(value: u64) -> u64 {
    (63 - value.leading_zeros()).into()
}

/// First and last address of a cell.
fn cell_range(cell: usize) -> (u64, u64) {
    let cell = (cell - FIRST_CELL) as u64;
    let (row, column) = (cell >> CELL_BITS, cell & ((1 << CELL_BITS) - 1));
    let (octave, column) = if row == 0 {
        (LOW_BITS, column)
    } else {
        (LOW_BITS + row as u32 - 1, column + (1 << CELL_BITS))
    };
    let shift = octave - CELL_BITS;
    (column << shift, (column << shift) + ((1 << shift) - 1))
}

/// The writer's side: owns the nodes of the current view.
pub(crate) struct Index {
    /// Names it among all of the process.
    id: u64,
    /// Counts updates.
    version: u64,
    empty: Node,
    /// Per cell of the top table its node, unless it is `empty` or a section's own.
    nodes: Vec<Option<Node>>,
    cells: Vec<*const Head>,
    windows: Vec<*const Window>,
    /// By `CHUNK` cells, the update that changed one of them last.
    changed: Vec<u64>,
}

// SAFETY: the pointers name nodes owned by the index or by `Flat`s of the same address space
// (M2).
unsafe impl Send for Index {}

/// What a new view no longer shows; freed after a grace period.
#[derive(Default)]
pub(crate) struct OldNodes {
    _nodes: SmallVec<[Node; 1]>,
}

impl Index {
    pub(crate) fn new() -> Index {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Index {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            version: 0,
            empty: Node::empty(),
            nodes: Vec::new(),
            cells: Vec::new(),
            windows: Vec::new(),
            changed: Vec::new(),
        }
    }

    /// The view as it stands, made of one that no reader sees any more: of one of this index what
    /// has changed since is copied.
    pub(crate) fn view(&self, spare: Option<Box<View>>) -> Box<View> {
        let mut view = spare.unwrap_or_else(|| Box::new(View::empty()));
        view.show(self);
        view
    }

    /// Brings the index up to date with `flats` (all sections, sorted), which differ from those
    /// of the last update within `changed` only. The sections that went must live until the
    /// grace period that frees the old nodes.
    pub(crate) fn update(&mut self, flats: &[Arc<Flat>], changed: &[Range<u64>]) -> OldNodes {
        let last = flats.last().map(|flat| cell_of(flat.section.range.end - 1));
        let end = last.map_or(FIRST_CELL, |last| last + 1);
        let length = end - FIRST_CELL;
        self.version += 1;
        if length != self.cells.len() {
            let same = length.min(self.cells.len()) / CHUNK;
            self.changed.truncate(same);
            self.changed.resize(length.div_ceil(CHUNK), self.version);
        }
        let mut old = SmallVec::new();
        if length < self.nodes.len() {
            old.extend(self.nodes.drain(length..).flatten());
        }
        self.nodes.resize_with(length, || None);
        self.cells.resize(length, self.empty.0.as_ptr());
        self.windows.resize(length, Window::none());
        let mut done = FIRST_CELL;
        for range in changed {
            let cells = cell_of(range.start).max(done)..end.min(cell_of(range.end - 1) + 1);
            done = done.max(cells.end);
            if !cells.is_empty() {
                let (first, last) = (cells.start - FIRST_CELL, cells.end - 1 - FIRST_CELL);
                self.changed[first / CHUNK..=last / CHUNK].fill(self.version);
            }
            let mut cell = cells.start;
            while cell < cells.end {
                cell = self.update_run(flats, cell..cells.end, &mut old);
            }
        }
        OldNodes { _nodes: old }
    }

    /// Brings the first of `cells` up to date, and those behind it that show the same: one section
    /// and nothing else, or nothing. Returns the number of the first that is left.
    fn update_run(
        &mut self,
        flats: &[Arc<Flat>],
        cells: Range<usize>,
        old: &mut SmallVec<[Node; 1]>,
    ) -> usize {
        let (from, to) = cell_range(cells.start);
        let start = flats.partition_point(|flat| flat.section.range.end <= from);
        let empty = self.empty.0.as_ptr().cast_const();
        let (head, window, next) = match flats.get(start) {
            Some(flat) if covers(flat, from, to) => {
                let window = largest(std::slice::from_ref(flat), from, to);
                (flat.solo().head(), window, flat.section.range.end)
            }
            Some(flat) if flat.section.range.start <= to => {
                let count = flats[start..].partition_point(|flat| flat.section.range.start <= to);
                let inside = &flats[start..start + count];
                let node = Node::build(from, to, inside);
                let at = cells.start - FIRST_CELL;
                self.cells[at] = node.0.as_ptr();
                self.windows[at] = largest(inside, from, to);
                old.extend(self.nodes[at].replace(node));
                return cells.start + 1;
            }
            Some(flat) => (empty, Window::none() as _, flat.section.range.start),
            None => (empty, Window::none() as _, u64::MAX),
        };
        // The cell of what comes next shows more than this.
        let end = cells.end.min(cell_of(next)).max(cells.start + 1);
        let run = cells.start - FIRST_CELL..end - FIRST_CELL;
        self.cells[run.clone()].fill(head);
        self.windows[run.clone()].fill(window);
        old.extend(self.nodes[run].iter_mut().filter_map(Option::take));
        end
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
