// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which address each BAR gets before the guest starts: what firmware would do.

use std::collections::BTreeMap;
use std::ops::Range;

use super::bar::{BarKind, BarSpec, Windows};
use super::{Devfn, PciError};

/// Addresses given to BARs. A BAR keeps its address until its function is forgotten.
#[derive(Default)]
pub(super) struct Placement {
    placed: BTreeMap<(Devfn, u8), Range<u64>>,
}

/// A BAR that wants an address.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) devfn: Devfn,
    pub(super) index: u8,
    pub(super) spec: BarSpec,
}

impl Placement {
    /// Gives each BAR that has none yet an address, naturally aligned, the largest first so that alignment wastes
    /// nothing. The first BAR that fits nowhere is returned as an error, after all others were placed.
    pub(super) fn place(
        &mut self,
        windows: &Windows,
        mut requests: Vec<Request>,
    ) -> Result<(), PciError> {
        requests.retain(|request| !self.placed.contains_key(&(request.devfn, request.index)));
        requests.sort_by_key(|request| {
            (
                u64::MAX - request.spec.size_bytes,
                request.devfn,
                request.index,
            )
        });
        let mut result = Ok(());
        for Request { devfn, index, spec } in requests {
            match windows_for(windows, spec.kind)
                .find_map(|window| self.free(window, spec.size_bytes))
            {
                Some(range) => {
                    self.placed.insert((devfn, index), range);
                }
                None => {
                    result = result.and(Err(PciError::NoRoom {
                        devfn,
                        index,
                        size_bytes: spec.size_bytes,
                    }))
                }
            }
        }
        result
    }

    /// The address of a BAR.
    pub(super) fn address(&self, devfn: Devfn, index: u8) -> Option<u64> {
        self.placed.get(&(devfn, index)).map(|range| range.start)
    }

    /// Gives a function's addresses back.
    pub(super) fn forget(&mut self, devfn: Devfn) {
        self.placed.retain(|&(owner, _), _| owner != devfn);
    }

    /// The lowest aligned free range.
    fn free(&self, window: &Range<u64>, size_bytes: u64) -> Option<Range<u64>> {
        let ends = self.placed.values().map(|range| range.end);
        std::iter::once(window.start)
            .chain(ends)
            .filter_map(|start| {
                let start = start.checked_next_multiple_of(size_bytes)?;
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

/// Where a BAR may go, the best first.
fn windows_for(windows: &Windows, kind: BarKind) -> impl Iterator<Item = &Range<u64>> {
    let (first, second) = match kind {
        BarKind::Mem32 => (&windows.mmio32, None),
        BarKind::Io => (&windows.io, None),
        BarKind::Mem64 {
            prefetchable: false,
        } => (&windows.mmio32, Some(&windows.mmio64)),
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
            index,
            spec: BarSpec { size_bytes, kind },
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
        placement.place(&windows(), requests.clone()).unwrap();
        for Request { devfn, index, spec } in &requests {
            let address = placement.address(*devfn, *index).unwrap();
            assert_eq!(address % spec.size_bytes, 0);
            let window = if spec.kind == MEM64 {
                windows().mmio64
            } else {
                windows().mmio32
            };
            assert!(window.contains(&address) && address + spec.size_bytes <= window.end);
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
        placement.place(&windows(), vec![a, b]).unwrap();
        let (first, second) = (placement.address(a.devfn, 0), placement.address(b.devfn, 0));
        placement.forget(a.devfn);
        placement.place(&windows(), vec![b, c]).unwrap();
        assert_eq!(placement.address(b.devfn, 0), second);
        assert_eq!(placement.address(a.devfn, 0), None);
        placement.place(&windows(), vec![a]).unwrap();
        assert_eq!(placement.address(a.devfn, 0), first);
    }

    #[test]
    fn what_does_not_fit_is_named_and_the_rest_is_placed() {
        let mut placement = Placement::default();
        let (large, small) = (
            request(1, 0, 8 * MIB, BarKind::Mem32),
            request(2, 0, 4096, BarKind::Mem32),
        );
        let error = placement.place(&windows(), vec![large, small]).unwrap_err();
        assert!(
            matches!(error, PciError::NoRoom { index: 0, size_bytes, .. } if size_bytes == 8 * MIB)
        );
        assert!(placement.address(small.devfn, 0).is_some());
    }

    #[test]
    fn a_64_bit_bar_takes_the_other_window_when_its_own_is_full() {
        let mut placement = Placement::default();
        let requests = vec![request(1, 0, 64 * MIB, MEM64), request(2, 0, MIB, MEM64)];
        placement.place(&windows(), requests.clone()).unwrap();
        assert!(
            windows()
                .mmio32
                .contains(&placement.address(requests[1].devfn, 0).unwrap())
        );
    }
}
