// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Maps a block's memory, and gives parts of it or all of it back.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::ptr::{self, NonNull};

use super::host::{HostMemory, huge_page_figures};
use super::source::Source;
use super::{RamPolicy, RamSpec, populate};
use crate::Error;

/// A block's memory at its place in the arena.
pub(crate) struct Mapping {
    name: String,
    host: NonNull<u8>,
    max_bytes: u64,
    page_size_bytes: u64,
    fd: Option<OwnedFd>,
    thp: bool,
    /// Pages are given back by punching holes into the descriptor.
    shared: bool,
    hugetlb: bool,
    /// The descriptor's memory is nobody else's: it is emptied with the block.
    own_pages: bool,
    readonly: bool,
    path: Option<PathBuf>,
    policy: RamPolicy,
}

// SAFETY: the mapping belongs to the object; it is changed by system calls only, and who may call
// which is decided by the owner (`RamBlock`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `spec` at `host`, a fresh place in the arena. A sparse block starts inaccessible.
    pub(crate) fn new(
        spec: &RamSpec,
        policy: &RamPolicy,
        host: NonNull<u8>,
        mut source: Source,
    ) -> Result<Mapping, Error> {
        let mapping = Mapping {
            name: spec.name.clone(),
            host,
            max_bytes: spec.max_size_bytes,
            page_size_bytes: source.page_size_bytes,
            fd: source.fd.take(),
            thp: source.thp,
            shared: source.shared,
            hugetlb: source.hugetlb,
            own_pages: source.own_pages,
            readonly: source.readonly,
            path: source.path.take(),
            policy: policy.clone(),
        };
        match mapping.map_all(spec) {
            Ok(()) => {
                source.keep();
                Ok(mapping)
            }
            Err(error) => {
                mapping.give_up();
                Err(error)
            }
        }
    }

    fn map_all(&self, spec: &RamSpec) -> Result<(), Error> {
        let sparse = spec.block_size_bytes.is_some();
        let used = if sparse { 0 } else { spec.size_bytes };
        self.map(0..used, true, self.accessible())?;
        self.map(used..spec.max_size_bytes, false, libc::PROT_NONE)?;
        if sparse && !self.shared {
            self.make_mergeable()?;
        }
        if spec.prefault && used > 0 {
            self.populate(0..used)?;
        }
        Ok(())
    }

    /// Leaves nothing of a block that came to nothing.
    pub(super) fn give_up(&self) {
        if let Err(error) = self.destroy() {
            tracing::error!(block = self.name, %error, "memory of a failed block is kept");
        }
    }

    /// What memory in use may be used for.
    fn accessible(&self) -> libc::c_int {
        if self.readonly {
            libc::PROT_READ
        } else {
            libc::PROT_READ | libc::PROT_WRITE
        }
    }

    pub(crate) fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Whether closing the descriptor may wait for a filesystem.
    pub(crate) fn is_file(&self) -> bool {
        self.path.is_some()
    }

    pub(crate) fn policy(&self) -> &RamPolicy {
        &self.policy
    }

    pub(crate) fn path(&self) -> Option<&PathBuf> {
        self.path.as_ref()
    }

    /// In a word, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match (&self.path, &self.fd) {
            (Some(_), _) => "file",
            (None, Some(_)) if self.hugetlb => "hugetlb",
            (None, Some(_)) => "memfd",
            (None, None) => "anon",
        }
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.shared
    }

    /// Tells the host how to treat a new mapping.
    fn apply_policy(&self, range: &Range<u64>) -> Result<(), Error> {
        self.advise_huge_pages(range.clone());
        if !self.policy.dump {
            self.advise(range.clone(), libc::MADV_DONTDUMP)
                .map_err(|e| self.fail("exclude from core dumps", range, e))?;
        }
        if self.policy.merge {
            self.advise(range.clone(), libc::MADV_MERGEABLE)
                .map_err(|e| self.fail("have equal pages merged in", range, e))?;
        }
        if let Some(numa) = &self.policy.numa {
            let length = (range.end - range.start) as usize;
            numa.apply(self.at(range.start), length)
                .map_err(|e| self.fail("set the NUMA policy of", range, e))?;
        }
        Ok(())
    }

    fn advise_huge_pages(&self, range: Range<u64>) {
        if self.thp && !range.is_empty() {
            // A kernel without huge pages says EINVAL; they are a wish.
            let _ = self.advise(range, libc::MADV_HUGEPAGE);
        }
    }

    pub(crate) fn page_size_bytes(&self) -> u64 {
        self.page_size_bytes
    }

    pub(crate) fn fd(&self) -> Option<&OwnedFd> {
        self.fd.as_ref()
    }

    fn at(&self, offset: u64) -> *mut libc::c_void {
        // SAFETY: callers pass offsets up to `max_bytes`, the length of the place in the arena.
        unsafe { self.host.as_ptr().add(offset as usize).cast() }
    }

    fn fail(&self, what: &str, range: &Range<u64>, source: io::Error) -> Error {
        let mut what = format!("cannot {what} {:#x}..{:#x}", range.start, range.end);
        if source.raw_os_error() == Some(libc::ENOMEM) {
            what.push_str(" (the host lacks memory, or vm.max_map_count is reached)");
        }
        Error::Host {
            name: self.name.clone(),
            what,
            source,
        }
    }

    /// Maps a range and tells the host how to treat it.
    ///
    /// It is mapped elsewhere and then moved: a mapping over the reservation that is refused (for want of memory, or by the
    /// file) may have taken that away already. In the hole another thread would get what it maps, over which the
    /// next mapping of ours would go.
    fn map(&self, range: Range<u64>, charge: bool, protection: libc::c_int) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let mut flags = 0;
        // Memory that is not to be plugged yet may exceed what the host has.
        if !charge {
            flags |= libc::MAP_NORESERVE;
        }
        let fd: RawFd = match &self.fd {
            Some(fd) => {
                flags |= if self.shared {
                    libc::MAP_SHARED
                } else {
                    libc::MAP_PRIVATE
                };
                fd.as_raw_fd()
            }
            None => {
                flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                -1
            }
        };
        let length = (range.end - range.start) as usize;
        let from = range.start as libc::off_t;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let fresh = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, from) };
        if fresh != libc::MAP_FAILED {
            self.put_in_place(fresh, &range)?;
            return self.apply_policy(&range);
        }
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::ENOMEM) => Err(self.no_memory(length as u64)),
            Some(libc::EACCES | libc::EPERM) if self.shared && !self.readonly => {
                let Some(path) = self.path.clone() else {
                    return Err(self.fail("map", &range, source));
                };
                let name = self.name.clone();
                Err(Error::BackingUnwritable { name, path, source })
            }
            _ => {
                let path = self.path.as_ref();
                let what = path.map_or("map".to_owned(), |path| {
                    format!("map {} to", path.display())
                });
                Err(self.fail(&what, &range, source))
            }
        }
    }

    /// Moves a mapping of the length of `range` to where that is.
    fn put_in_place(&self, fresh: *mut libc::c_void, range: &Range<u64>) -> Result<(), Error> {
        let length = (range.end - range.start) as usize;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the mapping is ours, and nobody else knows it yet. It goes over the block's own place in the arena, which
        // nobody uses yet, or (in `grow`) over a part of it that was inaccessible.
        let moved = unsafe { libc::mremap(fresh, length, length, flags, self.at(range.start)) };
        if moved != libc::MAP_FAILED {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        // SAFETY: as above; it was not moved.
        unsafe { libc::munmap(fresh, length) };
        Err(self.fail("move (of huge pages: Linux 5.16)", range, source))
    }

    /// The host lacks memory of the kind needed.
    fn no_memory(&self, bytes: u64) -> Error {
        let name = self.name.clone();
        if self.hugetlb {
            return Error::NoHugePages {
                name,
                page_size_bytes: self.page_size_bytes,
                bytes,
                detail: huge_page_figures(self.page_size_bytes),
            };
        }
        let mut detail = HostMemory::read().to_string();
        if let Some(path) = &self.path {
            detail.push_str(&format!(
                "; the filesystem of {} may be full",
                path.display()
            ));
        }
        Error::NoHostMemory {
            name,
            bytes,
            detail,
        }
    }

    /// Whether the file still has `end` bytes; others may have cut it short.
    pub(super) fn check_length(&self, end: u64) -> Result<(), Error> {
        let (Some(path), Some(fd)) = (&self.path, &self.fd) else {
            return Ok(());
        };
        let file = fd.try_clone().map(File::from);
        let metadata = file
            .and_then(|file| file.metadata())
            .map_err(|e| self.fail("examine the file behind", &(0..end), e))?;
        if !metadata.is_file() || metadata.len() >= end {
            return Ok(());
        }
        Err(Error::BackingTooShort {
            name: self.name.clone(),
            path: path.clone(),
            bytes: metadata.len(),
            needed: end,
        })
    }

    /// Lets the kernel merge the mappings of adjacent plugged blocks whatever the order in which
    /// they are plugged and touched: private memory merges only when it shares one `anon_vma`,
    /// which a mapping gets at its first write fault and hands on when it is split.
    fn make_mergeable(&self) -> Result<(), Error> {
        // The host may answer one touch with a whole huge page.
        let touched = 0..(2 << 20).min(self.max_bytes);
        let all = 0..self.max_bytes;
        self.protect(all.clone(), true)?;
        let first = self.advise(0..self.page_size_bytes, libc::MADV_POPULATE_WRITE);
        self.free_pages(touched)?;
        self.protect(all, false)?;
        first.map_err(|e| self.fail("touch", &(0..self.page_size_bytes), e))
    }

    /// Makes `range` accessible or inaccessible. Its pages stay.
    pub(crate) fn protect(&self, range: Range<u64>, accessible: bool) -> Result<(), Error> {
        let protection = if accessible {
            self.accessible()
        } else {
            libc::PROT_NONE
        };
        // SAFETY: the range lies in the block's own place in the arena; who may still use it is
        // the caller's to know (M7, M8).
        let result = unsafe {
            libc::mprotect(
                self.at(range.start),
                (range.end - range.start) as usize,
                protection,
            )
        };
        if result != 0 {
            let what = if accessible {
                "make accessible"
            } else {
                "make inaccessible"
            };
            return Err(self.fail(what, &range, io::Error::last_os_error()));
        }
        Ok(())
    }

    fn advise(&self, range: Range<u64>, advice: libc::c_int) -> io::Result<()> {
        loop {
            // SAFETY: the range lies in the block's own place in the arena. The advice used
            // either keeps its contents or is given on memory that nobody may use any more.
            let result = unsafe {
                libc::madvise(
                    self.at(range.start),
                    (range.end - range.start) as usize,
                    advice,
                )
            };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Allocates the pages of `range`, which must be accessible, with several threads when that
    /// helps. Some may stay after an error.
    pub(crate) fn populate(&self, range: Range<u64>) -> Result<(), Error> {
        let bytes = range.end - range.start;
        self.check_length(range.end)?;
        if !self.hugetlb && (self.path.is_none() || !self.shared) {
            // Asking first: past its limit a control group kills instead of refusing.
            let host = HostMemory::read();
            if host.headroom_bytes() < bytes {
                return Err(self.no_memory(bytes));
            }
        }
        let advice = if self.readonly {
            libc::MADV_POPULATE_READ
        } else {
            libc::MADV_POPULATE_WRITE
        };
        let threads = self.policy.prefault_threads;
        let Err(source) =
            populate::in_pieces(range.clone(), threads, |piece| self.advise(piece, advice))
        else {
            return Ok(());
        };
        // EFAULT: touching the pages would have given SIGBUS. The file may have been cut short.
        self.check_length(range.end)?;
        match source.raw_os_error() {
            Some(libc::ENOMEM | libc::EFAULT | libc::ENOSPC) => Err(self.no_memory(bytes)),
            _ => Err(self.fail("allocate (MADV_POPULATE_WRITE, Linux 5.14)", &range, source)),
        }
    }

    /// Gives the pages of `range` back to the host. Nobody may use them any more.
    pub(crate) fn free_pages(&self, range: Range<u64>) -> Result<(), Error> {
        if let (true, Some(fd)) = (self.shared, &self.fd) {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let length = range.end - range.start;
            loop {
                // SAFETY: a descriptor of our own and plain integers.
                let result = unsafe {
                    libc::fallocate(
                        fd.as_raw_fd(),
                        mode,
                        range.start as libc::off_t,
                        length as libc::off_t,
                    )
                };
                if result == 0 {
                    return Ok(());
                }
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(self.fail("give back", &range, error));
                }
            }
        }
        self.advise(range.clone(), libc::MADV_DONTNEED)
            .map_err(|e| self.fail("give back", &range, e))
    }

    /// Makes the block accessible up to `new` bytes, or leaves it as it was.
    pub(crate) fn grow(&self, old: u64, new: u64) -> Result<(), Error> {
        self.check_length(new)?;
        let grown = self.map(old..new, true, self.accessible());
        if grown.is_err() {
            // Mapped, but the policy was refused.
            self.protect(old..new, false)?;
        }
        grown
    }

    /// Makes the whole place inaccessible for good and gives all pages back. May block.
    pub(crate) fn destroy(&self) -> Result<(), Error> {
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: over the block's own place in the arena, on which no pin and no view is left;
        // the address is never handed out again (M8).
        let result = unsafe {
            libc::mmap(
                self.at(0),
                self.max_bytes as usize,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        let all = 0..self.max_bytes;
        if result == libc::MAP_FAILED {
            return Err(self.fail("unmap", &all, io::Error::last_os_error()));
        }
        // The descriptor may live on in whoever holds the block; its pages must not.
        if self.own_pages && self.shared {
            self.free_pages(all)
        } else {
            Ok(())
        }
    }
}
