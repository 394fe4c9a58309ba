// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The writer's state of all address spaces, and how a change reaches them.

use std::ops::Range;
use std::sync::{Arc, Weak};

use super::region::Region;
use super::render::{Piece, render};
use crate::flat::Flat;
use crate::grace::Job;
use crate::index::{Index, OldNodes, View};
use crate::ticket::Drain;
use crate::{
    AddressSpace, Error, FlatIoeventfd, FlatSection, Listener, ListenerError, ListenerId, Memory,
    RamBlock,
};

/// Everything behind the map's writer lock.
#[derive(Default)]
pub(crate) struct Tree {
    pub(super) spaces: Vec<SpaceState>,
    next_space: u64,
    next_listener: u64,
}

/// The writer's side of one address space.
pub(crate) struct SpaceState {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) root: Arc<Region>,
    pub(super) space: Weak<AddressSpace>,
    /// Sorted, disjoint, merged.
    pub(super) flats: Vec<Arc<Flat>>,
    /// Sorted by address.
    pub(super) ioeventfds: Vec<FlatIoeventfd>,
    pub(super) listeners: Vec<(i32, ListenerId, Box<dyn Listener>)>,
    index: Index,
}

/// How one address space changes.
struct Delta {
    /// Index in `Tree::spaces`.
    at: usize,
    /// Per window, ascending: sections replaced (as a range of `flats`) and what replaces them.
    windows: Vec<(Range<usize>, Vec<Arc<Flat>>)>,
    removed: Vec<Arc<Flat>>,
    added: Vec<Arc<Flat>>,
    ioeventfds: Option<Vec<FlatIoeventfd>>,
    ioeventfds_removed: Vec<FlatIoeventfd>,
    ioeventfds_added: Vec<FlatIoeventfd>,
}

impl Tree {
    /// Adds an address space that shows `root`. The view must be published by the caller.
    pub(crate) fn add_space(&mut self, name: &str, root: &Arc<Region>) -> u64 {
        self.next_space += 1;
        let id = self.next_space;
        root.state().spaces.push(id);
        let mut state = SpaceState {
            id,
            name: name.to_owned(),
            root: Arc::clone(root),
            space: Weak::new(),
            flats: Vec::new(),
            ioeventfds: Vec::new(),
            listeners: Vec::new(),
            index: Index::new(),
        };
        if let Some(mut delta) = state.delta(0, std::slice::from_ref(&(0..u64::MAX))) {
            state.apply(&mut delta);
        }
        self.spaces.push(state);
        id
    }

    pub(crate) fn space(&mut self, id: u64) -> Option<&mut SpaceState> {
        self.spaces.iter_mut().find(|space| space.id == id)
    }

    /// Forgets an address space: its listeners see everything go.
    pub(crate) fn remove_space(&mut self, id: u64) -> Option<SpaceState> {
        let at = self.spaces.iter().position(|space| space.id == id)?;
        let mut space = self.spaces.remove(at);
        space.root.state().spaces.retain(|other| *other != id);
        while let Some((_, id, _)) = space.listeners.last() {
            let id = *id;
            space.remove_listener(id);
        }
        Some(space)
    }

    pub(crate) fn new_listener_id(&mut self) -> ListenerId {
        self.next_listener += 1;
        ListenerId(self.next_listener)
    }

    /// Renders what is dirty, tells the listeners, publishes, and hands what is old to the
    /// worker. On an error nothing has changed, but the tree must be rolled back.
    pub(super) fn commit(
        &mut self,
        memory: &Memory,
        dirty: &mut [(u64, Range<u64>)],
        unplugged: &[(Arc<RamBlock>, Arc<Drain>)],
    ) -> Result<(), Error> {
        let mut deltas = self.deltas(dirty);
        self.check_unplugged(&deltas, unplugged)?;
        self.tell_listeners(&deltas)?;
        let grace = memory.grace_worker();
        let mut jobs: Vec<Job> = Vec::new();
        for delta in &mut deltas {
            let space = &mut self.spaces[delta.at];
            let (view, nodes) = space.apply(delta);
            // A space that is just being dropped has no view to publish.
            let old_view = space.space.upgrade().map(|space| space.publish(view));
            let old = (old_view, nodes, std::mem::take(&mut delta.removed));
            let sweeper = Arc::clone(memory.sweeper());
            jobs.push(Job::Retire(Box::new(move || {
                let (view, nodes, flats) = old;
                drop((view, nodes));
                flats
                    .into_iter()
                    .for_each(|flat| sweeper.drop_section(flat));
            })));
        }
        grace.hub().bump_generation();
        for delta in &deltas {
            let space = &mut self.spaces[delta.at];
            space
                .listeners
                .iter_mut()
                .for_each(|(_, _, listener)| listener.commit());
        }
        for (_, drain) in unplugged {
            drain.unpublish();
            jobs.push(Job::Drain(Arc::clone(drain)));
        }
        if !jobs.is_empty() {
            grace.submit_all(jobs);
        }
        Ok(())
    }

    fn deltas(&self, dirty: &mut [(u64, Range<u64>)]) -> Vec<Delta> {
        dirty.sort_unstable_by_key(|(space, range)| (*space, range.start));
        let mut deltas = Vec::new();
        for chunk in dirty.chunk_by(|a, b| a.0 == b.0) {
            let Some(at) = self.spaces.iter().position(|space| space.id == chunk[0].0) else {
                continue;
            };
            let windows: Vec<Range<u64>> = chunk.iter().map(|(_, range)| range.clone()).collect();
            deltas.extend(self.spaces[at].delta(at, &windows));
        }
        deltas
    }

    /// A block on its way out must not be shown any more, whatever shows it.
    fn check_unplugged(
        &self,
        deltas: &[Delta],
        unplugged: &[(Arc<RamBlock>, Arc<Drain>)],
    ) -> Result<(), Error> {
        let still = |flat: &Arc<Flat>| {
            let block = flat.block().filter(|block| !block.is_live())?;
            let (block, region) = (
                block.name().to_owned(),
                flat.section.region.name().to_owned(),
            );
            Some(Error::StillMapped { block, region })
        };
        if let Some(error) = deltas.iter().flat_map(|delta| &delta.added).find_map(still) {
            return Err(error);
        }
        if unplugged.is_empty() {
            return Ok(());
        }
        for (at, space) in self.spaces.iter().enumerate() {
            let delta = deltas.iter().find(|delta| delta.at == at);
            let replaced = |index: usize| {
                delta.is_some_and(|d| d.windows.iter().any(|(r, _)| r.contains(&index)))
            };
            let kept = space
                .flats
                .iter()
                .enumerate()
                .filter(|(index, _)| !replaced(*index))
                .map(|(_, flat)| flat);
            let new = delta
                .into_iter()
                .flat_map(|d| d.windows.iter().flat_map(|(_, flats)| flats));
            if let Some(error) = kept.chain(new).find_map(still) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Tells all listeners of all deltas; when one refuses, takes back what was told.
    fn tell_listeners(&mut self, deltas: &[Delta]) -> Result<(), Error> {
        for (done, delta) in deltas.iter().enumerate() {
            let space = &mut self.spaces[delta.at];
            let Err(source) = space.tell(delta) else {
                continue;
            };
            let error = Error::Listener {
                space: space.name.clone(),
                source,
            };
            for delta in deltas[..done].iter().rev() {
                let space = &mut self.spaces[delta.at];
                space.untell(delta, usize::MAX, usize::MAX);
                space
                    .listeners
                    .iter_mut()
                    .for_each(|(_, _, listener)| listener.commit());
            }
            return Err(error);
        }
        Ok(())
    }
}

impl SpaceState {
    pub(crate) fn set_space(&mut self, space: &Arc<AddressSpace>) {
        self.space = Arc::downgrade(space);
    }

    pub(crate) fn view(&self) -> Box<View> {
        self.index.view()
    }

    pub(crate) fn sections(&self) -> Vec<FlatSection> {
        self.flats.iter().map(|flat| flat.section.clone()).collect()
    }

    /// Adds a listener and shows it what there is.
    pub(crate) fn add_listener(
        &mut self,
        id: ListenerId,
        mut listener: Box<dyn Listener>,
        priority: i32,
    ) -> Result<(), ListenerError> {
        listener.begin();
        let mut result = Ok(());
        let mut shown = (0, 0);
        for flat in &self.flats {
            result = listener.region_add(&flat.section);
            if result.is_err() {
                break;
            }
            shown.0 += 1;
        }
        if result.is_ok() {
            for ioeventfd in &self.ioeventfds {
                result = listener.ioeventfd_add(ioeventfd);
                if result.is_err() {
                    break;
                }
                shown.1 += 1;
            }
        }
        if result.is_err() {
            self.ioeventfds[..shown.1]
                .iter()
                .rev()
                .for_each(|e| listener.ioeventfd_del(e));
            self.flats[..shown.0]
                .iter()
                .rev()
                .for_each(|flat| listener.region_del(&flat.section));
            listener.commit();
            return result;
        }
        listener.commit();
        let at = self
            .listeners
            .partition_point(|(other, _, _)| *other <= priority);
        self.listeners.insert(at, (priority, id, listener));
        Ok(())
    }

    /// Removes a listener; it sees everything go.
    pub(crate) fn remove_listener(&mut self, id: ListenerId) -> Option<Box<dyn Listener>> {
        let at = self
            .listeners
            .iter()
            .position(|(_, other, _)| *other == id)?;
        let (_, _, mut listener) = self.listeners.remove(at);
        listener.begin();
        self.ioeventfds
            .iter()
            .rev()
            .for_each(|ioeventfd| listener.ioeventfd_del(ioeventfd));
        self.flats
            .iter()
            .rev()
            .for_each(|flat| listener.region_del(&flat.section));
        listener.commit();
        Some(listener)
    }

    /// Sections of the current view, which the caller must keep until a grace period after it
    /// was taken away, and the nodes that index them.
    pub(crate) fn into_old(self) -> (Vec<Arc<Flat>>, Index) {
        (self.flats, self.index)
    }

    /// How the space changes when `windows` (sorted by start) are rendered anew, if it does.
    fn delta(&self, at: usize, windows: &[Range<u64>]) -> Option<Delta> {
        let mut delta = Delta {
            at,
            windows: Vec::new(),
            removed: Vec::new(),
            added: Vec::new(),
            ioeventfds: None,
            ioeventfds_removed: Vec::new(),
            ioeventfds_added: Vec::new(),
        };
        let windows = self.whole_sections(windows);
        for (window, old) in &windows {
            let new = self.replace(old.clone(), render(&self.root, window.clone()), &mut delta);
            delta.windows.push((old.clone(), new));
        }
        self.compare_ioeventfds(&windows, &mut delta);
        delta.windows.retain(|(old, new)| {
            old.len() != new.len()
                || !self.flats[old.clone()]
                    .iter()
                    .zip(new)
                    .all(|(a, b)| Arc::ptr_eq(a, b))
        });
        let changes = !delta.windows.is_empty() || delta.ioeventfds.is_some();
        changes.then_some(delta)
    }

    /// Widens windows to the sections they touch, so that what was cut can become whole again,
    /// and merges those that meet. Returns each with the sections it holds.
    fn whole_sections(&self, windows: &[Range<u64>]) -> Vec<(Range<u64>, Range<usize>)> {
        let mut whole: Vec<(Range<u64>, Range<usize>)> = Vec::new();
        for window in windows {
            let first = self
                .flats
                .partition_point(|flat| flat.section.range.end < window.start);
            let last = first
                + self.flats[first..]
                    .partition_point(|flat| flat.section.range.start <= window.end);
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
    fn replace(&self, old: Range<usize>, pieces: Vec<Piece>, delta: &mut Delta) -> Vec<Arc<Flat>> {
        let mut old = self.flats[old].iter().peekable();
        let mut new = Vec::with_capacity(pieces.len());
        for piece in pieces {
            while let Some(flat) = old.next_if(|flat| flat.section.range.start < piece.range.start)
            {
                delta.removed.push(Arc::clone(flat));
            }
            let same = |flat: &&Arc<Flat>| {
                let section = &flat.section;
                section.range == piece.range
                    && section.offset_in_region == piece.offset
                    && Arc::ptr_eq(&section.region, &piece.region)
            };
            let flat = match old.next_if(same) {
                Some(flat) => Arc::clone(flat),
                None => {
                    let flat =
                        Flat::new(FlatSection::new(piece.range, piece.offset, &piece.region));
                    delta.added.push(Arc::clone(&flat));
                    flat
                }
            };
            new.push(flat);
        }
        delta.removed.extend(old.cloned());
        new
    }

    fn compare_ioeventfds(&self, windows: &[(Range<u64>, Range<usize>)], delta: &mut Delta) {
        let in_windows = |addr: u64| windows.iter().any(|(window, _)| window.contains(&addr));
        let mut new = Vec::new();
        for flat in delta.windows.iter().flat_map(|(_, flats)| flats) {
            let section = &flat.section;
            let state = section.region.state();
            for ioeventfd in &state.ioeventfds {
                let Some(at) = ioeventfd.offset.checked_sub(section.offset_in_region) else {
                    continue;
                };
                if at < section.range.end - section.range.start {
                    let addr = section.range.start + at;
                    let (size, datamatch, fd) = (
                        ioeventfd.size,
                        ioeventfd.datamatch,
                        Arc::clone(&ioeventfd.fd),
                    );
                    new.push(FlatIoeventfd {
                        addr,
                        size,
                        datamatch,
                        fd,
                    });
                }
            }
        }
        if new.is_empty() && self.ioeventfds.is_empty() {
            return;
        }
        let old = self.ioeventfds.iter().filter(|old| in_windows(old.addr));
        delta.ioeventfds_removed = old
            .clone()
            .filter(|old| !new.contains(old))
            .cloned()
            .collect();
        delta.ioeventfds_added = new
            .iter()
            .filter(|new| !old.clone().any(|old| old == *new))
            .cloned()
            .collect();
        if delta.ioeventfds_removed.is_empty() && delta.ioeventfds_added.is_empty() {
            return;
        }
        let mut all: Vec<FlatIoeventfd> = self
            .ioeventfds
            .iter()
            .filter(|e| !in_windows(e.addr))
            .cloned()
            .collect();
        all.extend(new);
        all.sort_by_key(|ioeventfd| (ioeventfd.addr, ioeventfd.size, ioeventfd.datamatch));
        delta.ioeventfds = Some(all);
    }

    /// Tells the listeners of a delta; when one refuses, takes back what was told.
    fn tell(&mut self, delta: &Delta) -> Result<(), ListenerError> {
        let listeners = &mut self.listeners;
        listeners
            .iter_mut()
            .for_each(|(_, _, listener)| listener.begin());
        for ioeventfd in delta.ioeventfds_removed.iter().rev() {
            listeners
                .iter_mut()
                .rev()
                .for_each(|(_, _, listener)| listener.ioeventfd_del(ioeventfd));
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
        let mut told_ioeventfds = 0;
        if result.is_ok() {
            let ioeventfds = delta
                .ioeventfds_added
                .iter()
                .flat_map(|e| (0..count).map(move |at| (e, at)));
            for (ioeventfd, at) in ioeventfds {
                result = self.listeners[at].2.ioeventfd_add(ioeventfd);
                if result.is_err() {
                    break;
                }
                told_ioeventfds += 1;
            }
        }
        if result.is_err() {
            self.untell(delta, told, told_ioeventfds);
            self.listeners
                .iter_mut()
                .for_each(|(_, _, listener)| listener.commit());
        }
        result
    }

    /// Takes back what was told of a delta: the first `told` calls of `region_add` and
    /// `told_ioeventfds` of `ioeventfd_add`, and all removals.
    fn untell(&mut self, delta: &Delta, told: usize, told_ioeventfds: usize) {
        let count = self.listeners.len();
        let calls = |things: usize, told: usize| {
            (0..things * count)
                .take(told)
                .map(move |call| (call / count, call % count))
                .collect::<Vec<_>>()
        };
        for (thing, at) in calls(delta.ioeventfds_added.len(), told_ioeventfds)
            .into_iter()
            .rev()
        {
            self.listeners[at]
                .2
                .ioeventfd_del(&delta.ioeventfds_added[thing]);
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
            let removed = delta.ioeventfds_removed.iter();
            removed
                .filter_map(|ioeventfd| listener.ioeventfd_add(ioeventfd).err())
                .for_each(lost);
        }
    }

    /// Brings sections and index up to date; returns the new view and the nodes that are old.
    fn apply(&mut self, delta: &mut Delta) -> (Box<View>, OldNodes) {
        for (old, new) in delta.windows.drain(..).rev() {
            self.flats.splice(old, new);
        }
        if let Some(ioeventfds) = delta.ioeventfds.take() {
            self.ioeventfds = ioeventfds;
        }
        let both = delta.removed.iter().chain(&delta.added);
        let mut changed: Vec<Range<u64>> = both.map(|flat| flat.section.range.clone()).collect();
        changed.sort_unstable_by_key(|range| range.start);
        let nodes = self.index.update(&self.flats, &changed);
        (self.index.view(), nodes)
    }
}
