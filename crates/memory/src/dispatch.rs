// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Transfers to whatever answers: RAM, ROM devices, registers, what an IOMMU translates to.
//!
//! No lock is taken on the way. The view is read in a read section; registers are called outside
//! of it, through the gate of their device.

use std::sync::Arc;

use crate::index::{RAM, READONLY};
use crate::iommu::MAX_TRANSLATIONS;
use crate::tree::{Refused, RegionKind, Registers};
use crate::{Access, AccessError, AddressSpace, Gpa, Reader, Region};

/// What is transferred, from the point of view of the one who does it.
pub(crate) enum Bytes<'b> {
    /// Read from the address space. What does not answer gives all ones.
    Load(&'b mut [u8]),
    /// Written to it.
    Store(&'b [u8]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Bytes::Load(bytes) => bytes.len(),
            Bytes::Store(bytes) => bytes.len(),
        }
    }

    fn part(&mut self, start: usize, len: usize) -> Bytes<'_> {
        match self {
            Bytes::Load(bytes) => Bytes::Load(&mut bytes[start..start + len]),
            Bytes::Store(bytes) => Bytes::Store(&bytes[start..start + len]),
        }
    }

    fn access(&self) -> Access {
        match self {
            Bytes::Load(_) => Access::Read,
            Bytes::Store(_) => Access::Write,
        }
    }

    fn fill_ones(&mut self) {
        if let Bytes::Load(bytes) = self {
            bytes.fill(0xff);
        }
    }
}

/// What to do about a part that does not answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnError {
    /// Go on: a CPU's access, every byte of which goes its own way.
    GoOn,
    /// Stop: DMA.
    Stop,
}

/// One piece: how many bytes it had, and what became of it.
type Outcome = (usize, Result<(), AccessError>);

/// Transfers to or from `addr` on. The error is that of the first part that did not answer.
pub(crate) fn transfer(
    space: &AddressSpace,
    reader: &Reader,
    addr: u64,
    bytes: Bytes<'_>,
    on_error: OnError,
) -> Result<(), AccessError> {
    translated(space, reader, addr, bytes, on_error, 0)
}

fn translated(
    space: &AddressSpace,
    reader: &Reader,
    addr: u64,
    mut bytes: Bytes<'_>,
    on_error: OnError,
    depth: u8,
) -> Result<(), AccessError> {
    let len = bytes.len();
    let mut result = Ok(());
    let mut done = 0;
    while done < len {
        let (count, outcome) = match addr.checked_add(done as u64) {
            Some(at) => {
                let rest = bytes.part(done, len - done);
                piece(space, reader, at, rest, on_error, depth)
            }
            None => {
                bytes.part(done, len - done).fill_ones();
                let (gpa, len) = (Gpa(addr), len as u64);
                (len as usize, Err(AccessError::Overflow { gpa, len }))
            }
        };
        done = done.saturating_add(count);
        if outcome.is_err() && on_error == OnError::Stop {
            return outcome;
        }
        result = result.and(outcome);
    }
    result
}

/// Transfers the first piece of `bytes`.
fn piece(
    space: &AddressSpace,
    reader: &Reader,
    at: u64,
    mut bytes: Bytes<'_>,
    on_error: OnError,
    depth: u8,
) -> Outcome {
    let (gpa, len) = (Gpa(at), bytes.len() as u64);
    let guard = space.read(reader);
    let Some(entry) = guard.entry(at) else {
        let count = run(len, |next| {
            at.checked_add(next)
                .is_none_or(|address| guard.entry(address).is_none())
        });
        bytes.part(0, count).fill_ones();
        return (count, Err(AccessError::Unmapped { gpa, len }));
    };
    let here = (entry.last() - at).saturating_add(1).min(len);
    let hidden = bytes.access().writes() && entry.kind() & READONLY != 0;
    if entry.kind() & RAM != 0 && !hidden {
        let mut here = bytes.part(0, here as usize);
        let outcome = match &mut here {
            Bytes::Load(bytes) => guard.read_bytes(gpa, bytes),
            Bytes::Store(bytes) => guard.write_bytes(gpa, bytes),
        };
        let Err(error) = outcome else {
            return (here.len(), Ok(()));
        };
        // What lies before the part that failed is done.
        let failed = match error {
            AccessError::Unplugged { gpa, .. } => gpa.raw().saturating_sub(at) as usize,
            _ => 0,
        };
        let failed = failed.min(here.len() - 1);
        let rest = (here.len() - failed) as u64;
        let count = run(rest, |next| {
            let gpa = Gpa(at + failed as u64 + next);
            guard.read_bytes(gpa, &mut [0]).is_err()
        });
        here.part(failed, count).fill_ones();
        return (failed + count, Err(error));
    }
    let section = &entry.flat().section;
    let region = Arc::clone(&section.region);
    let offset = section.offset_in_region + (at - section.range.start);
    // Registers may do anything, also change the map and wait for readers.
    drop(guard);
    let here = bytes.part(0, here as usize);
    let outcome = beside_ram(reader, &region, offset, gpa, here, on_error, depth);
    // By now the device may be gone, and nobody else know them.
    space.memory().sweeper().let_go(region);
    outcome
}

/// Of `len` bytes, the first of which does not answer, how many do not; no more than a CPU's
/// access has. They are found in one section: were each byte looked up in a view of its own, a
/// map that changes meanwhile would tear an access that is one for the CPU.
fn run(len: u64, silent: impl Fn(u64) -> bool) -> usize {
    let more = (1..len.min(8)).take_while(|next| silent(*next)).count();
    1 + more
}

/// Transfers a piece that is not plain RAM: `offset` of `region`.
fn beside_ram(
    reader: &Reader,
    region: &Region,
    offset: u64,
    gpa: Gpa,
    mut bytes: Bytes<'_>,
    on_error: OnError,
    depth: u8,
) -> Outcome {
    let count = bytes.len();
    let len = count as u64;
    match region.kind() {
        RegionKind::Mmio(registers) | RegionKind::RomDevice { registers, .. } => {
            (count, registered(registers, offset, gpa, bytes))
        }
        RegionKind::Iommu(domain) => {
            let range = offset..offset.saturating_add(len);
            let (_flight, translation) =
                domain.fly(range, || domain.translate(offset, len, bytes.access()));
            let Some(to) = translation.filter(|_| depth < MAX_TRANSLATIONS) else {
                bytes.part(0, 1).fill_ones();
                return (1, Err(AccessError::Untranslated { gpa, len }));
            };
            let bytes = bytes.part(0, to.len as usize);
            let target = to.target.raw();
            let outcome = translated(&to.space, reader, target, bytes, on_error, depth + 1);
            (to.len as usize, outcome)
        }
        RegionKind::Ram { .. } => (count, Err(AccessError::ReadOnly { gpa, len })),
        RegionKind::Container | RegionKind::Reservation | RegionKind::Alias { .. } => {
            bytes.fill_ones();
            (count, Err(AccessError::NotRam { gpa, len }))
        }
    }
}

fn registered(
    registers: &Registers,
    offset: u64,
    gpa: Gpa,
    bytes: Bytes<'_>,
) -> Result<(), AccessError> {
    let len = bytes.len() as u64;
    let outcome = match bytes {
        Bytes::Load(bytes) => registers.load(offset, bytes),
        Bytes::Store(bytes) => registers.store(offset, bytes),
    };
    outcome.map_err(|refused| match refused {
        Refused::Access => AccessError::Refused { gpa, len },
        Refused::Busy => AccessError::Reentrant { gpa, len },
    })
}
