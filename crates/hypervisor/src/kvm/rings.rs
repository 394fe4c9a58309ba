// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty rings of a machine's vCPUs, and whose memory the slot numbers in them stand for.
//!
//! An entry names a slot by its number, and may be read after that slot has gone or its number has been given to another.
//! Neither loses a write: a slot that goes leaves all its pages dirty, and a page of another slot that is dirty by mistake
//! costs a copy. What is outside of its slot is ignored, as the kernel does.
//!
//! Locks, in the order they are taken: rings, reset, slots, the memory core's dirty log. None is held while a vCPU is
//! waited for.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::RamBlock;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::Error;
use crate::ring::{Crossing, Entry, Resets, Ring, Written, harvest};

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Where a vCPU's ring is in its file, in pages (`KVM_DIRTY_LOG_PAGE_OFFSET`).
const RING_PAGE: i64 = 64;
const PAGE_BYTES: i64 = 4096;
const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
const _: () = assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());

/// The dirty rings of a machine.
pub(super) struct DirtyRings {
    entries: u32,
    slots: Mutex<BTreeMap<u32, Logged>>,
    /// By vCPU index.
    vcpus: Mutex<BTreeMap<u8, Arc<VcpuRing>>>,
    resets: Resets,
}

/// What a slot shows.
struct Logged {
    block: Arc<RamBlock>,
    /// Where in the block it starts, in bytes, and how many it has.
    offset: u64,
    size_bytes: u64,
}

/// The ring of one vCPU.
pub(super) struct VcpuRing {
    ring: Ring<Mapped>,
    crossing: Crossing,
    /// Makes the vCPU leave the guest.
    kick: Box<dyn Fn() + Send + Sync>,
}

impl DirtyRings {
    /// Switches a new machine without vCPUs to rings of `entries` entries. `None` where this KVM has no rings.
    ///
    /// # Errors
    /// KVM refuses the number: it must be a power of two, at least 1024 to suit every processor, and at most what KVM
    /// has room for.
    pub(super) fn enable(fd: &VmFd, entries: u32) -> Result<Option<Arc<Self>>, Error> {
        let offered = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .into_iter()
            .find(|&capability| fd.check_extension_raw(capability.into()) > 0);
        let Some(cap) = offered else {
            return Ok(None);
        };
        let bytes = u64::from(entries).saturating_mul(size_of::<Entry>() as u64);
        let mut capability = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        if let Some(argument) = capability.args.first_mut() {
            *argument = bytes;
        }
        fd.enable_cap(&capability).map_err(|errno| {
            let what = format!("dirty rings of {entries} entries");
            Error::refused("KVM_ENABLE_CAP", what, errno)
        })?;
        Ok(Some(Arc::new(Self {
            entries,
            slots: Mutex::default(),
            vcpus: Mutex::default(),
            resets: Resets::new(),
        })))
    }

    /// Entries of each ring.
    pub(super) fn entries(&self) -> u32 {
        self.entries
    }

    /// Maps the ring of vCPU `index`, whose file is `fd`.
    pub(super) fn add_vcpu(
        &self,
        index: u8,
        fd: &impl AsRawFd,
        kick: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<VcpuRing>, Error> {
        let mapped = Mapped::new(fd, self.entries).map_err(|source| {
            Error::refused("mmap of the dirty ring", format!("vcpu {index}"), source)
        })?;
        let ring = Arc::new(VcpuRing {
            ring: Ring::new(mapped),
            crossing: Crossing::new(),
            kick: Box::new(kick),
        });
        lock(&self.vcpus).insert(index, Arc::clone(&ring));
        Ok(ring)
    }

    /// Takes the last out of the ring of a vCPU that goes.
    pub(super) fn remove_vcpu(&self, index: u8, vm: &VmFd) {
        let Some(ring) = lock(&self.vcpus).get(&index).cloned() else {
            return;
        };
        if let Err(error) = self.harvest(std::iter::once(&*ring), vm) {
            tracing::error!(%error, vcpu = index, "the dirty ring of a vcpu that goes is not reset");
        }
        // After that: a sync that does not find it finds its marks.
        lock(&self.vcpus).remove(&index);
    }

    /// Slot `number` shows `size_bytes` of `block` from `offset` on. To be said before KVM learns of the slot.
    pub(super) fn add_slot(
        &self,
        number: u32,
        block: &Arc<RamBlock>,
        offset: u64,
        size_bytes: u64,
    ) {
        let logged = Logged {
            block: Arc::clone(block),
            offset,
            size_bytes,
        };
        lock(&self.slots).insert(number, logged);
    }

    /// KVM has forgotten slot `number`.
    pub(super) fn remove_slot(&self, number: u32) {
        lock(&self.slots).remove(&number);
    }

    /// Merges what all vCPUs have written before this call into the blocks. Waits for as long as those in the guest take to
    /// leave it once they are kicked, which asks nothing of their threads but to come back from KVM_RUN. Threads that run
    /// vCPUs must be bound ([`crate::Vcpu::bind_thread`]), or no kick reaches them.
    ///
    /// # Errors
    /// The rings could not be reset: pages written from now on may go unnoticed.
    pub(super) fn sync(&self, vm: &VmFd) -> io::Result<()> {
        let vcpus: Vec<_> = lock(&self.vcpus).values().cloned().collect();
        let stays: Vec<_> = vcpus
            .iter()
            .map(|vcpu| {
                let stay = vcpu.crossing.stay();
                if stay.is_some() {
                    (vcpu.kick)();
                }
                stay
            })
            .collect();
        for (vcpu, stay) in vcpus.iter().zip(stays) {
            if let Some(stay) = stay {
                vcpu.crossing.wait(stay);
            }
        }
        self.harvest(vcpus.iter().map(|vcpu| &**vcpu), vm).map(drop)
    }

    /// Makes room in the ring of a vCPU, on its thread. Says how many entries were taken.
    ///
    /// # Errors
    /// The rings could not be reset.
    pub(super) fn make_room(&self, vcpu: &VcpuRing, vm: &VmFd) -> io::Result<usize> {
        self.harvest(std::iter::once(vcpu), vm)
    }

    fn harvest<'a>(
        &self,
        vcpus: impl Iterator<Item = &'a VcpuRing>,
        vm: &VmFd,
    ) -> io::Result<usize> {
        let reset = || {
            // SAFETY: the request takes no argument, and the fd is a machine's.
            match unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) } {
                0.. => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let rings = vcpus.map(|vcpu| &vcpu.ring);
        harvest(rings, &self.resets, reset, |written| self.mark(written))
    }

    /// Pages of one word of a bitmap are marked together.
    fn mark(&self, written: &mut [Written]) {
        written.sort_unstable();
        let slots = lock(&self.slots);
        for word in written.chunk_by(|a, b| (a.slot, a.page / 64) == (b.slot, b.page / 64)) {
            let Some(first) = word.first() else { continue };
            if let Some(slot) = slots.get(&first.slot) {
                let bits = word.iter().fold(0, |bits, w| bits | 1 << (w.page % 64));
                slot.mark(first.page / 64, bits);
            }
        }
    }
}

impl Logged {
    /// Marks the pages whose bits are set in word `word` of the slot.
    fn mark(&self, word: u64, bits: u64) {
        let pages = self.size_bytes / PAGE_BYTES as u64;
        let Some(first) = word.checked_mul(64).filter(|&first| first < pages) else {
            return;
        };
        let inside = u64::MAX >> 64_u64.saturating_sub(pages - first);
        let offset = self.offset.saturating_add(first * PAGE_BYTES as u64);
        self.block.merge_dirty(offset, &[bits & inside]);
    }
}

impl VcpuRing {
    /// Around each KVM_RUN.
    pub(super) fn crossing(&self) -> &Crossing {
        &self.crossing
    }
}

/// A ring in memory that is shared with the kernel.
struct Mapped {
    base: NonNull<Entry>,
    entries: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; entries are only accessed atomically.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(fd: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        let entries = entries as usize;
        // SAFETY: a new shared mapping at an address the kernel chooses; the fd is open.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                entries.saturating_mul(size_of::<Entry>()),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                RING_PAGE * PAGE_BYTES,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Self { base, entries })
    }
}

impl AsRef<[Entry]> for Mapped {
    fn as_ref(&self) -> &[Entry] {
        // SAFETY: the mapping has room for so many entries and lives as long as `self`. Its pages start out zeroed, every
        // bit pattern is an entry, and the kernel's accesses are to atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.entries) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let bytes = self.entries.saturating_mul(size_of::<Entry>());
        // SAFETY: this mapping was made by `new`, and every reference into it borrows from `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), bytes) };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held; what it guards is complete after each step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebbtide_memory::DirtyClient::Migration;
    use ebbtide_memory::{Backing, Memory, MemoryConfig, RamSpec};

    const PAGE: u64 = PAGE_BYTES as u64;

    fn rings() -> DirtyRings {
        DirtyRings {
            entries: 1024,
            slots: Mutex::default(),
            vcpus: Mutex::default(),
            resets: Resets::new(),
        }
    }

    fn memory() -> Arc<Memory> {
        Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap()
    }

    fn block(memory: &Memory, name: &str, pages: u64) -> Arc<RamBlock> {
        let spec = RamSpec {
            name: name.to_owned(),
            size_bytes: pages * PAGE,
            max_size_bytes: pages * PAGE,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        memory.ram().add(spec).unwrap()
    }

    /// The pages that became dirty.
    fn dirty(block: &RamBlock) -> Vec<u64> {
        let all = 0..block.size_bytes();
        let dirty = block.snapshot_and_clear(Migration, all).unwrap();
        let pages = dirty
            .ranges()
            .flat_map(|range| range.step_by(PAGE as usize));
        pages.map(|at| at / PAGE).collect()
    }

    fn written(slot: u32, pages: &[u64]) -> Vec<Written> {
        pages.iter().map(|&page| Written { slot, page }).collect()
    }

    #[test]
    fn entries_become_pages_of_their_slots_block() {
        let memory = memory();
        let (a, b) = (block(&memory, "a", 200), block(&memory, "b", 200));
        memory.dirty_log().start(Migration).unwrap();
        let rings = rings();
        rings.add_slot(1, &a, 5 * PAGE, 150 * PAGE);
        rings.add_slot(2, &b, 0, 200 * PAGE);
        dirty(&a);
        dirty(&b);
        let mut entries = written(1, &[0, 63, 64, 149, 64, 1]);
        entries.extend(written(2, &[199, 0]));
        rings.mark(&mut entries);
        assert_eq!(dirty(&a), [5, 6, 68, 69, 154]);
        assert_eq!(dirty(&b), [0, 199]);
    }

    #[test]
    fn what_is_outside_of_its_slot_or_of_none_is_ignored() {
        let memory = memory();
        let a = block(&memory, "a", 200);
        memory.dirty_log().start(Migration).unwrap();
        let rings = rings();
        rings.add_slot(1, &a, 0, 70 * PAGE);
        dirty(&a);
        rings.mark(&mut written(1, &[69, 70, 127, 128, 1 << 40, u64::MAX]));
        assert_eq!(dirty(&a), [69]);
        // Another address space, another slot, and one that has gone.
        rings.mark(&mut written(1 << 16 | 1, &[3]));
        rings.mark(&mut written(0, &[3]));
        rings.remove_slot(1);
        rings.mark(&mut written(1, &[3]));
        assert!(dirty(&a).is_empty());
    }
}
