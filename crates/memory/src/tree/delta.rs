// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How one address space changes with a commit: found by rendering, told to listeners, applied.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::commit::SpaceState;
use super::fixture::Fixture;
use super::render::{Pieces, goes_on, render};
use crate::flat::Flat;
use crate::grace::OldFlats;
use crate::index::{OldNodes, View};
use crate::{FlatSection, ListenerError, SectionKind};

/// Addresses, and the sections in them.
type Windows = SmallVec<[(Range<u64>, Range<usize>); 1]>;

/// The sections of a window: mostly the one that changes and its neighbours.
type Flats = SmallVec<[Arc<Flat>; 4]>;

/// How the address spaces change.
pub(super) type Deltas = SmallVec<[Delta; 1]>;

/// How one address space changes.
pub(super) struct Delta {
    /// Index in `Tree::spaces`.
    pub(super) at: usize,
    /// Per window, ascending: sections replaced (as a range of `flats`) and what replaces them.
    pub(super) windows: SmallVec<[(Range<usize>, Flats); 1]>,
    pub(super) removed: OldFlats,
    pub(super) added: SmallVec<[Arc<Flat>; 2]>,
    /// What was shown before, once that is known.
    pub(super) old_view: Option<Box<View>>,
    pub(super) old_nodes: OldNodes,
    /// All fixtures afterwards, if they change.
    fixtures: Option<Vec<Fixture>>,
    fixtures_removed: Vec<Fixture>,
    fixtures_added: Vec<Fixture>,
}

impl SpaceState {
    /// How the space changes when `windows` (sorted by start) are rendered anew: one more of `deltas`, if
    /// it does. What is made here is filled where it stays: what was just written piece by piece, a
    /// processor is slow to copy.
    pub(super) fn delta(&self, at: usize, windows: &[Range<u64>], deltas: &mut Deltas) {
        deltas.push(Delta {
            at,
            windows: SmallVec::new(),
            removed: SmallVec::new(),
            added: SmallVec::new(),
            old_view: None,
            old_nodes: OldNodes::default(),
            fixtures: None,
            fixtures_removed: Vec::new(),
            fixtures_added: Vec::new(),
        });
        let changes = deltas
            .last_mut()
            .is_some_and(|delta| self.compare(windows, delta));
        if !changes {
            deltas.pop();
        }
    }

    /// Fills in how the space changes; whether it does.
    fn compare(&self, windows: &[Range<u64>], delta: &mut Delta) -> bool {
        let mut pieces = SmallVec::new();
        let windows = self.render(windows, &mut pieces);
        for ((_, old), pieces) in windows.iter().zip(&mut pieces) {
            let new = self.replace(old.clone(), pieces, delta);
            delta.windows.push((old.clone(), new));
        }
        self.compare_fixtures(&windows, delta);
        delta.windows.retain(|(old, new)| {
            old.len() != new.len()
                || !self.flats[old.clone()]
                    .iter()
                    .zip(new)
                    .all(|(a, b)| Arc::ptr_eq(a, b))
        });
        !delta.windows.is_empty() || delta.fixtures.is_some()
    }

    /// Renders windows, widened to the sections they cut: with those that only touch them where
    /// something in them goes on.
    fn render(&self, windows: &[Range<u64>], pieces: &mut SmallVec<[Pieces; 1]>) -> Windows {
        let cut = self.whole_sections(windows, false);
        self.render_all(&cut, pieces);
        let mut both = cut.iter().zip(&*pieces);
        if !both.any(|((_, old), pieces)| self.goes_on(old, pieces)) {
            return cut;
        }
        let touched = self.whole_sections(windows, true);
        pieces.clear();
        self.render_all(&touched, pieces);
        touched
    }

    /// Adds the pieces of each window.
    fn render_all(&self, windows: &Windows, pieces: &mut SmallVec<[Pieces; 1]>) {
        for (window, _) in windows {
            pieces.push(Pieces::new());
            if let Some(pieces) = pieces.last_mut() {
                render(&self.root, window.clone(), pieces);
            }
        }
    }

    /// Whether the first or the last of `pieces`, which replace the sections `old`, is one with the
    /// section before or behind.
    fn goes_on(&self, old: &Range<usize>, pieces: &Pieces) -> bool {
        let shown = |at: Option<usize>| {
            let section = &self.flats.get(at?)?.section;
            Some((&section.range, &section.region, section.offset_in_region))
        };
        let before = shown(old.start.checked_sub(1)).zip(pieces.first());
        let behind = shown(Some(old.end)).zip(pieces.last());
        before.is_some_and(|(flat, first)| goes_on(flat, first.shown()))
            || behind.is_some_and(|(flat, last)| goes_on(last.shown(), flat))
    }

    /// Widens windows to the sections they cut, and with `touching` to those they touch, so that
    /// what was cut can become whole again, and merges those that meet. Returns each with the
    /// sections it holds.
    fn whole_sections(&self, windows: &[Range<u64>], touching: bool) -> Windows {
        let mut whole = Windows::new();
        for window in windows {
            let reach = u64::from(touching);
            let (from, to) = (window.start, window.end.saturating_add(reach));
            let first = self
                .flats
                .partition_point(|flat| flat.section.range.end.saturating_add(reach) <= from);
            let last =
                first + self.flats[first..].partition_point(|flat| flat.section.range.start < to);
            let (mut start, mut end) = (window.start, window.end);
            if first < last {
                start = start.min(self.flats[first].section.range.start);
                end = end.max(self.flats[last - 1].section.range.end);
            }
            match whole.last_mut() {
                Some((before, held)) if before.end >= start => {
                    before.end = before.end.max(end);
                    held.end = held.end.max(last);
                }
                _ => whole.push((start..end, first..last)),
            }
        }
        whole
    }

    /// Compares the sections `old` with what is rendered in their place; unchanged ones are kept.
    fn replace(&self, old: Range<usize>, pieces: &mut Pieces, delta: &mut Delta) -> Flats {
        let mut old = self.flats[old].iter().peekable();
        let mut new = Flats::with_capacity(pieces.len());
        for piece in pieces.drain(..) {
            while let Some(flat) = old.next_if(|flat| flat.section.range.start < piece.range.start)
            {
                delta.removed.push(Arc::clone(flat));
            }
            let same = |flat: &&Arc<Flat>| {
                let section = &flat.section;
                section.range == piece.range
                    && section.offset_in_region == piece.offset
                    && Arc::ptr_eq(&section.region, &piece.region)
                    && matches!(section.kind, SectionKind::Ram { .. }) == piece.region.is_direct()
            };
            let flat = match old.next_if(same) {
                Some(flat) => Arc::clone(flat),
                None => {
                    let flat = Flat::new(FlatSection::new(piece.range, piece.offset, piece.region));
                    delta.added.push(Arc::clone(&flat));
                    flat
                }
            };
            new.push(flat);
        }
        delta.removed.extend(old.cloned());
        new
    }

    fn compare_fixtures(&self, windows: &[(Range<u64>, Range<usize>)], delta: &mut Delta) {
        let in_windows = |addr: u64| windows.iter().any(|(window, _)| window.contains(&addr));
        let mut new = Vec::new();
        for flat in delta.windows.iter().flat_map(|(_, flats)| flats) {
            Fixture::of_section(&flat.section, &mut new);
        }
        if new.is_empty() && self.fixtures.is_empty() {
            return;
        }
        let old = self.fixtures.iter().filter(|old| in_windows(old.addr()));
        delta.fixtures_removed = old
            .clone()
            .filter(|old| !new.contains(old))
            .cloned()
            .collect();
        delta.fixtures_added = new
            .iter()
            .filter(|new| !old.clone().any(|old| old == *new))
            .cloned()
            .collect();
        if delta.fixtures_removed.is_empty() && delta.fixtures_added.is_empty() {
            return;
        }
        let mut all: Vec<Fixture> = self
            .fixtures
            .iter()
            .filter(|e| !in_windows(e.addr()))
            .cloned()
            .collect();
        all.extend(new);
        all.sort_by_key(Fixture::order);
        delta.fixtures = Some(all);
    }

    /// Tells the listeners of a delta; when one refuses, takes back what was told.
    pub(super) fn tell(&mut self, delta: &Delta) -> Result<(), ListenerError> {
        let listeners = &mut self.listeners;
        listeners
            .iter_mut()
            .for_each(|(_, _, listener)| listener.begin());
        for fixture in delta.fixtures_removed.iter().rev() {
            listeners
                .iter_mut()
                .rev()
                .for_each(|(_, _, listener)| fixture.untell(&mut **listener));
        }
        for flat in delta.removed.iter().rev() {
            listeners
                .iter_mut()
                .rev()
                .for_each(|(_, _, listener)| listener.region_del(&flat.section));
        }
        let count = listeners.len();
        let mut told = 0;
        let mut result = Ok(());
        let regions = delta
            .added
            .iter()
            .flat_map(|flat| (0..count).map(move |at| (flat, at)));
        for (flat, at) in regions {
            result = self.listeners[at].2.region_add(&flat.section);
            if result.is_err() {
                break;
            }
            told += 1;
        }
        let mut told_fixtures = 0;
        if result.is_ok() {
            let fixtures = delta
                .fixtures_added
                .iter()
                .flat_map(|e| (0..count).map(move |at| (e, at)));
            for (fixture, at) in fixtures {
                result = fixture.tell(&mut *self.listeners[at].2);
                if result.is_err() {
                    break;
                }
                told_fixtures += 1;
            }
        }
        if result.is_err() {
            self.untell(delta, told, told_fixtures);
            self.listeners
                .iter_mut()
                .for_each(|(_, _, listener)| listener.commit());
        }
        result
    }

    /// Takes back what was told of a delta: the first `told` calls of `region_add` and
    /// `told_fixtures` of fixtures, and all removals.
    pub(super) fn untell(&mut self, delta: &Delta, told: usize, told_fixtures: usize) {
        let count = self.listeners.len();
        let calls = |things: usize, told: usize| {
            (0..things * count)
                .take(told)
                .map(move |call| (call / count, call % count))
                .collect::<Vec<_>>()
        };
        for (thing, at) in calls(delta.fixtures_added.len(), told_fixtures)
            .into_iter()
            .rev()
        {
            delta.fixtures_added[thing].untell(&mut *self.listeners[at].2);
        }
        for (thing, at) in calls(delta.added.len(), told).into_iter().rev() {
            self.listeners[at].2.region_del(&delta.added[thing].section);
        }
        let name = &self.name;
        let lost = |error: ListenerError| tracing::error!(space = name, %error, "a listener lost part of the map");
        for (_, _, listener) in &mut self.listeners {
            let removed = delta.removed.iter();
            removed
                .filter_map(|flat| listener.region_add(&flat.section).err())
                .for_each(lost);
        }
        for (_, _, listener) in &mut self.listeners {
            let removed = delta.fixtures_removed.iter();
            removed
                .filter_map(|fixture| fixture.tell(&mut **listener).err())
                .for_each(lost);
        }
    }

    /// Brings sections and index up to date, with the nodes that are old in the delta; returns the new view.
    pub(super) fn apply(&mut self, delta: &mut Delta, spare: Option<Box<View>>) -> Box<View> {
        for (old, new) in delta.windows.iter_mut().rev() {
            self.flats.splice(old.clone(), new.drain(..));
        }
        if let Some(fixtures) = delta.fixtures.take() {
            self.fixtures = fixtures;
        }
        let both = delta.removed.iter().chain(&delta.added);
        let mut changed: SmallVec<[Range<u64>; 2]> =
            both.map(|flat| flat.section.range.clone()).collect();
        changed.sort_unstable_by_key(|range| range.start);
        delta.old_nodes = self.index.update(&self.flats, &changed);
        self.index.view(spare)
    }
}
