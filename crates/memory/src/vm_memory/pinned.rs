// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots of RAM, for what wants all of it at once.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::guest_memory::{Error, Result};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, FileOffset, GuestAddress, GuestAddressSpace,
    GuestMemoryBackend, GuestMemoryRegion, GuestUsize, MemoryRegionAddress, ReadVolatile,
    VolatileSlice, WriteVolatile,
};

use super::guarded::{self, guarded_bytes};
use super::pieces::Pieces;
use super::{Marks, WriteLog, Written};
use crate::fault::Fault;
use crate::{
    Access, AccessError, AddressSpace, Gpa, Pin, Plugged, RamBlock, ReadGuard, Reader, SectionKind,
};

/// The writable, plugged RAM of the machine that an address space showed at one moment, pinned: what
/// linux-loader and vhost take. RAM of devices is not in it
/// ([`Region::ram_device`](crate::Region::ram_device)); the views reach that.
///
/// `GuestMemoryBackend` promises memory that never changes, so this does not; and it knows
/// neither ROM nor registers, so there are none in it. As long as it exists it holds up unplugs
/// and seals of all that is in it, like any I/O: drop it when the kernel is loaded, or when a
/// vhost device has been given the memory table made from the next one.
pub struct PinnedRam {
    /// Ascending.
    regions: Vec<PinnedRegion>,
}

/// One contiguous piece of [`PinnedRam`].
pub struct PinnedRegion {
    pin: Pin,
    block: Arc<RamBlock>,
    block_offset: u64,
    file: Option<FileOffset>,
    log: Option<Arc<dyn WriteLog>>,
}

impl PinnedRam {
    /// Pins the RAM that `space` shows now.
    ///
    /// # Errors
    /// `Reentrant` from within a change of the map.
    pub fn new(
        space: &AddressSpace,
        reader: &Reader,
    ) -> std::result::Result<PinnedRam, crate::Error> {
        PinnedRam::with_log(space, reader, None)
    }

    /// As [`PinnedRam::new`]; writes through the traits are told to `log`.
    ///
    /// # Errors
    /// As [`PinnedRam::new`].
    pub fn with_log(
        space: &AddressSpace,
        reader: &Reader,
        log: Option<&Arc<dyn WriteLog>>,
    ) -> std::result::Result<PinnedRam, crate::Error> {
        let mut regions = Vec::new();
        for section in space.sections()? {
            let SectionKind::Ram {
                block,
                block_offset,
                readonly: false,
            } = &section.kind
            else {
                continue;
            };
            // Shared by the regions of a section.
            let file = file_of(block);
            let mut at = section.range.start;
            while at < section.range.end {
                let offset = block_offset + (at - section.range.start);
                let (len, plugged) = run(block, offset, section.range.end - at);
                if plugged {
                    let guard = space.read(reader);
                    let found = pinned(&guard, Gpa(at), len as usize);
                    regions.extend(found.map(|(pin, now, block_offset)| {
                        let same = Arc::ptr_eq(&now, block);
                        let file = if same { file.clone() } else { file_of(&now) };
                        PinnedRegion {
                            pin,
                            block: now,
                            block_offset,
                            file: file.map(|file| FileOffset::from_arc(file, block_offset)),
                            log: log.cloned(),
                        }
                    }));
                }
                at += len;
            }
        }
        Ok(PinnedRam { regions })
    }
}

/// Pins `len` bytes of RAM of the machine: with the block that they are in, and where. The map may have changed since it was
/// looked at: it is what is there now that counts. What has gone is left out.
fn pinned(guard: &ReadGuard<'_>, gpa: Gpa, len: usize) -> Option<(Pin, Arc<RamBlock>, u64)> {
    let section = guard.lookup(gpa)?;
    // RAM of a device is no place for a kernel, and nothing that vhost's kernel side could be told of as RAM.
    if section.region().is_ram_device() {
        return None;
    }
    let SectionKind::Ram {
        block,
        block_offset,
        ..
    } = section.kind()
    else {
        return None;
    };
    // In the same section, and of one region.
    let pin = guard.pin(gpa, len, Access::ReadWrite).ok()?;
    let offset = block_offset + (gpa.0 - section.range().start);
    Some((pin, Arc::clone(block), offset))
}

/// The file behind a block, for vhost-user. A process out of descriptors has none.
fn file_of(block: &RamBlock) -> Option<Arc<File>> {
    let fd = block.fd()?.try_clone_to_owned().ok()?;
    Some(Arc::new(File::from(fd)))
}

/// How many of `len` bytes at `offset` of a block are plugged, or are not, as the first one.
fn run(block: &RamBlock, offset: u64, len: u64) -> (u64, bool) {
    let Some(step) = block.block_size_bytes() else {
        return (len, true);
    };
    let plugged = |from: u64, to: u64| block.plugged(from..to) == Plugged::All;
    let end = offset + len;
    let mut at = (offset - offset % step + step).min(end);
    let first = plugged(offset, at);
    while at < end && plugged(at, (at + step).min(end)) == first {
        at = (at + step).min(end);
    }
    (at - offset, first)
}

impl GuestMemoryBackend for PinnedRam {
    type R = PinnedRegion;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&PinnedRegion> {
        let at = self
            .regions
            .partition_point(|region| region.start_addr() <= addr);
        let region = self.regions.get(at.checked_sub(1)?)?;
        (addr <= region.last_addr()).then_some(region)
    }

    fn iter(&self) -> impl Iterator<Item = &PinnedRegion> {
        self.regions.iter()
    }
}

impl GuestMemoryRegion for PinnedRegion {
    type B = Written;

    fn len(&self) -> GuestUsize {
        self.pin.len() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.pin.gpa().0)
    }

    fn bitmap(&self) -> Marks<'_> {
        // SAFETY: the region has a pin on the block.
        unsafe { Marks::held(self.log.as_deref(), &self.block, self.block_offset) }
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        let offset = usize::try_from(addr.0)
            .ok()
            .filter(|offset| *offset < self.pin.len());
        let offset = offset.ok_or(Error::InvalidBackendAddress)?;
        Ok(self.pin.as_ptr().wrapping_add(offset))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, Marks<'_>>> {
        let start = usize::try_from(offset.0).map_err(|_| Error::InvalidBackendAddress)?;
        let end = start
            .checked_add(count)
            .filter(|end| *end <= self.pin.len());
        end.ok_or(Error::InvalidBackendAddress)?;
        let host = self.pin.as_ptr().wrapping_add(start);
        // SAFETY: inside the pinned memory, which stays for as long as `self` is borrowed (M3);
        // everybody else accesses it as vm-memory does, with volatile accesses.
        unsafe {
            if count > 0 {
                guarded::probe(&self.block, host, count)
                    .map_err(|_| self.not_provided(start, Fault { done: 0 }))?;
            }
            let marks = self.bitmap().at(start);
            Ok(VolatileSlice::with_bitmap(host, count, marks, None))
        }
    }
}

impl PinnedRegion {
    /// What of `count` bytes from `at` on lies in the region; the first must, if there is one.
    fn part(&self, at: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_, Marks<'_>>> {
        if count == 0 {
            return self.get_slice(MemoryRegionAddress(0), 0);
        }
        let left = self.len().checked_sub(at.0).filter(|left| *left != 0);
        let left = left.ok_or(Error::InvalidBackendAddress)?;
        self.get_slice(at, count.min(usize::try_from(left).unwrap_or(usize::MAX)))
    }

    #[cold]
    fn not_provided(&self, start: usize, fault: Fault) -> Error {
        let at = self.pin.gpa().0 + (start + fault.done) as u64;
        guarded::not_provided(Gpa(at))
    }
}

/// Copies of bytes and values are guarded against what the host does not provide; those to and
/// from files, and atomic accesses, are vm-memory's.
impl Bytes<MemoryRegionAddress> for PinnedRegion {
    type E = Error;

    fn write(&self, bytes: &[u8], at: MemoryRegionAddress) -> Result<usize> {
        let part = self.part(at, bytes.len())?;
        guarded::write(&part, bytes).map_err(|fault| self.not_provided(at.0 as usize, fault))
    }

    fn read(&self, bytes: &mut [u8], at: MemoryRegionAddress) -> Result<usize> {
        let part = self.part(at, bytes.len())?;
        guarded::read(&part, bytes).map_err(|fault| self.not_provided(at.0 as usize, fault))
    }

    fn write_slice(&self, bytes: &[u8], at: MemoryRegionAddress) -> Result<()> {
        whole(self.write(bytes, at)?, bytes.len())
    }

    fn read_slice(&self, bytes: &mut [u8], at: MemoryRegionAddress) -> Result<()> {
        whole(self.read(bytes, at)?, bytes.len())
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        source: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.part(at, count)?.read_volatile_from(0, source, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        source: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self
            .get_slice(at, count)?
            .read_exact_volatile_from(0, source, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        target: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.part(at, count)?.write_volatile_to(0, target, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        target: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self
            .get_slice(at, count)?
            .write_all_volatile_to(0, target, count)?)
    }

    fn store<T: AtomicAccess>(
        &self,
        value: T,
        at: MemoryRegionAddress,
        order: Ordering,
    ) -> Result<()> {
        Ok(self.get_slice(at, size_of::<T>())?.store(value, 0, order)?)
    }

    fn load<T: AtomicAccess>(&self, at: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(self.get_slice(at, size_of::<T>())?.load(0, order)?)
    }
}

fn whole(completed: usize, expected: usize) -> Result<()> {
    if completed == expected {
        return Ok(());
    }
    Err(Error::PartialBuffer {
        expected,
        completed,
    })
}

impl Pieces for PinnedRam {
    fn piece(
        &self,
        gpa: Gpa,
        len: u64,
        _access: Access,
    ) -> std::result::Result<VolatileSlice<'_, Marks<'_>>, AccessError> {
        let found = self.to_region_addr(GuestAddress(gpa.0));
        let (region, at) = found.ok_or(AccessError::Unmapped { gpa, len })?;
        let part = region.part(at, usize::try_from(len).unwrap_or(usize::MAX));
        part.map_err(|_| AccessError::HostFault { gpa, len })
    }
}

guarded_bytes!(PinnedRam);

/// An address space for what wants all RAM at once, vhost's kernel devices for example: its
/// memory is a new [`PinnedRam`] every time. Costs a walk over all sections: for set-up, not for
/// requests.
#[derive(Clone)]
pub struct RamSpace {
    space: Arc<AddressSpace>,
    log: Option<Arc<dyn WriteLog>>,
}

impl RamSpace {
    /// The RAM of `space`; writes through the traits are told to `log`.
    pub fn new(space: &Arc<AddressSpace>, log: Option<Arc<dyn WriteLog>>) -> RamSpace {
        RamSpace {
            space: Arc::clone(space),
            log,
        }
    }
}

impl GuestAddressSpace for RamSpace {
    type M = PinnedRam;
    type T = Arc<PinnedRam>;

    /// The RAM that the address space shows now; none from within a change of the map.
    fn memory(&self) -> Arc<PinnedRam> {
        let reader = self.space.memory().register();
        let ram = PinnedRam::with_log(&self.space, &reader, self.log.as_ref());
        Arc::new(ram.unwrap_or_else(|error| {
            tracing::error!(space = self.space.name(), %error, "no snapshot of RAM");
            PinnedRam {
                regions: Vec::new(),
            }
        }))
    }
}
