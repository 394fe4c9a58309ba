// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Read sections: look-ups, copies, pins.

use std::hint::cold_path;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::dirty::{SlotLog, Table};
use crate::fault::Fault;
use crate::index::{Entry, Place, RAM, READONLY, View};
use crate::pin::Token;
use crate::{
    Access, AccessError, AddressSpace, Gpa, GuestSlice, Pin, PinList, Reader, Region, SectionKind,
    copy,
};

/// A read section on one view of an address space. What it finds stays where it is until it is
/// dropped; drop it before anything that can block.
pub struct ReadGuard<'r> {
    reader: &'r Reader,
    view: &'r View,
    space: *const AddressSpace,
}

impl<'r> ReadGuard<'r> {
    #[inline(always)]
    pub(crate) fn new(
        reader: &'r Reader,
        view: &'r View,
        space: *const AddressSpace,
    ) -> ReadGuard<'r> {
        ReadGuard {
            reader,
            view,
            space,
        }
    }

    /// The reader whose section it is.
    pub fn reader(&self) -> &'r Reader {
        self.reader
    }

    pub(crate) fn view(&self) -> &View {
        self.view
    }

    /// Whether the section is one of `space`.
    #[inline(always)]
    pub(crate) fn is_of(&self, space: &AddressSpace) -> bool {
        ptr::eq(self.space, space)
    }

    #[inline(always)]
    pub(crate) fn entry(&self, address: u64) -> Option<&Entry> {
        self.view.lookup(address)
    }

    /// What answers at an address.
    #[inline(always)]
    pub fn lookup(&self, gpa: Gpa) -> Option<Section<'_>> {
        let entry = self.entry(gpa.raw())?;
        Some(Section {
            entry,
            gpa: gpa.raw(),
            _guard: PhantomData,
        })
    }

    /// Copies from RAM or ROM, across regions.
    ///
    /// # Errors
    /// When any part is not readable RAM, or the host does not provide it. What lies before that
    /// part has been copied.
    pub fn read_bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), AccessError> {
        let mut rest = bytes;
        self.walk(gpa, rest.len(), Access::Read, |host, count| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(count);
            rest = tail;
            // SAFETY: `walk` found `count` bytes of RAM at `host` in this section (M2, M7).
            unsafe { copy::from_guest(host, part.as_mut_ptr(), count) }
        })
    }

    /// Copies to RAM, across regions.
    ///
    /// # Errors
    /// When any part is not writable RAM, or the host does not provide it. What lies before that
    /// part has been copied.
    pub fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), AccessError> {
        let mut rest = bytes;
        self.walk(gpa, bytes.len(), Access::Write, |host, count| {
            let (part, tail) = rest.split_at(count);
            rest = tail;
            // SAFETY: `walk` found `count` bytes of writable RAM at `host` in this section (M2,
            // M7).
            unsafe { copy::to_guest(part.as_ptr(), host, count) }
        })
    }

    /// Reads a value; little-endian fields are the type's business.
    ///
    /// # Errors
    /// As [`ReadGuard::read_bytes`].
    #[inline]
    pub fn read<T: FromBytes>(&self, gpa: Gpa) -> Result<T, AccessError> {
        let size = size_of::<T>();
        if let Some(place) = self.view.place(gpa.raw(), size as u64, Access::Read) {
            // SAFETY: RAM in this section, as many bytes as the value has (M2, M7).
            return unsafe { copy::read(place.host as *const u8) }
                .map_err(|fault| AccessError::host_fault(gpa, size, fault));
        }
        let mut value = T::new_zeroed();
        let bytes = ptr::from_mut(&mut value).cast::<u8>();
        // SAFETY: `T` has this many bytes, all initialised, and any bytes are a valid `T`.
        self.read_bytes(gpa, unsafe { std::slice::from_raw_parts_mut(bytes, size) })?;
        Ok(value)
    }

    /// Writes a value.
    ///
    /// # Errors
    /// As [`ReadGuard::write_bytes`].
    #[inline]
    pub fn write<T: IntoBytes + Immutable>(&self, gpa: Gpa, value: T) -> Result<(), AccessError> {
        let size = size_of::<T>();
        if let Some(place) = self.view.place(gpa.raw(), size as u64, Access::Write) {
            // SAFETY: writable RAM in this section, as many bytes as the value has.
            let result = unsafe { copy::write(place.host as *mut u8, &value) };
            // SAFETY: the same bytes, of the block of `slot`.
            unsafe {
                self.dirty()
                    .mark(place.lane.slot(), place.host, size as u64)
            };
            return result.map_err(|fault| AccessError::host_fault(gpa, size, fault));
        }
        self.write_bytes(gpa, value.as_bytes())
    }

    #[inline(always)]
    fn dirty(&self) -> &'static Table {
        self.reader.hub().dirty()
    }

    /// Takes the right to `len` bytes of RAM for an I/O: they stay where they are, whatever
    /// becomes of the map, until the pin is dropped. They lie in one region.
    ///
    /// # Errors
    /// `SpansRegions` when they do not; `Overflow` when `len` is 0 or the end is past 2^64;
    /// otherwise what is in the way.
    #[inline(always)]
    pub fn pin(&self, gpa: Gpa, len: usize, access: Access) -> Result<Pin, AccessError> {
        // The cold path finds the place only, and not by way of `self`: guard and pin then stay
        // in registers, and it is the stores that a pin takes longest for.
        let place = match self.view.place(gpa.raw(), len as u64, access) {
            Some(place) => place,
            None => place_slowly(self.view, gpa, len as u64, access)?,
        };
        let token = Token::take(self.reader, place.lane);
        Ok(Pin::new(token, place.host as *mut u8, len, gpa, access))
    }

    /// The `len` bytes of RAM at `gpa`, for as long as the section is open. They lie in one region.
    ///
    /// # Errors
    /// As [`ReadGuard::pin`].
    #[inline(always)]
    pub fn slice(
        &self,
        gpa: Gpa,
        len: usize,
        access: Access,
    ) -> Result<GuestSlice<'_>, AccessError> {
        let place = match self.view.place(gpa.raw(), len as u64, access) {
            Some(place) => place,
            None => place_slowly(self.view, gpa, len as u64, access)?,
        };
        let log = SlotLog::new(self.dirty(), place.lane.slot());
        let host = place.host as *mut u8;
        // SAFETY: RAM of the slot's block, found in this section, which the slice borrows (M2,
        // M7).
        Ok(unsafe { GuestSlice::new(host, len, access.writes(), gpa, log) })
    }

    /// The host address of `len` bytes in one piece of one region, and the slot of their block;
    /// refused as a pin is.
    pub(crate) fn find(
        &self,
        gpa: Gpa,
        len: usize,
        access: Access,
    ) -> Result<(*mut u8, u32), AccessError> {
        let place = place_slowly(self.view, gpa, len as u64, access)?;
        Ok((place.host as *mut u8, place.lane.slot()))
    }

    /// Pins several ranges for one request: splits them at region borders, takes one pin per
    /// region, and appends the pieces to `list`. Ranges of length 0 are left out.
    ///
    /// # Errors
    /// What is in the way; `list` is then as it was.
    pub fn pin_list(
        &self,
        ranges: &[(Gpa, u32)],
        access: Access,
        list: &mut PinList,
    ) -> Result<(), AccessError> {
        let mark = list.mark();
        for (gpa, len) in ranges {
            if let Err(error) = self.pin_range(*gpa, u64::from(*len), access, list) {
                list.truncate(mark);
                return Err(error);
            }
        }
        list.limit_access(access);
        Ok(())
    }

    fn pin_range(
        &self,
        gpa: Gpa,
        len: u64,
        access: Access,
        list: &mut PinList,
    ) -> Result<(), AccessError> {
        let mut done = 0;
        while done < len {
            let at = gpa
                .raw()
                .checked_add(done)
                .ok_or(AccessError::Overflow { gpa, len })?;
            let (entry, host, _) = self.ram(at, 1, access)?;
            let window = entry.window();
            let count = window.rest(at).min(len - done);
            let place = window.place_across(at, count, access);
            let Place { lane, .. } =
                place.ok_or_else(|| refusal(self.view, Gpa(at), count, access))?;
            let held = list.holds(self.reader.row(), lane);
            let token = held.unwrap_or_else(|| list.hold(Token::take(self.reader, lane)));
            list.push(host, count as usize, access.writes().then_some(token));
            done += count;
        }
        Ok(())
    }

    /// See [`ram_at`].
    pub(crate) fn ram(
        &self,
        address: u64,
        len: u64,
        access: Access,
    ) -> Result<(&Entry, *mut u8, u64), AccessError> {
        ram_at(self.view, address, len, access)
    }

    /// Calls `f` for each contiguous piece of a range.
    fn walk(
        &self,
        gpa: Gpa,
        len: usize,
        access: Access,
        mut f: impl FnMut(*mut u8, usize) -> Result<(), Fault>,
    ) -> Result<(), AccessError> {
        let mut done = 0;
        while done < len {
            let rest = (len - done) as u64;
            let overflow = AccessError::Overflow {
                gpa,
                len: len as u64,
            };
            let at = gpa.raw().checked_add(done as u64).ok_or(overflow)?;
            let (entry, host, count) = self.ram(at, rest, access)?;
            let result = f(host, count as usize);
            if access.writes() {
                // SAFETY: bytes of the entry's block, in this section. Some may be written even
                // if the host did not provide them all.
                unsafe { self.dirty().mark(entry.window().slot(), host as u64, count) };
            }
            result.map_err(|fault| {
                let done = done + fault.done;
                AccessError::host_fault(gpa, len, Fault { done })
            })?;
            done += count as usize;
        }
        Ok(())
    }
}

/// The RAM at `address`: its entry, host address, and how many of `len` bytes are there and plugged;
/// at least one. In a section that has loaded the view.
pub(crate) fn ram_at(
    view: &View,
    address: u64,
    len: u64,
    access: Access,
) -> Result<(&Entry, *mut u8, u64), AccessError> {
    let entry = match view.lookup(address) {
        Some(entry) if entry.kind() & RAM != 0 => entry,
        _ => return Err(refusal(view, Gpa(address), len, access)),
    };
    if entry.kind() & READONLY != 0 && access.writes() {
        return Err(AccessError::ReadOnly {
            gpa: Gpa(address),
            len,
        });
    }
    let host = entry.host(address);
    let window = entry.window();
    // SAFETY: bytes of the section and so of its window.
    let count = unsafe { window.plugged_prefix(host, window.rest(address).min(len)) };
    if count == 0 {
        return Err(AccessError::Unplugged {
            gpa: Gpa(address),
            len,
        });
    }
    Ok((entry, host as *mut u8, count))
}

/// As [`View::place`], wherever the bytes are; says what is in the way.
#[cold]
#[inline(never)]
fn place_slowly(view: &View, gpa: Gpa, len: u64, access: Access) -> Result<Place, AccessError> {
    let entry = view.lookup(gpa.raw());
    let place = entry.and_then(|entry| entry.window().place_across(gpa.raw(), len, access));
    place.ok_or_else(|| refusal(view, gpa, len, access))
}

/// Why `len` bytes at `gpa` cannot be had in one piece.
#[cold]
#[inline(never)]
fn refusal(view: &View, gpa: Gpa, len: u64, access: Access) -> AccessError {
    if len == 0 || gpa.raw().checked_add(len - 1).is_none() {
        return AccessError::Overflow { gpa, len };
    }
    let Some(entry) = view.lookup(gpa.raw()) else {
        return AccessError::Unmapped { gpa, len };
    };
    if entry.kind() & RAM == 0 {
        return AccessError::NotRam { gpa, len };
    }
    if entry.kind() & READONLY != 0 && access.writes() {
        return AccessError::ReadOnly { gpa, len };
    }
    let rest = entry.last() - gpa.raw();
    if rest < len - 1 {
        let next = Gpa(entry.last().saturating_add(1));
        return match view.lookup(next.raw()) {
            None => AccessError::Unmapped {
                gpa: next,
                len: len - 1 - rest,
            },
            Some(_) => AccessError::SpansRegions { gpa, len },
        };
    }
    AccessError::Unplugged { gpa, len }
}

/// Nests a section on the same view. It costs a little more than the first.
impl Clone for ReadGuard<'_> {
    fn clone(&self) -> Self {
        // This thread's section goes on until the last of the guards is dropped, and with it the
        // view (M2).
        self.reader.enter();
        ReadGuard { ..*self }
    }
}

impl Drop for ReadGuard<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.reader.leave();
    }
}

/// What answers at an address that was looked up, for as long as the section is open.
#[derive(Clone, Copy)]
pub struct Section<'g> {
    entry: &'g Entry,
    gpa: u64,
    _guard: PhantomData<&'g ()>,
}

impl<'g> Section<'g> {
    /// The addresses of the whole section.
    pub fn range(&self) -> Range<u64> {
        self.entry.flat().section.range.clone()
    }

    /// Bytes from the address that was looked up to the end of the section.
    #[inline(always)]
    pub fn remaining(&self) -> u64 {
        (self.entry.last() - self.gpa).saturating_add(1)
    }

    /// Whether it is RAM or ROM. Parts of RAM may be unplugged.
    #[inline(always)]
    pub fn is_ram(&self) -> bool {
        self.entry.kind() & RAM != 0
    }

    /// The host address of the address that was looked up, for RAM. It may be unplugged; it is
    /// valid inside the read section only. To keep it, pin. What is written through it is marked
    /// by nobody: see [`crate::RamBlock::mark_dirty`].
    #[inline(always)]
    pub fn host(&self) -> Option<NonNull<u8>> {
        if !self.is_ram() {
            // Who asks expects RAM.
            cold_path();
            return None;
        }
        NonNull::new(self.entry.host(self.gpa) as *mut u8)
    }

    /// What answers.
    pub fn kind(&self) -> &'g SectionKind {
        &self.entry.flat().section.kind
    }

    /// The region.
    pub fn region(&self) -> &'g Arc<Region> {
        &self.entry.flat().section.region
    }

    /// Offset in the region of the address that was looked up, in bytes.
    pub fn offset_in_region(&self) -> u64 {
        let section = &self.entry.flat().section;
        section.offset_in_region + (self.gpa - section.range.start)
    }
}
