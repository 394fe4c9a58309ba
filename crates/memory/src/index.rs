// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The index of a flat view: from an address to its section without a search.
//!
//! ```text
//!   address ──(octave, next bits)──► cell ──► Node ──((address - base) >> shift)──► Entry
//! ```
//!
//! The top table divides every octave of the address space (2^n .. 2^(n+1)) into the same number
//! of cells, so that a 640 KiB hole and a DIMM that ends at 2^46 both find cells of fitting size
//! in a table of a few KiB. A cell names a node; a node covers the borders inside its cell with
//! slots as fine as the borders are aligned, exactly, so that each slot has one answer. Only
//! when a cell holds fine borders far apart do some of its slots name further nodes.
//!
//! Nodes of cells in which nothing changed are shared by successive views: a change copies the
//! top table and builds the nodes it touches.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use crate::SectionKind;
use crate::flat::Flat;

/// log2 of the cells per octave.
const CELL_BITS: u32 = 6;
/// log2 of the address below which all cells have the same size.
const LOW_BITS: u32 = 12;
/// Slots of one node at most; above that, coarser slots with further nodes.
const MAX_SLOTS: u64 = 4096;
/// Slots of a node with further nodes.
const COARSE_SLOTS: u64 = 512;

/// The section is RAM or ROM.
pub(crate) const RAM: u32 = 1;
/// Devices may not write.
pub(crate) const READONLY: u32 = 2;
/// A pin must ask the plugged bitmap.
pub(crate) const SPARSE: u32 = 4;
/// The entry names a further node.
const NODE: u32 = 8;
/// Registers or a reservation.
pub(crate) const OTHER: u32 = 16;

/// One answer of the index.
#[repr(C)]
pub(crate) struct Entry {
    /// Host address of address 0, were it in this section (wrapping).
    bias: u64,
    /// Last address of the section.
    pub(crate) last: u64,
    /// The `Flat`; for `NODE`, the node.
    to: *const u8,
    pub(crate) slot: u32,
    /// 0 when nothing is mapped.
    pub(crate) kind: u32,
}

impl Entry {
    const UNMAPPED: Entry = Entry {
        bias: 0,
        last: 0,
        to: ptr::null(),
        slot: 0,
        kind: 0,
    };

    fn section(flat: &Arc<Flat>) -> Entry {
        let section = &flat.section;
        let (mut kind, mut slot, mut bias) = (OTHER, 0, 0);
        if let SectionKind::Ram {
            block,
            block_offset,
            readonly,
        } = &section.kind
        {
            kind = RAM
                | if *readonly { READONLY } else { 0 }
                | if flat.is_sparse() { SPARSE } else { 0 };
            slot = block.slot();
            bias = (block.host().as_ptr() as u64)
                .wrapping_add(*block_offset)
                .wrapping_sub(section.range.start);
        }
        Entry {
            bias,
            last: section.range.end - 1,
            to: Arc::as_ptr(flat).cast(),
            slot,
            kind,
        }
    }

    fn node(node: Node) -> Entry {
        Entry {
            bias: 0,
            last: 0,
            to: node.into_raw().cast(),
            slot: 0,
            kind: NODE,
        }
    }

    /// The host address of `address`.
    #[inline(always)]
    pub(crate) fn host(&self, address: u64) -> u64 {
        self.bias.wrapping_add(address)
    }

    /// The section.
    #[inline(always)]
    pub(crate) fn flat(&self) -> &Flat {
        // SAFETY: not called for `NODE` or unmapped entries, which `View::lookup` never returns;
        // the view's `Flat`s outlive the view (I2).
        unsafe { &*self.to.cast() }
    }
}

/// Head of a node; its slots (`u16` indices of entries) follow, then its entries.
#[repr(C)]
struct Head {
    /// Address of the first slot; what lies before belongs to it as well.
    base: u64,
    shift: u32,
    /// Index of the last slot; what lies behind belongs to it as well.
    last_slot: u32,
    entries: *const Entry,
    entry_count: usize,
}

/// An owned node.
pub(crate) struct Node(NonNull<Head>);

// SAFETY: a node is immutable from its making to its end; what it points to is kept alive by its
// view (I2).
unsafe impl Send for Node {}
// SAFETY: as above.
unsafe impl Sync for Node {}

impl Node {
    fn layout(slots: usize, entries: usize) -> (Layout, usize, usize) {
        let sizes = || {
            let (layout, slots_at) = Layout::new::<Head>().extend(Layout::array::<u16>(slots)?)?;
            let (layout, entries_at) = layout.extend(Layout::array::<Entry>(entries)?)?;
            Ok::<_, std::alloc::LayoutError>((
                layout.align_to(64)?.pad_to_align(),
                slots_at,
                entries_at,
            ))
        };
        sizes().unwrap_or_else(|_| unreachable!("a node has at most {} slots", MAX_SLOTS))
    }

    fn new(base: u64, shift: u32, slots: &[u16], entries: Vec<Entry>) -> Node {
        let (layout, slots_at, entries_at) = Node::layout(slots.len(), entries.len());
        debug_assert_eq!(slots_at, size_of::<Head>());
        // SAFETY: the layout is not empty.
        let Some(memory) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout)
        };
        // SAFETY: the offsets come from the layout just allocated; the entries are moved.
        unsafe {
            let entries_to = memory.add(entries_at).cast::<Entry>();
            let head = Head {
                base,
                shift,
                last_slot: (slots.len() - 1) as u32,
                entries: entries_to.as_ptr(),
                entry_count: entries.len(),
            };
            memory.cast::<Head>().write(head);
            memory
                .add(slots_at)
                .cast::<u16>()
                .copy_from_nonoverlapping(NonNull::from(slots).cast(), slots.len());
            entries_to.copy_from_nonoverlapping(NonNull::from(&entries[..]).cast(), entries.len());
        }
        // Moved out above; `Entry` has no destructor, nodes free what `NODE` entries name.
        drop(entries);
        Node(memory.cast())
    }

    fn into_raw(self) -> *const Head {
        let head = self.0.as_ptr();
        std::mem::forget(self);
        head
    }

    /// A node that shows nothing.
    fn empty() -> Node {
        Node::new(0, 0, &[0], vec![Entry::UNMAPPED])
    }

    /// A node that shows `flat` everywhere.
    pub(crate) fn solo(flat: &Arc<Flat>) -> Node {
        Node::new(0, 0, &[0], vec![Entry::section(flat)])
    }

    /// A node for the addresses `first..=last`, of which `flats` (sorted, all of them touching
    /// the range) show parts.
    fn build(first: u64, last: u64, flats: &[Arc<Flat>]) -> Node {
        let (low, high, align) = borders(first, last, flats);
        let mut shift = align.trailing_zeros();
        if (high - low) >> shift > MAX_SLOTS {
            while (high >> shift) - (low >> shift) > COARSE_SLOTS {
                shift += 1;
            }
        }
        let start = low >> shift << shift;
        // One slot for what lies before the first border.
        let base = if start > first {
            start - (1 << shift)
        } else {
            start
        };
        let count = ((high - base) >> shift) + 1;
        let mut entries = vec![Entry::UNMAPPED];
        let mut slots = Vec::with_capacity(count as usize);
        let mut at = 0;
        let mut shown = None;
        for slot in 0..count {
            let from = if slot == 0 {
                first
            } else {
                base + (slot << shift)
            };
            let to = if slot == count - 1 {
                last
            } else {
                base + ((slot + 1) << shift) - 1
            };
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
        Node::new(base, shift, &slots, entries)
    }

    fn head(&self) -> &Head {
        // SAFETY: valid from `new` to `drop`.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let head = self.head();
        let (layout, _, _) = Node::layout(head.last_slot as usize + 1, head.entry_count);
        for at in 0..head.entry_count {
            // SAFETY: within the entries written by `new`.
            let entry = unsafe { &*head.entries.add(at) };
            if entry.kind == NODE {
                // SAFETY: made by `Entry::node`, owned by this entry alone.
                drop(Node(unsafe {
                    NonNull::new_unchecked(entry.to.cast_mut().cast())
                }));
            }
        }
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.0.as_ptr().cast(), layout) };
    }
}

fn covers(flat: &Flat, first: u64, last: u64) -> bool {
    flat.section.range.start <= first && flat.section.range.end > last
}

/// Lowest and highest border inside `first..=last` (a border at `first` is none), and all of
/// them or-ed. There is at least one.
fn borders(first: u64, last: u64, flats: &[Arc<Flat>]) -> (u64, u64, u64) {
    let (mut low, mut high, mut all) = (u64::MAX, 0, 0);
    for flat in flats {
        for border in [flat.section.range.start, flat.section.range.end] {
            if border > first && border <= last {
                low = low.min(border);
                high = high.max(border);
                all |= border;
            }
        }
    }
    (low, high, all)
}

/// The cell of the top table that covers `address`.
#[inline(always)]
fn cell_of(address: u64) -> usize {
    let octave = 63 - (address | 1 << LOW_BITS).leading_zeros();
    let row = (octave - LOW_BITS) << CELL_BITS;
    row as usize + (address >> (octave - CELL_BITS)) as usize
}

/// First and last address of a cell.
fn cell_range(cell: usize) -> (u64, u64) {
    let cell = cell as u64;
    let (row, column) = (cell >> CELL_BITS, cell & ((1 << CELL_BITS) - 1));
    let (octave, column) = if row == 0 {
        (LOW_BITS, column)
    } else {
        (LOW_BITS + row as u32 - 1, column + (1 << CELL_BITS))
    };
    let shift = octave - CELL_BITS;
    (column << shift, (column << shift) + ((1 << shift) - 1))
}

/// An immutable view: the top table. The nodes belong to the [`Index`].
pub(crate) struct View {
    cells: Box<[*const Head]>,
}

// SAFETY: immutable; what it points to is kept alive by its index until after its grace period.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// A view that shows nothing.
    pub(crate) fn empty() -> View {
        View {
            cells: Box::default(),
        }
    }

    /// What answers at `address`.
    ///
    /// The caller is in a read section in which it loaded the view (I2).
    #[inline(always)]
    pub(crate) fn lookup(&self, address: u64) -> Option<&Entry> {
        let mut head = *self.cells.get(cell_of(address))?;
        loop {
            // SAFETY: the node belongs to this view and outlives the section (I2). The slot is
            // clamped to the node's, and slots hold indices of entries.
            let entry = unsafe {
                let node = &*head;
                let slot = (address.saturating_sub(node.base) >> node.shift)
                    .min(u64::from(node.last_slot));
                let index = *head.add(1).cast::<u16>().add(slot as usize);
                &*node.entries.add(usize::from(index))
            };
            if entry.kind & NODE == 0 {
                return (entry.kind != 0).then_some(entry);
            }
            head = entry.to.cast();
        }
    }
}

/// The writer's side: owns the nodes of the current view.
pub(crate) struct Index {
    empty: Node,
    /// Per cell of the top table its node, unless it is `empty` or a section's solo node.
    nodes: Vec<Option<Node>>,
    cells: Vec<*const Head>,
}

// SAFETY: the pointers name nodes owned by the index or by `Flat`s of the same address space.
unsafe impl Send for Index {}

/// What a new view no longer shows; freed after a grace period.
#[derive(Default)]
pub(crate) struct OldNodes {
    _nodes: Vec<Node>,
}

impl Index {
    pub(crate) fn new() -> Index {
        Index {
            empty: Node::empty(),
            nodes: Vec::new(),
            cells: Vec::new(),
        }
    }

    /// The view as it stands.
    pub(crate) fn view(&self) -> Box<View> {
        Box::new(View {
            cells: self.cells.as_slice().into(),
        })
    }

    /// Brings the index up to date with `flats` (all sections, sorted), which differ from those
    /// of the last update within `changed` only. The sections that went must live until the
    /// grace period that frees the old nodes.
    pub(crate) fn update(&mut self, flats: &[Arc<Flat>], changed: &[Range<u64>]) -> OldNodes {
        let length = flats
            .last()
            .map_or(0, |flat| cell_of(flat.section.range.end - 1) + 1);
        let mut old = Vec::new();
        if length < self.nodes.len() {
            old.extend(self.nodes.drain(length..).flatten());
        }
        let empty: *const Head = self.empty.0.as_ptr();
        self.nodes.resize_with(length, || None);
        self.cells.resize(length, empty);
        let mut done = 0;
        for range in changed {
            let first = cell_of(range.start).max(done);
            let last = cell_of(range.end - 1).min(length.wrapping_sub(1));
            if length == 0 || first > last {
                continue;
            }
            for cell in first..=last {
                let (from, to) = cell_range(cell);
                let start = flats.partition_point(|flat| flat.section.range.end <= from);
                let count = flats[start..].partition_point(|flat| flat.section.range.start <= to);
                let node = match &flats[start..start + count] {
                    [] => None,
                    [flat] if covers(flat, from, to) => {
                        self.cells[cell] = flat.solo().0.as_ptr();
                        old.extend(self.nodes[cell].take());
                        continue;
                    }
                    inside => Some(Node::build(from, to, inside)),
                };
                self.cells[cell] = node.as_ref().map_or(empty, |node| node.0.as_ptr());
                old.extend(std::mem::replace(&mut self.nodes[cell], node));
            }
            done = last + 1;
        }
        OldNodes { _nodes: old }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{FlatSection, Region};

    fn flats(ranges: &[(u64, u64)]) -> Vec<Arc<Flat>> {
        let region = Region::reservation("r", u64::MAX);
        ranges
            .iter()
            .map(|(start, end)| Flat::new(FlatSection::new(*start..*end, 0, &region)))
            .collect()
    }

    fn check(index: &Index, flats: &[Arc<Flat>]) {
        let view = index.view();
        let mut probes = vec![0, u64::MAX];
        for flat in flats {
            let Range { start, end } = flat.section.range;
            probes.extend([
                start,
                end - 1,
                start + (end - start) / 2,
                end,
                start.saturating_sub(1),
            ]);
        }
        for address in probes {
            let found = view
                .lookup(address)
                .map(|entry| entry.flat().section.range.clone());
            let wanted = flats
                .iter()
                .map(|flat| flat.section.range.clone())
                .find(|r| r.contains(&address));
            assert_eq!(found, wanted, "at {address:#x}");
        }
    }

    #[test]
    fn cells_tile_the_address_space() {
        let mut next = 0u64;
        for cell in 0..((64 - LOW_BITS as usize + 1) << CELL_BITS) {
            let (first, last) = cell_range(cell);
            assert_eq!(first, next);
            assert_eq!((cell_of(first), cell_of(last)), (cell, cell));
            next = last.wrapping_add(1);
        }
        assert_eq!(next, 0);
    }

    #[test]
    fn a_pc_map_is_found_in_two_steps() {
        let mut ranges = vec![(0, 0xa0000), (0x10_0000, 0xc000_0000), (1 << 32, 9 << 30)];
        ranges.extend((0..4000).map(|bar| {
            (
                0xc000_0000 + bar * 0x4000,
                0xc000_0000 + bar * 0x4000 + 0x4000,
            )
        }));
        ranges.push(((1 << 46) - (1 << 30), 1 << 46));
        ranges.sort_unstable();
        let flats = flats(&ranges);
        let mut index = Index::new();
        index.update(&flats, std::slice::from_ref(&(0..1 << 46)));
        check(&index, &flats);
        assert!(index.cells.len() * size_of::<usize>() < 32 << 10);
        for node in index.nodes.iter().flatten() {
            let head = node.head();
            for at in 0..head.entry_count {
                // SAFETY: within the node's entries.
                assert_ne!(unsafe { (*head.entries.add(at)).kind }, NODE);
            }
        }
    }

    #[test]
    fn fine_borders_far_apart_get_further_nodes() {
        let ranges = [
            (1 << 45, (1 << 45) + 0x1000),
            ((1 << 45) + (1 << 38) + 1, (1 << 45) + (1 << 38) + 3),
        ];
        let flats = flats(&ranges);
        let mut index = Index::new();
        index.update(&flats, std::slice::from_ref(&(0..1 << 46)));
        check(&index, &flats);
    }

    #[test]
    fn the_end_of_the_address_space_is_reached() {
        let flats = flats(&[(0, 1), (u64::MAX - 5, u64::MAX)]);
        let mut index = Index::new();
        index.update(&flats, std::slice::from_ref(&(0..u64::MAX)));
        check(&index, &flats);
    }

    proptest! {
        /// Any set of sections, changed step by step, against a walk of the list.
        #[test]
        fn updates_match_a_walk(steps in prop::collection::vec((any::<u8>(), 0u32..50, 1u64..5000), 1..60)) {
            let mut map = std::collections::BTreeMap::new();
            let mut index = Index::new();
            let mut keep = Vec::new();
            for (low, shift, length) in steps {
                let start = (u64::from(low) << shift) | (u64::from(low) & 7);
                let mut range = start..start + (length << (shift / 3));
                let overlaps = |r: &Range<u64>| r.start < range.end && range.start < r.end;
                let hit = map.values().find(|f: &&Arc<Flat>| overlaps(&f.section.range)).cloned();
                match hit {
                    Some(flat) => {
                        range = flat.section.range.clone();
                        map.remove(&range.start);
                        keep.push(flat);
                    }
                    None => {
                        let flat = flats(&[(range.start, range.end)]).remove(0);
                        map.insert(range.start, flat);
                    }
                }
                let flats: Vec<_> = map.values().cloned().collect();
                index.update(&flats, std::slice::from_ref(&range));
                check(&index, &flats);
            }
        }
    }
}
