// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The single steps that changes of the tree are made of, and what they touch.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::region::{Child, Region, RegionKind, State};
use crate::Error;

/// What hypervisors map.
const PAGE_BYTES: u64 = 4096;

/// Address spaces (by number) and addresses in them.
pub(super) type Dirty = SmallVec<[(u64, Range<u64>); 2]>;

pub(super) fn parent_of(child: &Arc<Region>) -> Result<Arc<Region>, Error> {
    child
        .parent()
        .ok_or_else(|| Error::NoParent(child.name().to_owned()))
}

pub(super) fn attach(parent: &Arc<Region>, place: Child, at: usize) {
    let child = Arc::clone(&place.region);
    parent.state().children.insert(at, place);
    child.state().parent = Some(Arc::downgrade(parent));
}

/// Places a child in front of its equals, unless it would overlap as [`check_overlap`] says, and
/// marks where it is shown.
pub(super) fn place(
    parent: &Arc<Region>,
    child: &Arc<Region>,
    place: Child,
    out: &mut Dirty,
) -> Result<(), Error> {
    let range = place.offset..place.offset.saturating_add(place.size);
    let mut state = parent.state();
    refuse_overlap(&state.children, &place)?;
    let at = state
        .children
        .partition_point(|other| other.priority > place.priority);
    state.children.insert(at, place);
    let range = range.start..range.end.min(parent.size());
    let marked = mark_root(&state, &range, out);
    drop(state);
    let mut state = child.state();
    state.parent = Some(Arc::downgrade(parent));
    let elsewhere = state.is_shown_elsewhere();
    drop(state);
    if elsewhere {
        mark(child, 0..child.size(), out);
    } else if !marked {
        mark(parent, range, out);
    }
    Ok(())
}

/// Takes a child out of its parent and marks where it was shown. Returns its place and number.
pub(super) fn displace(
    parent: &Arc<Region>,
    child: &Arc<Region>,
    out: &mut Dirty,
) -> Option<(Child, usize)> {
    let mut state = parent.state();
    let at = state.place_of(child)?;
    let place = state.children.remove(at);
    let end = place.offset.saturating_add(place.size).min(parent.size());
    let marked = mark_root(&state, &(place.offset..end), out);
    drop(state);
    let mut state = child.state();
    state.parent = None;
    let elsewhere = state.is_shown_elsewhere();
    drop(state);
    if !marked {
        mark(parent, place.offset..end, out);
    }
    if elsewhere {
        mark(child, 0..place.size, out);
    }
    Some((place, at))
}

pub(super) fn detach(parent: &Arc<Region>, child: &Arc<Region>) -> Option<(Child, usize)> {
    let mut state = parent.state();
    let at = state.place_of(child)?;
    let place = state.children.remove(at);
    drop(state);
    child.state().parent = None;
    Some((place, at))
}

/// Marks a range of a region that nothing but address spaces shows, as [`mark`] does; false if it is not
/// such a one. For who has its state at hand.
fn mark_root(state: &State, range: &Range<u64>, out: &mut Dirty) -> bool {
    if state.parent.is_some() || !state.aliases.is_empty() {
        return false;
    }
    if !range.is_empty() {
        out.extend(state.spaces.iter().map(|space| (*space, range.clone())));
    }
    true
}

pub(super) fn with_place<T>(
    parent: &Arc<Region>,
    child: &Arc<Region>,
    f: impl FnOnce(&mut Child) -> T,
) -> Option<T> {
    let mut state = parent.state();
    state
        .children
        .iter_mut()
        .find(|place| Arc::ptr_eq(&place.region, child))
        .map(f)
}

pub(super) fn set_disabled(region: &Arc<Region>, disabled: bool) {
    region.state().disabled = disabled;
    if let Some(parent) = region.parent() {
        with_place(&parent, region, |place| place.enabled = !disabled);
    }
}

pub(super) fn resize(region: &Arc<Region>, size: u64) {
    region.set_size(size);
    if let Some(parent) = region.parent() {
        with_place(&parent, region, |place| place.size = size);
    }
}

/// Follows a range upwards, through parents and aliases, to the address spaces that show it.
/// What hides it on the way is ignored: too much dirt costs time, too little would be wrong.
pub(super) fn mark(region: &Arc<Region>, range: Range<u64>, out: &mut Dirty) {
    if range.is_empty() {
        return;
    }
    let (spaces, parent, aliases) = {
        let state = region.state();
        (
            SmallVec::<[u64; 2]>::from_slice(&state.spaces),
            state.parent.as_ref().and_then(|p| p.upgrade()),
            state.aliases.clone(),
        )
    };
    out.extend(spaces.into_iter().map(|space| (space, range.clone())));
    if let Some(parent) = parent {
        let offset = with_place(&parent, region, |place| place.offset).unwrap_or(0);
        let end = range.end.saturating_add(offset).min(parent.size());
        mark(
            &parent,
            range.start.saturating_add(offset).min(end)..end,
            out,
        );
    }
    for alias in aliases.iter().filter_map(|alias| alias.upgrade()) {
        if let RegionKind::Alias { offset, .. } = alias.kind() {
            let end = range.end.saturating_sub(*offset).min(alias.size());
            mark(
                &alias,
                range.start.saturating_sub(*offset).min(end)..end,
                out,
            );
        }
    }
}

/// Refuses to have RAM of the machine overlap other such RAM at the same priority: `child`, as it
/// would be placed, against the enabled children of `parent`.
pub(super) fn check_overlap(parent: &Arc<Region>, place: &Child) -> Result<(), Error> {
    refuse_overlap(&parent.state().children, place)
}

fn refuse_overlap(children: &[Child], place: &Child) -> Result<(), Error> {
    if !place.machine_ram || !place.enabled {
        return Ok(());
    }
    let (start, end) = (place.offset, place.offset.saturating_add(place.size));
    let first = children.partition_point(|other| other.priority > place.priority);
    let peers = children[first..]
        .iter()
        .take_while(|other| other.priority == place.priority);
    for other in peers {
        let meets = other.machine_ram
            && other.enabled
            && other.offset < end
            && start < other.offset.saturating_add(other.size);
        if meets && !Arc::ptr_eq(&other.region, &place.region) {
            return Err(Error::Overlap {
                region: place.region.name().to_owned(),
                offset: place.offset,
                other: other.region.name().to_owned(),
                priority: place.priority,
            });
        }
    }
    Ok(())
}

/// As [`check_overlap`], for a child that is there and is about to change.
pub(super) fn check_change(
    child: &Arc<Region>,
    change: impl FnOnce(&mut Child),
) -> Result<(), Error> {
    let Some(parent) = child.parent() else {
        return Ok(());
    };
    let Some(mut place) = with_place(&parent, child, |place| place.clone()) else {
        return Ok(());
    };
    change(&mut place);
    check_end(&parent, &place)?;
    check_overlap(&parent, &place)
}

/// Refuses what would end past 2^64, and RAM of the machine that no host page fits.
pub(super) fn check_end(parent: &Arc<Region>, place: &Child) -> Result<(), Error> {
    let bad = |reason| {
        Err(Error::BadPlacement {
            child: place.region.name().to_owned(),
            parent: parent.name().to_owned(),
            offset: place.offset,
            reason,
        })
    };
    if place.offset.checked_add(place.size).is_none() {
        return bad("it ends past 2^64");
    }
    let whole = matches!(place.region.kind(), RegionKind::Ram { .. });
    if whole && place.machine_ram && !place.offset.is_multiple_of(PAGE_BYTES) {
        return bad("RAM starts at a multiple of 4096 bytes");
    }
    Ok(())
}
