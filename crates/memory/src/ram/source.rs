// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens what a block's memory comes from.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::host::huge_page_figures;
use super::provided::{check_room, filesystem_of};
use super::{Backing, RamSpec};
use crate::Error;

const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What a block's memory comes from, opened. A file that was made for it goes again unless
/// [`Source::keep`] is called.
pub(crate) struct Source {
    pub(super) fd: Option<OwnedFd>,
    pub(super) page_size_bytes: u64,
    pub(super) thp: bool,
    /// Pages are given back by punching holes into the descriptor.
    pub(super) shared: bool,
    pub(super) hugetlb: bool,
    /// The descriptor's memory is nobody else's: it is emptied with the block.
    pub(super) own_pages: bool,
    pub(super) readonly: bool,
    pub(super) path: Option<PathBuf>,
    made: Made,
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
            readonly: false,
            path: None,
            made: Made::default(),
        };
        match &spec.backing {
            Backing::Anon { thp } => Ok(Source { thp: *thp, ..plain }),
            Backing::Memfd { thp } => {
                spec.check_pages(plain.page_size_bytes)?;
                Ok(Source {
                    fd: Some(memfd(spec, 0)?),
                    thp: *thp,
                    shared: true,
                    ..plain
                })
            }
            Backing::Hugetlb { page_size_bytes } => {
                let page = *page_size_bytes;
                if !page.is_power_of_two() || page <= host_page_size() {
                    return spec.refuse(format!("{page} bytes is not a size of huge pages"));
                }
                spec.check_pages(page)?;
                let flags = libc::MFD_HUGETLB | (page.trailing_zeros() << libc::MFD_HUGE_SHIFT);
                Ok(Source {
                    fd: Some(memfd(spec, flags)?),
                    page_size_bytes: page,
                    shared: true,
                    hugetlb: true,
                    ..plain
                })
            }
            Backing::File {
                path,
                share,
                readonly,
            } => open_file(spec, path, *share, *readonly),
        }
    }

    pub(crate) fn page_size_bytes(&self) -> u64 {
        self.page_size_bytes
    }

    /// Keeps a file that was made.
    pub(super) fn keep(&mut self) {
        self.made.remove = None;
        self.made.empty_again = None;
    }
}

/// What was made for a block and is taken back should the block come to nothing.
#[derive(Default)]
struct Made {
    remove: Option<PathBuf>,
    /// An empty file that was there.
    empty_again: Option<File>,
}

impl Drop for Made {
    fn drop(&mut self) {
        let emptied = self
            .empty_again
            .take()
            .map_or(Ok(()), |file| file.set_len(0));
        let removed = self.remove.take().map_or(Ok(()), std::fs::remove_file);
        if let Err(error) = emptied.and(removed) {
            tracing::warn!(%error, "cannot take back a file made for RAM");
        }
    }
}

fn open_file(spec: &RamSpec, path: &Path, share: bool, readonly: bool) -> Result<Source, Error> {
    let fail = |what: &str, source| Error::Host {
        name: spec.name.clone(),
        what: format!("cannot {what} {}", path.display()),
        source,
    };
    spec.check_pages(host_page_size())?;
    let (file, mut made) = open_or_make(spec, path, readonly)?;
    let page = huge_page_of(&file).map_err(|e| fail("examine", e))?;
    spec.check_pages(page.unwrap_or_else(host_page_size))?;
    let metadata = file.metadata().map_err(|e| fail("examine", e))?;
    if metadata.len() == 0 && metadata.is_file() && !readonly {
        file.set_len(spec.max_size_bytes)
            .map_err(|e| fail("extend", e))?;
        if made.remove.is_none() {
            made.empty_again = file.try_clone().ok();
        }
    } else if metadata.is_file() && metadata.len() < spec.max_size_bytes {
        return Err(Error::BackingTooShort {
            name: spec.name.clone(),
            path: path.to_owned(),
            bytes: metadata.len(),
            needed: spec.max_size_bytes,
        });
    }
    if !readonly {
        check_room(&spec.name, path, &file, share)?;
    }
    Ok(Source {
        fd: Some(OwnedFd::from(file)),
        page_size_bytes: page.unwrap_or_else(host_page_size),
        thp: false,
        shared: share,
        hugetlb: page.is_some(),
        own_pages: false,
        readonly: readonly && share,
        path: Some(path.to_owned()),
        made,
    })
}

fn open_or_make(spec: &RamSpec, path: &Path, readonly: bool) -> Result<(File, Made), Error> {
    let refused = |source: io::Error| {
        let raw = source.raw_os_error();
        let unwritable = [
            libc::EACCES,
            libc::EPERM,
            libc::EROFS,
            libc::ETXTBSY,
            libc::EISDIR,
        ];
        if !readonly && raw.is_some_and(|raw| unwritable.contains(&raw)) {
            return Error::BackingUnwritable {
                name: spec.name.clone(),
                path: path.to_owned(),
                source,
            };
        }
        Error::Host {
            name: spec.name.clone(),
            what: format!("cannot open {}", path.display()),
            source,
        }
    };
    let mut options = OpenOptions::new();
    // So that a pipe named by mistake cannot hang the open; to a file it is nothing.
    let flags = libc::O_NONBLOCK;
    options.read(true).write(!readonly).custom_flags(flags);
    match options.open(path) {
        Ok(file) => Ok((file, Made::default())),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !readonly => {
            let file = options.create_new(true).open(path).map_err(refused)?;
            let remove = Some(path.to_owned());
            let empty_again = None;
            Ok((
                file,
                Made {
                    remove,
                    empty_again,
                },
            ))
        }
        Err(error) => Err(refused(error)),
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
            return Err(no_huge_pages(spec, page_size_bytes));
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

fn no_huge_pages(spec: &RamSpec, page_size_bytes: u64) -> Error {
    Error::NoHugePages {
        name: spec.name.clone(),
        page_size_bytes,
        bytes: spec.size_bytes,
        detail: huge_page_figures(page_size_bytes),
    }
}

/// The page size of a file on hugetlbfs.
fn huge_page_of(file: &File) -> io::Result<Option<u64>> {
    let filesystem = filesystem_of(file)?;
    Ok((filesystem.f_type == HUGETLBFS_MAGIC).then_some(filesystem.f_bsize as u64))
}

/// The host's page size, in bytes.
pub(crate) fn host_page_size() -> u64 {
    // SAFETY: sysconf takes an integer.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
