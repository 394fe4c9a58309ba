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
pub(super) struct Plan {
    pub(super) pieces: Vec<Piece>,
    /// Bytes that need a buffer, and the address of the first of them.
    pub(super) bounced: Option<(Gpa, u64)>,
    /// Bytes that may be bounced.
    limit: u64,
    /// Keeps invalidations of the translations used waiting.
    pub(super) flights: Vec<Flight>,
}

impl Plan {
    /// Looks `ranges` up, of which at most `limit` bytes may have to be bounced.
    pub(super) fn new(
        space: &AddressSpace,
        reader: &Reader,
        ranges: &[(Gpa, u32)],
        access: Access,
        limit: u64,
    ) -> Result<Plan, AccessError> {
        let mut plan = Plan {
            pieces: Vec::new(),
            bounced: None,
            limit,
            flights: Vec::new(),
        };
        for (gpa, len) in ranges {
            plan.extend(space, None, reader, *gpa, u64::from(*len), access, 0)?;
        }
        Ok(plan)
    }

    fn push(&mut self, piece: Piece) -> Result<(), AccessError> {
        if piece.bounce {
            let (gpa, before) = self.bounced.unwrap_or((piece.gpa, 0));
            let (len, limit) = (before + piece.len, self.limit);
            if len > limit {
                return Err(AccessError::BounceLimit { gpa, len, limit });
            }
            self.bounced = Some((gpa, len));
        }
        self.pieces.push(piece);
        Ok(())
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
                self.push(Piece {
                    space: shared.cloned(),
                    gpa: at,
                    len: found.len,
                    bounce: found.bounce,
                })?;
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
        let range = offset..offset.saturating_add(len);
        let (flight, result) = domain.fly(range, || {
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
        });
        self.flights.push(flight);
        result
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
    let here = (entry.last() - gpa.raw()).saturating_add(1).min(len);
    let found = |bounce| Found {
        len: here,
        bounce,
        translated: None,
    };
    let section = &entry.flat().section;
    if entry.kind() & RAM != 0 && !(access.writes() && entry.kind() & READONLY != 0) {
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
