// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a request is made of: pieces that can be pinned, and pieces that must be bounced.

use std::sync::Arc;

use crate::index::{RAM, READONLY};
use crate::iommu::{Flight, MAX_TRANSLATIONS};
use crate::tree::RegionKind;
use crate::{Access, AccessError, AddressSpace, Gpa, Reader, Region};

/// One piece, in the order of the request.
pub(super) struct Piece {
    /// Where an IOMMU led to; `None` for the device's own address space.
    pub(super) space: Option<Arc<AddressSpace>>,
    pub(super) gpa: Gpa,
    pub(super) len: u64,
    /// Not RAM, or not for this access.
    pub(super) bounce: bool,
}

/// The pieces of a request.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) pieces: Vec<Piece>,
    /// Keeps invalidations of the translations used waiting.
    pub(super) flights: Vec<Flight>,
}

impl Plan {
    /// Looks `ranges` up.
    pub(super) fn new(
        space: &AddressSpace,
        reader: &Reader,
        ranges: &[(Gpa, u32)],
        access: Access,
    ) -> Result<Plan, AccessError> {
        let mut plan = Plan::default();
        for (gpa, len) in ranges {
            plan.extend(space, None, reader, *gpa, u64::from(*len), access, 0)?;
        }
        Ok(plan)
    }

    /// Bytes that need a buffer, and the address of the first of them.
    pub(super) fn bounced(&self) -> Option<(Gpa, u64)> {
        let mut pieces = self.pieces.iter().filter(|piece| piece.bounce);
        let first = pieces.next()?;
        let rest: u64 = pieces.map(|piece| piece.len).sum();
        Some((first.gpa, first.len + rest))
    }

    #[allow(clippy::too_many_arguments)]
    fn extend(
        &mut self,
        space: &AddressSpace,
        shared: Option<&Arc<AddressSpace>>,
        reader: &Reader,
        gpa: Gpa,
        len: u64,
        access: Access,
        depth: u8,
    ) -> Result<(), AccessError> {
        let mut done = 0;
        while done < len {
            let overflow = AccessError::Overflow { gpa, len };
            let at = gpa.checked_add(done).ok_or(overflow)?;
            let found = look(space, reader, at, len - done, access)?;
            done += found.len;
            let Some((region, offset)) = found.translated else {
                self.pieces.push(Piece {
                    space: shared.cloned(),
                    gpa: at,
                    len: found.len,
                    bounce: found.bounce,
                });
                continue;
            };
            self.translate(reader, &region, offset, at, found.len, access, depth)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn translate(
        &mut self,
        reader: &Reader,
        region: &Region,
        offset: u64,
        at: Gpa,
        len: u64,
        access: Access,
        depth: u8,
    ) -> Result<(), AccessError> {
        let untranslated = |done: u64| AccessError::Untranslated {
            gpa: Gpa(at.raw().saturating_add(done)),
            len: len - done,
        };
        let domain = region.domain().filter(|_| depth < MAX_TRANSLATIONS);
        let domain = domain.ok_or_else(|| untranslated(0))?;
        self.flights
            .push(domain.depart(offset..offset.saturating_add(len)));
        let mut done = 0;
        while done < len {
            let to = domain
                .translate(offset + done, len - done, access)
                .ok_or_else(|| untranslated(done))?;
            done += to.len;
            let (space, target) = (&to.space, to.target);
            self.extend(
                space,
                Some(space),
                reader,
                target,
                to.len,
                access,
                depth + 1,
            )?;
        }
        Ok(())
    }
}

/// What answers at an address, and for how many bytes.
struct Found {
    len: u64,
    bounce: bool,
    /// The IOMMU region that translates it, and where in it.
    translated: Option<(Arc<Region>, u64)>,
}

fn look(
    space: &AddressSpace,
    reader: &Reader,
    gpa: Gpa,
    len: u64,
    access: Access,
) -> Result<Found, AccessError> {
    let guard = space.read(reader);
    let Some(entry) = guard.entry(gpa.raw()) else {
        return Err(AccessError::Unmapped { gpa, len });
    };
    let here = (entry.last - gpa.raw()).saturating_add(1).min(len);
    let found = |bounce| Found {
        len: here,
        bounce,
        translated: None,
    };
    let section = &entry.flat().section;
    if entry.kind & RAM != 0 && !(access.writes() && entry.kind & READONLY != 0) {
        return Ok(found(false));
    }
    match section.region.kind() {
        RegionKind::Mmio(_) | RegionKind::RomDevice { .. } => Ok(found(true)),
        RegionKind::Iommu(_) => {
            let offset = section.offset_in_region + (gpa.raw() - section.range.start);
            Ok(Found {
                translated: Some((Arc::clone(&section.region), offset)),
                ..found(false)
            })
        }
        RegionKind::Ram { .. } => Err(AccessError::ReadOnly { gpa, len }),
        _ => Err(AccessError::NotRam { gpa, len }),
    }
}
