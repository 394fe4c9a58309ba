// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The writer's state of all address spaces, and how a change reaches them.

use std::ops::Range;
use std::sync::{Arc, Weak};

use ebbtide_models::seeded;
use smallvec::SmallVec;

use super::delta::{Delta, Deltas};
use super::fixture::Fixture;
use super::region::Region;
use crate::flat::Flat;
use crate::grace::{Job, OldView};
use crate::index::{Index, View};
use crate::ticket::Drain;
use crate::{
    AddressSpace, Error, FlatSection, Listener, ListenerError, ListenerId, Memory, RamBlock,
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
    pub(super) fixtures: Vec<Fixture>,
    pub(super) listeners: Vec<(i32, ListenerId, Box<dyn Listener>)>,
    pub(super) index: Index,
}

impl Tree {
    /// Adds an address space that shows `root`. The view must be published by the caller.
    ///
    /// # Errors
    /// `Unplugged` when it would show RAM on its way out, which nobody else shows.
    pub(crate) fn add_space(&mut self, name: &str, root: &Arc<Region>) -> Result<u64, Error> {
        self.next_space += 1;
        let id = self.next_space;
        let mut state = SpaceState {
            id,
            name: name.to_owned(),
            root: Arc::clone(root),
            space: Weak::new(),
            flats: Vec::new(),
            fixtures: Vec::new(),
            listeners: Vec::new(),
            index: Index::new(),
        };
        let mut deltas = Deltas::new();
        state.delta(0, std::slice::from_ref(&(0..u64::MAX)), &mut deltas);
        if let Some(delta) = deltas.first_mut() {
            let mut blocks = delta.added.iter().filter_map(|flat| flat.block());
            if let Some(block) = blocks.find(|block| !block.is_live()) {
                return Err(Error::Unplugged(block.name().to_owned()));
            }
            state.apply(delta, None);
        }
        root.state().spaces.push(id);
        self.spaces.push(state);
        Ok(id)
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
        let mut deltas = Deltas::new();
        self.deltas(dirty, &mut deltas);
        self.check_unplugged(&deltas, unplugged)?;
        self.tell_listeners(&deltas)?;
        let grace = memory.grace_worker();
        for delta in &mut deltas {
            let space = &mut self.spaces[delta.at];
            let view = space.apply(delta, grace.spare_view());
            // A space that is just being dropped has no view to publish.
            delta.old_view = space.space.upgrade().map(|space| space.publish(view));
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
            if seeded!("slot_at_unpublish") {
                grace.hub().free_slot(drain.slot());
            }
            drain.unpublish();
        }
        if !deltas.is_empty() || !unplugged.is_empty() {
            let views = deltas.iter_mut().map(|delta| {
                Job::View(OldView {
                    view: delta.old_view.take(),
                    _nodes: std::mem::take(&mut delta.old_nodes),
                    flats: std::mem::take(&mut delta.removed),
                    sweeper: Arc::clone(memory.sweeper()),
                })
            });
            let drains = unplugged.iter();
            grace.submit_all(views.chain(drains.map(|(_, drain)| Job::Drain(Arc::clone(drain)))));
        }
        Ok(())
    }

    fn deltas(&self, dirty: &mut [(u64, Range<u64>)], deltas: &mut Deltas) {
        dirty.sort_unstable_by_key(|(space, range)| (*space, range.start));
        for chunk in dirty.chunk_by(|a, b| a.0 == b.0) {
            let Some(at) = self.spaces.iter().position(|space| space.id == chunk[0].0) else {
                continue;
            };
            let windows: SmallVec<[Range<u64>; 2]> =
                chunk.iter().map(|(_, range)| range.clone()).collect();
            self.spaces[at].delta(at, &windows, deltas);
        }
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
        self.index.view(None)
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
            for fixture in &self.fixtures {
                result = fixture.tell(&mut *listener);
                if result.is_err() {
                    break;
                }
                shown.1 += 1;
            }
        }
        if result.is_err() {
            self.fixtures[..shown.1]
                .iter()
                .rev()
                .for_each(|fixture| fixture.untell(&mut *listener));
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
        self.fixtures
            .iter()
            .rev()
            .for_each(|fixture| fixture.untell(&mut *listener));
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
}
