// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which addresses and slots DIMMs get.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::acpi::MemoryHotplug;
use ebbtide_memory::{Memory, Region};

use super::{DimmError, DimmSpec};

/// Linux adds and removes memory by sections: 128 MiB on x86-64 (a guest with 64 GiB of boot RAM or more may use up to
/// 2 GiB).
pub const SECTION_BYTES: u64 = 128 << 20;
/// No page that maps guest memory is larger.
const LARGEST_PAGE: u64 = 1 << 30;

/// Where DIMMs may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DimmArea {
    /// Guest-physical addresses, which the guest is told of at boot.
    pub range: Range<u64>,
    /// What a guest adds and removes at once, in bytes: [`SECTION_BYTES`] for most. A power of two.
    pub unit_bytes: u64,
    /// Priority in the map: that of the machine's other RAM, so that the map refuses overlaps, and above that of BARs.
    pub priority: i32,
}

/// The machine's DIMM slots, and the addresses DIMMs are placed in.
///
/// A DIMM goes to the lowest free address that is a multiple of the largest power of two in its size, at most 1 GiB:
/// so it can be mapped by the largest pages its size allows, and no address between DIMMs of one size is lost. Nothing is
/// smaller than the bank's unit. Other memory devices in the same addresses are [reserved](DimmBank::reserve).
pub struct DimmBank {
    pub(super) memory: Arc<Memory>,
    pub(super) root: Arc<Region>,
    pub(super) registers: Arc<MemoryHotplug>,
    pub(super) area: DimmArea,
    places: Mutex<Vec<Place>>,
}

/// Addresses somebody has, by address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    range: Range<u64>,
    owner: String,
    slot: Option<u16>,
}

impl DimmBank {
    /// A bank without DIMMs. They are mapped into `root`, the region of guest-physical addresses from 0 on, and announced
    /// by `registers`.
    ///
    /// # Errors
    /// [`DimmError::Area`].
    pub fn new(
        memory: &Arc<Memory>,
        root: &Arc<Region>,
        registers: &Arc<MemoryHotplug>,
        area: DimmArea,
    ) -> Result<Arc<DimmBank>, DimmError> {
        let (range, unit_bytes) = (&area.range, area.unit_bytes);
        let reason = if !unit_bytes.is_power_of_two() {
            Some("the unit is no power of two")
        } else if range.is_empty() {
            Some("it is empty")
        } else if !range.start.is_multiple_of(unit_bytes) {
            Some("it does not start at a whole unit")
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(DimmError::Area {
                area: area.range,
                unit_bytes,
                reason,
            });
        }
        Ok(Arc::new(DimmBank {
            memory: Arc::clone(memory),
            root: Arc::clone(root),
            registers: Arc::clone(registers),
            area,
            places: Mutex::default(),
        }))
    }

    /// The registers behind the slots.
    pub fn registers(&self) -> &Arc<MemoryHotplug> {
        &self.registers
    }

    /// Where DIMMs may be.
    pub fn area(&self) -> &DimmArea {
        &self.area
    }

    /// Keeps DIMMs out of the addresses of another memory device, until [`release`](Self::release).
    ///
    /// # Errors
    /// [`DimmError::Overlap`] when something is there; [`DimmError::DuplicateId`].
    pub fn reserve(&self, id: &str, range: Range<u64>) -> Result<(), DimmError> {
        let mut places = self.lock();
        check_id(&places, id)?;
        check_free(&places, id, &range)?;
        insert(
            &mut places,
            Place {
                range,
                owner: id.to_owned(),
                slot: None,
            },
        );
        Ok(())
    }

    /// Gives back what a memory device reserved. An id without a reservation is ignored.
    pub fn release(&self, id: &str) {
        self.lock()
            .retain(|place| place.owner != id || place.slot.is_some());
    }

    /// Gives back what a DIMM had claimed.
    pub(super) fn free(&self, slot: u16) {
        self.lock().retain(|place| place.slot != Some(slot));
    }

    /// Chooses slot and addresses for `spec`'s DIMM and keeps them for it.
    pub(super) fn claim(
        &self,
        spec: &DimmSpec,
        size_bytes: u64,
        page_bytes: u64,
    ) -> Result<(u16, Range<u64>), DimmError> {
        let align = self.area.unit_bytes.max(page_bytes);
        self.check_size(spec, size_bytes, align)?;
        let mut places = self.lock();
        check_id(&places, &spec.id)?;
        let slot = self.choose_slot(&places, spec)?;
        let range = match spec.addr {
            Some(addr) => self.check_address(&places, spec, addr, size_bytes, align)?,
            None => self.choose_address(&places, spec, size_bytes, align)?,
        };
        insert(
            &mut places,
            Place {
                range: range.clone(),
                owner: spec.id.clone(),
                slot: Some(slot),
            },
        );
        Ok((slot, range))
    }

    fn check_size(&self, spec: &DimmSpec, size_bytes: u64, align: u64) -> Result<(), DimmError> {
        if size_bytes == 0 {
            return Err(DimmError::Empty(spec.id.clone()));
        }
        if !size_bytes.is_multiple_of(align) {
            return Err(misaligned(spec, "size", size_bytes, align));
        }
        Ok(())
    }

    fn choose_slot(&self, places: &[Place], spec: &DimmSpec) -> Result<u16, DimmError> {
        let slots = self.registers.slots();
        let owner = |slot: u16| places.iter().find(|place| place.slot == Some(slot));
        let Some(slot) = spec.slot else {
            return (0..slots)
                .find(|&slot| owner(slot).is_none())
                .ok_or_else(|| DimmError::NoFreeSlot {
                    id: spec.id.clone(),
                    slots,
                });
        };
        if let Err(source) = self.registers.state(slot) {
            return Err(DimmError::Slot {
                id: spec.id.clone(),
                source,
            });
        }
        match owner(slot) {
            None => Ok(slot),
            Some(place) => Err(DimmError::SlotTaken {
                id: spec.id.clone(),
                slot,
                other: place.owner.clone(),
            }),
        }
    }

    fn check_address(
        &self,
        places: &[Place],
        spec: &DimmSpec,
        addr: u64,
        size_bytes: u64,
        align: u64,
    ) -> Result<Range<u64>, DimmError> {
        if !addr.is_multiple_of(align) {
            return Err(misaligned(spec, "address", addr, align));
        }
        let range = addr..addr.saturating_add(size_bytes);
        if range.start < self.area.range.start || range.end > self.area.range.end {
            return Err(DimmError::OutsideArea {
                id: spec.id.clone(),
                range,
                area: self.area.range.clone(),
            });
        }
        check_free(places, &spec.id, &range)?;
        Ok(range)
    }

    fn choose_address(
        &self,
        places: &[Place],
        spec: &DimmSpec,
        size_bytes: u64,
        align: u64,
    ) -> Result<Range<u64>, DimmError> {
        let own = 1 << size_bytes.trailing_zeros();
        let wanted = align.max(LARGEST_PAGE.min(own));
        let gaps = self.gaps(places);
        // A coarser alignment is a wish: what only fits without it gets in too.
        for align in [wanted, align] {
            let fits = |gap: &Range<u64>| {
                let start = gap.start.checked_next_multiple_of(align)?;
                let end = start.checked_add(size_bytes)?;
                (end <= gap.end).then_some(start..end)
            };
            if let Some(range) = gaps.iter().find_map(fits) {
                return Ok(range);
            }
        }
        let room = |gap: &Range<u64>| {
            let start = gap.start.checked_next_multiple_of(align)?;
            Some(gap.end.checked_sub(start)? / align * align)
        };
        Err(DimmError::TooLarge {
            id: spec.id.clone(),
            size_bytes,
            largest_bytes: gaps.iter().filter_map(room).max().unwrap_or(0),
        })
    }

    /// What is free of the area, by address.
    fn gaps(&self, places: &[Place]) -> Vec<Range<u64>> {
        let area = &self.area.range;
        let mut gaps = Vec::new();
        let mut next = area.start;
        for place in places {
            let end = place.range.start.min(area.end);
            if next < end {
                gaps.push(next..end);
            }
            next = next.max(place.range.end);
        }
        if next < area.end {
            gaps.push(next..area.end);
        }
        gaps
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Place>> {
        // Nothing panics while it is held.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn misaligned(spec: &DimmSpec, what: &'static str, value: u64, align: u64) -> DimmError {
    DimmError::Misaligned {
        id: spec.id.clone(),
        what,
        value,
        align,
    }
}

fn check_id(places: &[Place], id: &str) -> Result<(), DimmError> {
    match places.iter().any(|place| place.owner == id) {
        true => Err(DimmError::DuplicateId(id.to_owned())),
        false => Ok(()),
    }
}

fn check_free(places: &[Place], id: &str, range: &Range<u64>) -> Result<(), DimmError> {
    let overlaps = |place: &&Place| place.range.start < range.end && range.start < place.range.end;
    match places.iter().find(overlaps) {
        None => Ok(()),
        Some(place) => Err(DimmError::Overlap {
            id: id.to_owned(),
            range: range.clone(),
            other: place.owner.clone(),
            there: place.range.clone(),
        }),
    }
}

fn insert(places: &mut Vec<Place>, place: Place) {
    let at = places.partition_point(|other| other.range.start < place.range.start);
    places.insert(at, place);
}
