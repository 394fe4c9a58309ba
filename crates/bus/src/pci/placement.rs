// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which address each BAR and each bridge's window gets before the guest starts: one bus of what firmware would do.

use std::collections::BTreeMap;
use std::ops::Range;

use super::bar::{BarKind, Windows};
use super::{Devfn, PciError};

/// Addresses given out on one bus. What has an address keeps it until its function is forgotten.
#[derive(Clone, Default)]
pub(super) struct Placement {
    /// The windows the addresses are from.
    within: Option<Windows>,
    placed: BTreeMap<(Devfn, Part), Range<u64>>,
}

/// What of a function has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// A BAR, by its number.
    Bar(u8),
    /// A bridge's memory window.
    Memory,
    /// A bridge's prefetchable window.
    Prefetchable,
}

/// Something that wants an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) devfn: Devfn,
    pub(super) part: Part,
    pub(super) size_bytes: u64,
    /// A power of two.
    pub(super) align_bytes: u64,
    pub(super) kind: BarKind,
}

/// Room for all requests of a kind: how much, and aligned to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) size_bytes: u64,
    pub(super) align_bytes: u64,
}

impl Placement {
    /// Gives each request that has no address yet one, those of the largest alignment first so that alignment wastes
    /// little. The first that fits nowhere is returned as an error, after all others were placed. Addresses from other
    /// windows than these are given up.
    ///
    /// `mixed`: what is not prefetchable may be placed in the 64-bit window, as on the root bus.
    pub(super) fn place(
        &mut self,
        windows: &Windows,
        mixed: bool,
        mut requests: Vec<Request>,
    ) -> Result<(), PciError> {
        if self.within.as_ref() != Some(windows) {
            self.placed.clear();
            self.within = Some(windows.clone());
        }
        requests.retain(|request| !self.has_room_for(request));
        requests.sort_by_key(|request| {
            let (align, size) = (request.align_bytes, request.size_bytes);
            (
                u64::MAX - align,
                u64::MAX - size,
                request.devfn,
                request.part,
            )
        });
        let mut result = Ok(());
        for request in requests {
            let free = windows_for(windows, request.kind, mixed)
                .find_map(|window| self.free(window, request.size_bytes, request.align_bytes));
            match free {
                Some(range) => {
                    self.placed.insert((request.devfn, request.part), range);
                }
                None => result = result.and(Err(request.no_room())),
            }
        }
        result
    }

    /// The range of a function's part.
    pub(super) fn range(&self, devfn: Devfn, part: Part) -> Option<Range<u64>> {
        self.placed.get(&(devfn, part)).cloned()
    }

    /// Gives a function's addresses back.
    pub(super) fn forget(&mut self, devfn: Devfn) {
        self.placed.retain(|&(owner, _), _| owner != devfn);
    }

    /// Gives all addresses back.
    pub(super) fn clear(&mut self) {
        self.placed.clear();
    }

    /// Whether a request has an address already. A window that has become too small is given up.
    fn has_room_for(&mut self, request: &Request) -> bool {
        let key = (request.devfn, request.part);
        match self.placed.get(&key) {
            Some(range) if range.end - range.start >= request.size_bytes => true,
            _ => {
                self.placed.remove(&key);
                false
            }
        }
    }

    /// The lowest aligned free range.
    fn free(&self, window: &Range<u64>, size_bytes: u64, align_bytes: u64) -> Option<Range<u64>> {
        let ends = self.placed.values().map(|range| range.end);
        std::iter::once(window.start)
            .chain(ends)
            .filter_map(|start| {
                let start = start.checked_next_multiple_of(align_bytes)?;
                Some(start..start.checked_add(size_bytes)?)
            })
            .filter(|range| window.start <= range.start && range.end <= window.end)
            .filter(|range| {
                self.placed
                    .values()
                    .all(|other| range.end <= other.start || other.end <= range.start)
            })
            .min_by_key(|range| range.start)
    }
}

impl Request {
    fn no_room(&self) -> PciError {
        let (devfn, size_bytes) = (self.devfn, self.size_bytes);
        match self.part {
            Part::Bar(index) => PciError::NoRoom {
                devfn,
                index,
                size_bytes,
            },
            Part::Memory | Part::Prefetchable => PciError::NoRoomBehind { devfn, size_bytes },
        }
    }
}

/// How much room requests need in a window of their kind: prefetchable 64-bit ones, or all others in memory.
pub(super) fn extent(requests: &[Request], prefetchable: bool) -> Option<Extent> {
    let mut of_kind = requests.to_vec();
    of_kind.retain(|request| {
        request.kind != BarKind::Io && request.kind.is_prefetchable() == prefetchable
    });
    let align_bytes = of_kind.iter().map(|request| request.align_bytes).max()?;
    // Laid out from 0, which has any alignment: at a base aligned as the largest it fits in the same way.
    let unlimited = Windows {
        mmio32: 0..u64::MAX,
        mmio64: 0..u64::MAX,
        io: 0..0,
    };
    let mut trial = Placement::default();
    trial.place(&unlimited, false, of_kind).ok()?;
    let size_bytes = trial.placed.values().map(|range| range.end).max()?;
    Some(Extent {
        size_bytes,
        align_bytes,
    })
}

/// Where a request may go, the best first. A window of addresses below 4 GiB can hold anything.
fn windows_for(windows: &Windows, kind: BarKind, mixed: bool) -> impl Iterator<Item = &Range<u64>> {
    let (first, second) = match kind {
        BarKind::Mem32 => (&windows.mmio32, None),
        BarKind::Io => (&windows.io, None),
        BarKind::Mem64 {
            prefetchable: false,
        } => (&windows.mmio32, mixed.then_some(&windows.mmio64)),
        BarKind::Mem64 { prefetchable: true } => (&windows.mmio64, Some(&windows.mmio32)),
    };
    std::iter::once(first).chain(second)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MEM64: BarKind = BarKind::Mem64 { prefetchable: true };

    fn windows() -> Windows {
        Windows {
            mmio32: 0xc000_0000..0xc040_0000,
            mmio64: 1 << 36..(1 << 36) + 64 * MIB,
            io: 0xc000..0x1_0000,
        }
    }

    fn request(slot: u8, index: u8, size_bytes: u64, kind: BarKind) -> Request {
        Request {
            devfn: Devfn::new(slot, 0).unwrap(),
            part: Part::Bar(index),
            size_bytes,
            align_bytes: size_bytes,
            kind,
        }
    }

    #[test]
    fn aligned_apart_and_in_the_right_window() {
        let mut placement = Placement::default();
        let requests = vec![
            request(1, 0, 4096, BarKind::Mem32),
            request(2, 0, MIB, BarKind::Mem32),
            request(1, 2, 16 * MIB, MEM64),
            request(3, 2, 4096, MEM64),
        ];
        placement.place(&windows(), true, requests.clone()).unwrap();
        for request in &requests {
            let range = placement.range(request.devfn, request.part).unwrap();
            assert_eq!(range.start % request.size_bytes, 0);
            let window = if request.kind == MEM64 {
                windows().mmio64
            } else {
                windows().mmio32
            };
            assert!(window.start <= range.start && range.end <= window.end);
        }
        let ranges: Vec<_> = placement.placed.values().collect();
        for (n, a) in ranges.iter().enumerate() {
            assert!(
                ranges[n + 1..]
                    .iter()
                    .all(|b| a.end <= b.start || b.end <= a.start)
            );
        }
    }

    #[test]
    fn addresses_stay_and_freed_ones_are_used_again() {
        let mut placement = Placement::default();
        let (a, b, c) = (
            request(1, 0, 4096, BarKind::Mem32),
            request(2, 0, 4096, BarKind::Mem32),
            request(3, 0, MIB, BarKind::Mem32),
        );
        placement.place(&windows(), true, vec![a, b]).unwrap();
        let (first, second) = (
            placement.range(a.devfn, Part::Bar(0)),
            placement.range(b.devfn, Part::Bar(0)),
        );
        placement.forget(a.devfn);
        placement.place(&windows(), true, vec![b, c]).unwrap();
        assert_eq!(placement.range(b.devfn, Part::Bar(0)), second);
        assert_eq!(placement.range(a.devfn, Part::Bar(0)), None);
        placement.place(&windows(), true, vec![a]).unwrap();
        assert_eq!(placement.range(a.devfn, Part::Bar(0)), first);
    }

    #[test]
    fn what_does_not_fit_is_named_and_the_rest_is_placed() {
        let mut placement = Placement::default();
        let (large, small) = (
            request(1, 0, 8 * MIB, BarKind::Mem32),
            request(2, 0, 4096, BarKind::Mem32),
        );
        let error = placement
            .place(&windows(), true, vec![large, small])
            .unwrap_err();
        assert!(
            matches!(error, PciError::NoRoom { index: 0, size_bytes, .. } if size_bytes == 8 * MIB)
        );
        assert!(placement.range(small.devfn, Part::Bar(0)).is_some());
    }

    #[test]
    fn a_64_bit_bar_takes_the_other_window_when_its_own_is_full() {
        let mut placement = Placement::default();
        let requests = vec![request(1, 0, 64 * MIB, MEM64), request(2, 0, MIB, MEM64)];
        placement.place(&windows(), true, requests.clone()).unwrap();
        assert!(
            windows().mmio32.contains(
                &placement
                    .range(requests[1].devfn, Part::Bar(0))
                    .unwrap()
                    .start
            )
        );
    }
}
