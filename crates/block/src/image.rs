// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening an image: kind, access, lock, geometry. Everything here may block.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::abandon::Life;
use crate::error::Error;
use crate::lock;
use crate::spec::{Cache, DiskSpec};

/// The unit of the protocols above, and the least a disk can hold.
pub(crate) const SECTOR_BYTES: u32 = 512;

/// Where direct I/O may start and how its memory must be aligned, both in bytes; powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    pub offset: u32,
    pub memory: u32,
}

/// An opened and locked image.
#[derive(Debug)]
pub(crate) struct Image {
    pub file: File,
    pub size_bytes: u64,
    pub block_device: bool,
    pub logical_block_bytes: u32,
    pub physical_block_bytes: u32,
    /// `None` behind the page cache.
    pub direct: Option<DirectAlignment>,
    pub life: Arc<Life>,
}

impl Image {
    pub(crate) fn open(spec: &DiskSpec) -> Result<Image, Error> {
        let path = spec.path.as_path();
        let file = File::from(open_descriptor(spec)?);
        let kind = kind_of(path, &file)?;
        if spec.locking {
            take_lock(spec, &file)?;
        }
        let direct = match spec.cache {
            Cache::Writeback => None,
            Cache::None => Some(direct_alignment(path, &file)?),
        };
        let mut image = match kind {
            Kind::Regular => regular(path, file)?,
            Kind::BlockDevice => block_device(spec, file)?,
        };
        if let Some(direct) = direct {
            image.logical_block_bytes = image.logical_block_bytes.max(direct.offset);
            image.physical_block_bytes = image.physical_block_bytes.max(image.logical_block_bytes);
            image.direct = Some(direct);
        }
        check_size(path, image.size_bytes, image.logical_block_bytes)?;
        if !spec.readonly && !image.block_device {
            check_file_limit(path, image.size_bytes)?;
        }
        Ok(image)
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Regular,
    BlockDevice,
}

fn open_descriptor(spec: &DiskSpec) -> Result<OwnedFd, Error> {
    let path = spec.path.as_path();
    let mut flags = if spec.readonly {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    flags |= OFlags::CLOEXEC;
    if spec.cache == Cache::None {
        flags |= OFlags::DIRECT;
    }
    // NONBLOCK only so that a FIFO named by mistake cannot hang the open.
    match rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty()) {
        Ok(fd) => {
            // io_uring would answer EAGAIN instead of waiting.
            rustix::fs::fcntl_setfl(&fd, flags)
                .map_err(|e| Error::os(path, "set up its descriptor", e))?;
            Ok(fd)
        }
        Err(errno) => Err(open_error(spec, errno)),
    }
}

fn open_error(spec: &DiskSpec, errno: Errno) -> Error {
    let path = spec.path.clone();
    match errno {
        Errno::NOENT | Errno::NOTDIR => Error::NotFound { path },
        Errno::ISDIR => Error::IsDirectory { path },
        // What opening a socket, or a FIFO nobody reads, fails with.
        Errno::NXIO => Error::WrongKind {
            path,
            kind: "socket or pipe",
        },
        Errno::ROFS => Error::NotWritable { path },
        Errno::ACCESS | Errno::PERM => {
            if !spec.readonly && is_readonly_device(&spec.path) {
                return Error::NotWritable { path };
            }
            Error::PermissionDenied {
                path,
                readonly: spec.readonly,
            }
        }
        Errno::INVAL if spec.cache == Cache::None => Error::DirectUnsupported { path },
        other => Error::os(&spec.path, "open it", other),
    }
}

/// A block device that says of itself that it cannot be written answers EACCES, too, when opened for writing.
fn is_readonly_device(path: &Path) -> bool {
    let Ok(fd) = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    ) else {
        return false;
    };
    let is_device = rustix::fs::fstat(&fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice);
    is_device && crate::blkdev::is_readonly(fd.as_fd()).unwrap_or(false)
}

fn kind_of(path: &Path, file: &File) -> Result<Kind, Error> {
    let stat = rustix::fs::fstat(file).map_err(|e| Error::os(path, "look at it", e))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(Kind::Regular),
        FileType::BlockDevice => return Ok(Kind::BlockDevice),
        FileType::Directory => {
            return Err(Error::IsDirectory {
                path: path.to_owned(),
            });
        }
        FileType::Fifo => "named pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        _ => "special file",
    };
    Err(Error::WrongKind {
        path: path.to_owned(),
        kind,
    })
}

fn take_lock(spec: &DiskSpec, file: &File) -> Result<(), Error> {
    let mode = if spec.readonly {
        lock::Mode::Shared
    } else {
        lock::Mode::Exclusive
    };
    let path = spec.path.clone();
    match lock::try_lock(file.as_fd(), mode) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Locked {
            path,
            readonly: spec.readonly,
        }),
        Err(source) => Err(Error::LockFailed { path, source }),
    }
}

fn regular(path: &Path, file: File) -> Result<Image, Error> {
    let stat = rustix::fs::fstat(&file).map_err(|e| Error::os(path, "look at it", e))?;
    let preferred = u32::try_from(stat.st_blksize).unwrap_or(0);
    let size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(Image {
        size_bytes,
        life: Life::new(size_bytes),
        file,
        block_device: false,
        logical_block_bytes: SECTOR_BYTES,
        physical_block_bytes: physical_block(preferred),
        direct: None,
    })
}

/// The file system's block, as far as it can be told to a guest: writes smaller than it cost a read on the host.
fn physical_block(preferred_bytes: u32) -> u32 {
    if preferred_bytes.is_power_of_two() && (SECTOR_BYTES..=64 << 10).contains(&preferred_bytes) {
        preferred_bytes
    } else {
        SECTOR_BYTES
    }
}

fn block_device(spec: &DiskSpec, file: File) -> Result<Image, Error> {
    let path = spec.path.as_path();
    let ask = |e| Error::os(path, "ask the block device for its geometry", e);
    // Some devices let themselves be opened for writing and then refuse every write.
    if !spec.readonly && crate::blkdev::is_readonly(file.as_fd()).map_err(ask)? {
        return Err(Error::NotWritable {
            path: path.to_owned(),
        });
    }
    let size_bytes = crate::blkdev::size_bytes(file.as_fd()).map_err(ask)?;
    let logical = rustix::fs::ioctl_blksszget(&file).map_err(ask)?;
    let physical = rustix::fs::ioctl_blkpbszget(&file).map_err(ask)?;
    let logical_block_bytes = logical.max(SECTOR_BYTES);
    Ok(Image {
        file,
        size_bytes,
        life: Life::new(size_bytes),
        block_device: true,
        logical_block_bytes,
        physical_block_bytes: physical.max(logical_block_bytes),
        direct: None,
    })
}

fn check_size(path: &Path, size_bytes: u64, sector_bytes: u32) -> Result<(), Error> {
    let path = || path.to_owned();
    if size_bytes < u64::from(sector_bytes) {
        return Err(Error::TooSmall {
            path: path(),
            size_bytes,
            sector_bytes,
        });
    }
    if !size_bytes.is_multiple_of(u64::from(sector_bytes)) {
        return Err(Error::PartialSector {
            path: path(),
            size_bytes,
            sector_bytes,
        });
    }
    Ok(())
}

/// A write behind RLIMIT_FSIZE does not just fail: its thread gets SIGXFSZ.
fn check_file_limit(path: &Path, size_bytes: u64) -> Result<(), Error> {
    match rustix::process::getrlimit(rustix::process::Resource::Fsize).current {
        Some(limit_bytes) if size_bytes > limit_bytes => Err(Error::BehindFileLimit {
            path: path.to_owned(),
            size_bytes,
            limit_bytes,
        }),
        _ => Ok(()),
    }
}

/// Alignment from statx(2) where the kernel tells it (6.1); else a whole page, which no device exceeds.
fn direct_alignment(path: &Path, file: &File) -> Result<DirectAlignment, Error> {
    const FALLBACK: DirectAlignment = DirectAlignment {
        offset: 4096,
        memory: 4096,
    };
    let flags = StatxFlags::DIOALIGN | StatxFlags::TYPE;
    let stat = match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, flags) {
        Ok(stat) => stat,
        Err(Errno::NOSYS) => return Ok(FALLBACK),
        Err(e) => return Err(Error::os(path, "ask for the alignment of direct I/O", e)),
    };
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(FALLBACK);
    }
    let told = DirectAlignment {
        offset: stat.stx_dio_offset_align,
        memory: stat.stx_dio_mem_align,
    };
    if told.offset == 0 || told.memory == 0 {
        return Err(Error::DirectUnsupported {
            path: path.to_owned(),
        });
    }
    if told.offset.is_power_of_two() && told.memory.is_power_of_two() && told.memory <= 1 << 20 {
        Ok(told)
    } else {
        Ok(FALLBACK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    fn file_of(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn refusal(spec: DiskSpec) -> String {
        Image::open(&spec).expect_err("must be refused").to_string()
    }

    #[test]
    fn geometry_of_a_file() {
        let file = file_of(1 << 20);
        let image = Image::open(&DiskSpec::new(file.path())).unwrap();
        assert_eq!(image.size_bytes, 1 << 20);
        assert_eq!(image.logical_block_bytes, 512);
        assert!(image.physical_block_bytes.is_power_of_two());
        assert!(!image.block_device);
        let flags = rustix::fs::fcntl_getfl(&image.file).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
    }

    #[test]
    fn missing_and_directory() {
        let dir = tempfile::tempdir().unwrap();
        let missing = refusal(DiskSpec::new(dir.path().join("none.img")));
        assert!(missing.contains("none.img': no such file"), "{missing}");
        let directory = refusal(DiskSpec::new(dir.path()));
        assert!(directory.contains("is a directory"), "{directory}");
        let directory = refusal(DiskSpec::new(dir.path()).readonly());
        assert!(directory.contains("is a directory"), "{directory}");
    }

    #[test]
    fn pipes_sockets_and_character_devices_are_no_images() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(refusal(DiskSpec::new(&fifo)).contains("is a named pipe"));
        assert!(refusal(DiskSpec::new(&fifo).readonly()).contains("is a named pipe"));
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        assert!(refusal(DiskSpec::new(&socket)).contains("is a socket"));
        assert!(refusal(DiskSpec::new("/dev/null")).contains("is a character device"));
    }

    #[test]
    fn sizes() {
        assert!(
            refusal(DiskSpec::new(file_of(0).path()))
                .contains("0 bytes is smaller than one sector of 512 bytes")
        );
        assert!(refusal(DiskSpec::new(file_of(511).path())).contains("511 bytes is smaller"));
        assert!(
            refusal(DiskSpec::new(file_of(1025).path()))
                .contains("size of 1025 bytes is not a multiple of 512")
        );
        assert_eq!(
            Image::open(&DiskSpec::new(file_of(512).path()))
                .unwrap()
                .size_bytes,
            512
        );
    }

    #[test]
    fn a_writer_excludes_everybody() {
        let file = file_of(4096);
        let writer = Image::open(&DiskSpec::new(file.path())).unwrap();
        let second = refusal(DiskSpec::new(file.path()));
        assert!(second.contains("locked; it is open"), "{second}");
        let reader = refusal(DiskSpec::new(file.path()).readonly());
        assert!(
            reader.contains("open for writing, in this process"),
            "{reader}"
        );
        drop(writer);
        Image::open(&DiskSpec::new(file.path())).unwrap();
    }

    #[test]
    fn readers_share_and_exclude_a_writer() {
        let file = file_of(4096);
        let _first = Image::open(&DiskSpec::new(file.path()).readonly()).unwrap();
        let _second = Image::open(&DiskSpec::new(file.path()).readonly()).unwrap();
        let writer = refusal(DiskSpec::new(file.path()));
        assert!(writer.contains("readonly=on in each"), "{writer}");
    }

    #[test]
    fn locking_off_ignores_locks() {
        let file = file_of(4096);
        let _writer = Image::open(&DiskSpec::new(file.path())).unwrap();
        let spec = DiskSpec {
            locking: false,
            ..DiskSpec::new(file.path())
        };
        Image::open(&spec).unwrap();
    }

    /// The way QEMU marks an image in use: shared locks on single bytes from 100 on.
    #[test]
    fn byte_locks_of_others_are_met() {
        let file = file_of(4096);
        let other = File::options()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap();
        let lock = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 100,
            l_len: 1,
            l_pid: 0,
        };
        use std::os::fd::AsRawFd;
        // SAFETY: the flock outlives the call, the descriptor is open.
        let result = unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        assert_eq!(result, 0);
        assert!(refusal(DiskSpec::new(file.path())).contains("locked; it is open"));
    }

    #[test]
    fn unreadable_and_unwritable() {
        use std::os::unix::fs::PermissionsExt;
        let mut file = file_of(4096);
        file.write_all(b"x").unwrap();
        let path = file.path().to_owned();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
        let (write, read) = as_nobody(move || {
            let write = refusal(DiskSpec::new(&path));
            Image::open(&DiskSpec::new(&path).readonly()).unwrap();
            std::fs::metadata(&path).unwrap();
            (write, path)
        });
        assert!(
            write.contains("permission denied to read and write it (readonly=on needs"),
            "{write}"
        );
        std::fs::set_permissions(&read, std::fs::Permissions::from_mode(0o000)).unwrap();
        let read = as_nobody(move || refusal(DiskSpec::new(&read).readonly()));
        assert!(read.ends_with("permission denied to read it"), "{read}");
    }

    /// Runs `job` on a thread that has lost root's power over files (if it had it).
    fn as_nobody<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(move || {
            if rustix::process::geteuid().is_root() {
                // SAFETY: changes the file-system identity of the calling thread only, which ends after `job`.
                unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
            }
            job()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn direct_io_asks_for_alignment() {
        let file = file_of(1 << 20);
        let spec = DiskSpec {
            cache: Cache::None,
            ..DiskSpec::new(file.path())
        };
        match Image::open(&spec) {
            Ok(image) => {
                let direct = image.direct.expect("direct was asked for");
                assert!(image.logical_block_bytes >= direct.offset);
                assert!(
                    rustix::fs::fcntl_getfl(&image.file)
                        .unwrap()
                        .contains(OFlags::DIRECT)
                );
            }
            Err(error) => assert!(matches!(error, Error::DirectUnsupported { .. }), "{error}"),
        }
    }

    #[test]
    fn physical_block_is_bounded() {
        assert_eq!(physical_block(4096), 4096);
        assert_eq!(physical_block(0), 512);
        assert_eq!(physical_block(3000), 512);
        assert_eq!(physical_block(2 << 20), 512);
    }
}
