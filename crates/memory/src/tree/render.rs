// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the tree to flat pieces: what answers each address of a window.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::region::{Region, RegionKind};

/// A contiguous range that one region answers.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    pub(super) region: Arc<Region>,
    pub(super) offset: u64,
}

/// Pieces of a window: mostly the one that changes and its neighbours.
pub(super) type Pieces = SmallVec<[Piece; 4]>;

/// Adds to `pieces`, of which there are none yet, what `root` shows in `window`, sorted, in as few as
/// possible. O(n log n) in the regions that touch the window.
pub(super) fn render(root: &Arc<Region>, window: Range<u64>, pieces: &mut Pieces) {
    collect(root, 0, window, pieces);
    sweep(pieces);
}

/// Collects what answers in the window, front to back. `base` is the address of the region's
/// first byte; an alias can put it below zero.
fn collect(region: &Arc<Region>, base: i128, clip: Range<u64>, out: &mut Pieces) {
    let end = base + i128::from(region.size());
    let start = u64::try_from(base.max(i128::from(clip.start))).unwrap_or(u64::MAX);
    let end = u64::try_from(end.clamp(0, i128::from(clip.end))).unwrap_or(0);
    if start >= end {
        return;
    }
    let state = region.state();
    if state.disabled {
        return;
    }
    if let RegionKind::Alias { target, offset } = region.kind() {
        drop(state);
        collect(target, base - i128::from(*offset), start..end, out);
        return;
    }
    for child in &state.children {
        let first = base + i128::from(child.offset);
        let touches = first < i128::from(end) && first + i128::from(child.size) > i128::from(start);
        if child.enabled && touches {
            collect(&child.region, first, start..end, out);
        }
    }
    if !matches!(region.kind(), RegionKind::Container) {
        let offset = u64::try_from(i128::from(start) - base).unwrap_or(0);
        out.push(Piece {
            range: start..end,
            region: Arc::clone(region),
            offset,
        });
    }
}

/// Resolves overlaps: candidates come front to back.
fn sweep(candidates: &mut Pieces) {
    // What mostly goes or comes: one thing and nothing beside it.
    if candidates.len() < 2 {
        return;
    }
    let mut by_start: SmallVec<[usize; 8]> = (0..candidates.len()).collect();
    by_start.sort_by_key(|at| candidates[*at].range.start);
    let overlap = |pair: &[usize]| candidates[pair[0]].range.end > candidates[pair[1]].range.start;
    if !by_start.windows(2).any(overlap) {
        candidates.sort_by_key(|piece| piece.range.start);
        candidates.dedup_by(|next, last| {
            let one = goes_on(last.shown(), next.shown());
            if one {
                last.range.end = next.range.end;
            }
            one
        });
        return;
    }
    let mut borders: Vec<u64> = candidates
        .iter()
        .flat_map(|piece| [piece.range.start, piece.range.end])
        .collect();
    borders.sort_unstable();
    borders.dedup();
    let mut coming = by_start.into_iter().peekable();
    let mut present = BinaryHeap::new();
    let mut pieces = Pieces::new();
    for pair in borders.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        while let Some(at) = coming.next_if(|at| candidates[*at].range.start <= start) {
            present.push(Reverse(at));
        }
        while present
            .peek()
            .is_some_and(|Reverse(at)| candidates[*at].range.end <= start)
        {
            present.pop();
        }
        let Some(Reverse(front)) = present.peek() else {
            continue;
        };
        let piece = &candidates[*front];
        let offset = piece.offset + (start - piece.range.start);
        match pieces.last_mut() {
            Some(last) if goes_on(last.shown(), (&(start..end), &piece.region, offset)) => {
                last.range.end = end;
            }
            _ => pieces.push(Piece {
                range: start..end,
                region: Arc::clone(&piece.region),
                offset,
            }),
        }
    }
    *candidates = pieces;
}

/// A range, the region that answers it, and where in the region it starts.
pub(super) type Shown<'a> = (&'a Range<u64>, &'a Arc<Region>, u64);

/// Whether `next` is where `last` goes on.
pub(super) fn goes_on((range, region, offset): Shown<'_>, next: Shown<'_>) -> bool {
    range.end == next.0.start
        && Arc::ptr_eq(region, next.1)
        && offset + (range.end - range.start) == next.2
}

impl Piece {
    pub(super) fn shown(&self) -> Shown<'_> {
        (&self.range, &self.region, self.offset)
    }
}
