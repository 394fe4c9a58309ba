// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is fixed to places of registers: ioeventfds, and ranges whose writes may be kept back.

use std::ops::Range;
use std::sync::Arc;

use super::region::{Ioeventfd, Region, RegionKind};
use super::transaction::{Transaction, Undo};
use crate::{Error, FlatCoalesced, FlatIoeventfd, FlatSection, Listener, ListenerError};

/// Something at its place in an address space.
#[derive(Clone, PartialEq)]
pub(super) enum Fixture {
    Ioeventfd(FlatIoeventfd),
    Coalesced(FlatCoalesced),
}

impl Fixture {
    /// What of its region's fixtures a section shows.
    pub(super) fn of_section(section: &FlatSection, out: &mut Vec<Fixture>) {
        let len = section.range.end - section.range.start;
        let state = section.region.state();
        for ioeventfd in &state.ioeventfds {
            let at = ioeventfd.offset.checked_sub(section.offset_in_region);
            let Some(at) = at.filter(|at| *at < len) else {
                continue;
            };
            out.push(Fixture::Ioeventfd(FlatIoeventfd {
                addr: section.range.start + at,
                size: ioeventfd.size,
                datamatch: ioeventfd.datamatch,
                fd: Arc::clone(&ioeventfd.fd),
            }));
        }
        for range in &state.coalesced {
            let start = range.start.saturating_sub(section.offset_in_region);
            let end = range.end.saturating_sub(section.offset_in_region).min(len);
            if start < end {
                let base = section.range.start;
                out.push(Fixture::Coalesced(FlatCoalesced {
                    range: base + start..base + end,
                }));
            }
        }
    }

    pub(super) fn addr(&self) -> u64 {
        match self {
            Fixture::Ioeventfd(ioeventfd) => ioeventfd.addr,
            Fixture::Coalesced(coalesced) => coalesced.range.start,
        }
    }

    /// By address, ioeventfds of one address by what they match.
    pub(super) fn order(&self) -> (u64, u8, u8, Option<u64>) {
        match self {
            Fixture::Ioeventfd(it) => (it.addr, 0, it.size, it.datamatch),
            Fixture::Coalesced(it) => (it.range.start, 1, 0, None),
        }
    }

    pub(super) fn tell(&self, listener: &mut dyn Listener) -> Result<(), ListenerError> {
        match self {
            Fixture::Ioeventfd(ioeventfd) => listener.ioeventfd_add(ioeventfd),
            Fixture::Coalesced(coalesced) => listener.coalesced_add(coalesced),
        }
    }

    pub(super) fn untell(&self, listener: &mut dyn Listener) {
        match self {
            Fixture::Ioeventfd(ioeventfd) => listener.ioeventfd_del(ioeventfd),
            Fixture::Coalesced(coalesced) => listener.coalesced_del(coalesced),
        }
    }
}

fn check_registers(region: &Region) -> Result<(), Error> {
    if matches!(region.kind(), RegionKind::Mmio(_)) {
        return Ok(());
    }
    Err(Error::WrongKind {
        region: region.name().to_owned(),
        wanted: "device registers",
    })
}

impl Transaction<'_> {
    /// Adds an ioeventfd to a region of device registers.
    ///
    /// # Errors
    /// `WrongKind`; `DuplicateIoeventfd` when the region has one that matches the same writes;
    /// `BadPlacement` outside the region.
    pub fn add_ioeventfd(
        &mut self,
        region: &Arc<Region>,
        ioeventfd: Ioeventfd,
    ) -> Result<(), Error> {
        self.memory.bind(region)?;
        check_registers(region)?;
        let offset = ioeventfd.offset;
        let end = offset.checked_add(u64::from(ioeventfd.size.max(1)));
        if end.is_none_or(|end| end > region.size()) || !matches!(ioeventfd.size, 0 | 1 | 2 | 4 | 8)
        {
            let (child, parent) = ("ioeventfd".to_owned(), region.name().to_owned());
            return Err(Error::BadPlacement {
                child,
                parent,
                offset,
                reason: "not a write to the region",
            });
        }
        let mut state = region.state();
        if state
            .ioeventfds
            .iter()
            .any(|other| other.same_place(&ioeventfd))
        {
            return Err(Error::DuplicateIoeventfd {
                region: region.name().to_owned(),
                offset,
            });
        }
        state.ioeventfds.push(ioeventfd.clone());
        drop(state);
        self.undo.push(Undo::AddIoeventfd {
            region: Arc::clone(region),
            ioeventfd,
        });
        self.mark(region, offset..offset + 1);
        Ok(())
    }

    /// Removes an ioeventfd: the one with the same offset, size, value and eventfd.
    ///
    /// # Errors
    /// `NoIoeventfd`, `Foreign`.
    pub fn remove_ioeventfd(
        &mut self,
        region: &Arc<Region>,
        ioeventfd: &Ioeventfd,
    ) -> Result<(), Error> {
        self.memory.check_region(region)?;
        let offset = ioeventfd.offset;
        let mut state = region.state();
        let same = |other: &Ioeventfd| {
            other.same_place(ioeventfd) && Arc::ptr_eq(&other.fd, &ioeventfd.fd)
        };
        let Some(at) = state.ioeventfds.iter().position(same) else {
            return Err(Error::NoIoeventfd {
                region: region.name().to_owned(),
                offset,
            });
        };
        let ioeventfd = state.ioeventfds.remove(at);
        drop(state);
        self.undo.push(Undo::RemoveIoeventfd {
            region: Arc::clone(region),
            ioeventfd,
            at,
        });
        self.mark(region, offset..offset + 1);
        Ok(())
    }

    /// Lets writes to `range` (bytes of the region) be kept back, until something is passed on
    /// that may depend on them. For registers that many writes go to and few reads: their order
    /// among each other stays, and a load from outside the range may come before them.
    ///
    /// # Errors
    /// `WrongKind`; `BadPlacement` when empty or not inside the region; `DuplicateCoalesced` when
    /// it overlaps another.
    pub fn add_coalesced(&mut self, region: &Arc<Region>, range: Range<u64>) -> Result<(), Error> {
        self.memory.bind(region)?;
        check_registers(region)?;
        if range.is_empty() || range.end > region.size() {
            return Err(Error::BadPlacement {
                child: "coalesced range".to_owned(),
                parent: region.name().to_owned(),
                offset: range.start,
                reason: "not a part of the region",
            });
        }
        let mut state = region.state();
        let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        if state.coalesced.iter().any(meets) {
            return Err(Error::DuplicateCoalesced {
                region: region.name().to_owned(),
                offset: range.start,
            });
        }
        state.coalesced.push(range.clone());
        drop(state);
        self.undo.push(Undo::AddCoalesced {
            region: Arc::clone(region),
            range: range.clone(),
        });
        self.mark(region, range);
        Ok(())
    }

    /// Ends what [`Transaction::add_coalesced`] began with the same range.
    ///
    /// # Errors
    /// `NoCoalesced`, `Foreign`.
    pub fn remove_coalesced(
        &mut self,
        region: &Arc<Region>,
        range: &Range<u64>,
    ) -> Result<(), Error> {
        self.memory.check_region(region)?;
        let mut state = region.state();
        let Some(at) = state.coalesced.iter().position(|other| other == range) else {
            return Err(Error::NoCoalesced {
                region: region.name().to_owned(),
                offset: range.start,
            });
        };
        state.coalesced.remove(at);
        drop(state);
        self.undo.push(Undo::RemoveCoalesced {
            region: Arc::clone(region),
            range: range.clone(),
            at,
        });
        self.mark(region, range.clone());
        Ok(())
    }
}
