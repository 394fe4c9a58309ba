// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Maps a block's memory, and gives parts of it or all of it back.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};

use super::host::{HostMemory, huge_page_figures};
use super::{Backing, RamSpec};
use crate::Error;

const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

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
}

// SAFETY: the mapping belongs to the object; it is changed by system calls only, and who may call
// which is decided by the owner (`RamBlock`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `spec` at `host`, a fresh place in the arena. A sparse block starts inaccessible.
    pub(crate) fn new(spec: &RamSpec, host: NonNull<u8>, source: Source) -> Result<Mapping, Error> {
        let Source {
            fd,
            page_size_bytes,
            thp,
            shared,
            hugetlb,
            own_pages,
        } = source;
        let mapping = Mapping {
            name: spec.name.clone(),
            host,
            max_bytes: spec.max_size_bytes,
            page_size_bytes,
            fd,
            thp,
            shared,
            hugetlb,
            own_pages,
        };
        let sparse = spec.block_size_bytes.is_some();
        let used = if sparse { 0 } else { spec.size_bytes };
        mapping.map(0..used, true, libc::PROT_READ | libc::PROT_WRITE)?;
        mapping.map(used..spec.max_size_bytes, false, libc::PROT_NONE)?;
        if sparse && !mapping.shared {
            mapping.make_mergeable()?;
        }
        mapping.advise_huge_pages(0..spec.max_size_bytes);
        Ok(mapping)
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

    fn map(&self, range: Range<u64>, charge: bool, protection: libc::c_int) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let mut flags = libc::MAP_FIXED;
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
        // SAFETY: MAP_FIXED over the block's own place in the arena, which nobody uses yet, or
        // (in `resize`) over a part of it that was inaccessible.
        let result = unsafe {
            libc::mmap(
                self.at(range.start),
                length,
                protection,
                flags,
                fd,
                range.start as libc::off_t,
            )
        };
        if result != libc::MAP_FAILED {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        if source.raw_os_error() == Some(libc::ENOMEM) {
            let detail = if self.hugetlb {
                huge_page_figures(self.page_size_bytes)
            } else {
                HostMemory::read().to_string()
            };
            return Err(Error::NoHostMemory {
                name: self.name.clone(),
                bytes: length as u64,
                detail,
            });
        }
        Err(self.fail("map", &range, source))
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
            libc::PROT_READ | libc::PROT_WRITE
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

    /// Allocates the pages of `range`, which must be accessible. Some may stay after an error.
    pub(crate) fn populate(&self, range: Range<u64>) -> Result<(), Error> {
        let bytes = range.end - range.start;
        let short = |detail| Error::NoHostMemory {
            name: self.name.clone(),
            bytes,
            detail,
        };
        if !self.hugetlb {
            // Asking first: past its limit a control group kills instead of refusing.
            let host = HostMemory::read();
            if host.headroom_bytes() < bytes {
                return Err(short(host.to_string()));
            }
        }
        match self.advise(range.clone(), libc::MADV_POPULATE_WRITE) {
            Ok(()) => Ok(()),
            // EFAULT: touching the pages would have given SIGBUS.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOMEM | libc::EFAULT | libc::ENOSPC)
                ) =>
            {
                Err(short(if self.hugetlb {
                    huge_page_figures(self.page_size_bytes)
                } else {
                    HostMemory::read().to_string()
                }))
            }
            Err(source) => {
                Err(self.fail("allocate (MADV_POPULATE_WRITE, Linux 5.14)", &range, source))
            }
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

    /// Makes the block accessible up to `new` bytes.
    pub(crate) fn grow(&self, old: u64, new: u64) -> Result<(), Error> {
        self.map(old..new, true, libc::PROT_READ | libc::PROT_WRITE)?;
        self.advise_huge_pages(old..new);
        Ok(())
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

/// What a block's memory comes from, opened.
pub(crate) struct Source {
    fd: Option<OwnedFd>,
    page_size_bytes: u64,
    thp: bool,
    shared: bool,
    hugetlb: bool,
    own_pages: bool,
}

impl Source {
    /// Opens the backing of `spec`.
    pub(crate) fn open(spec: &RamSpec) -> Result<Source, Error> {
        let plain = Source {
            fd: None,
            page_size_bytes: host_page_size(),
            thp: false,
            shared: false,
            hugetlb: false,
            own_pages: true,
        };
        match &spec.backing {
            Backing::Anon { thp } => Ok(Source { thp: *thp, ..plain }),
            Backing::Memfd { thp } => {
                let fd = memfd(spec, 0)?;
                Ok(Source {
                    fd: Some(fd),
                    thp: *thp,
                    shared: true,
                    ..plain
                })
            }
            Backing::Hugetlb { page_size_bytes } => {
                let page = *page_size_bytes;
                if !page.is_power_of_two() || page <= host_page_size() {
                    let reason = format!("{page} bytes is not a size of huge pages");
                    return Err(Error::BadSpec {
                        name: spec.name.clone(),
                        reason,
                    });
                }
                let flags = libc::MFD_HUGETLB | (page.trailing_zeros() << libc::MFD_HUGE_SHIFT);
                let fd = memfd(spec, flags)?;
                Ok(Source {
                    fd: Some(fd),
                    page_size_bytes: page,
                    shared: true,
                    hugetlb: true,
                    ..plain
                })
            }
            Backing::File { path, share } => {
                let fail = |what: &str, source| Error::Host {
                    name: spec.name.clone(),
                    what: format!("cannot {what} {}", path.display()),
                    source,
                };
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(false);
                let file = options.open(path).map_err(|e| fail("open", e))?;
                let length = file
                    .metadata()
                    .map_err(|e| fail("read the size of", e))?
                    .len();
                if length < spec.max_size_bytes {
                    file.set_len(spec.max_size_bytes)
                        .map_err(|e| fail("extend", e))?;
                }
                let fd = OwnedFd::from(file);
                let page = huge_page_of(&fd).map_err(|e| fail("examine", e))?;
                Ok(Source {
                    page_size_bytes: page.unwrap_or(plain.page_size_bytes),
                    hugetlb: page.is_some(),
                    fd: Some(fd),
                    shared: *share,
                    own_pages: false,
                    ..plain
                })
            }
        }
    }

    pub(crate) fn page_size_bytes(&self) -> u64 {
        self.page_size_bytes
    }

    /// Whether freeing pages shows zeroes, rather than the contents of a file.
    pub(crate) fn can_be_sparse(&self) -> bool {
        self.fd.is_none() || self.shared
    }
}

fn memfd(spec: &RamSpec, flags: libc::c_uint) -> Result<OwnedFd, Error> {
    let refused = |what: String, source| Error::Host {
        name: spec.name.clone(),
        what,
        source,
    };
    let name = CString::new(spec.name.replace('\0', "_")).unwrap_or_default();
    // memfd names are limited to 249 bytes.
    let name =
        CString::new(name.as_bytes().get(..200).unwrap_or(name.as_bytes())).unwrap_or_default();
    // SAFETY: a terminated string and flags.
    let fd = unsafe {
        libc::memfd_create(
            name.as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags,
        )
    };
    if fd < 0 {
        let error = io::Error::last_os_error();
        if let Backing::Hugetlb { page_size_bytes } = spec.backing {
            return Err(refused(
                format!("no memfd ({})", huge_page_figures(page_size_bytes)),
                error,
            ));
        }
        return Err(refused("cannot make a memfd".to_owned(), error));
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: integers only.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), spec.max_size_bytes as libc::off_t) } != 0 {
        return Err(refused(
            format!("cannot size a memfd to {}", spec.max_size_bytes),
            io::Error::last_os_error(),
        ));
    }
    // Nobody who is handed the descriptor can make our mapping fault by cutting it short.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: integers only.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(refused(
            "cannot seal a memfd".to_owned(),
            io::Error::last_os_error(),
        ));
    }
    Ok(fd)
}

/// The page size of a file on hugetlbfs.
fn huge_page_of(fd: &OwnedFd) -> io::Result<Option<u64>> {
    // SAFETY: all zeroes is a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor of ours and a place for the answer.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), ptr::from_mut(&mut stat)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((stat.f_type == HUGETLBFS_MAGIC).then_some(stat.f_bsize as u64))
}

/// The host's page size, in bytes.
pub(crate) fn host_page_size() -> u64 {
    // SAFETY: sysconf takes an integer.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
