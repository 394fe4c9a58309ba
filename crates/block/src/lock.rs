// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock that keeps two writers off one image.
//!
//! Open-file-description locks: they belong to the descriptor rather than to the process, so two disks of one VMM exclude
//! each other too, they cannot be lost by closing an unrelated descriptor of the same file, and the kernel drops them
//! whatever way the process ends.
//!
//! QEMU locks single bytes, all of them shared: from 100 on one for each thing it does to an image (0: reads that are
//! consistent, 1: writes, 3: changes of its size), from 200 on one for each that it does not want others to do; and looks
//! whether others have locked the counterparts. A writer here has all bytes to itself, a reader does as one of QEMU's.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// How much company an image tolerates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Other readers are welcome.
    Shared,
    /// Nobody else.
    Exclusive,
}

/// What a reader says: it reads, and nobody is to write or to change the size.
const READS: [i64; 3] = [100, 201, 203];
/// What nobody may have said beside a reader.
const NO_READER: [i64; 3] = [101, 103, 200];

/// Tries once to lock the file behind `fd`. `Ok(false)`: somebody else's lock is in the way; some of it may be locked then,
/// until all descriptors of the open file are closed.
pub(crate) fn try_lock(fd: BorrowedFd<'_>, mode: Mode) -> io::Result<bool> {
    match mode {
        Mode::Exclusive => lock(fd, libc::F_WRLCK, 0, TO_THE_END),
        // Locked before it is looked at: of two that do so at once, one at least finds the other.
        Mode::Shared => Ok(all(&READS, |byte| lock(fd, libc::F_RDLCK, byte, 1))?
            && all(&NO_READER, |byte| is_free(fd, byte))?),
    }
}

fn all(bytes: &[i64], mut is_so: impl FnMut(i64) -> io::Result<bool>) -> io::Result<bool> {
    for byte in bytes {
        if !is_so(*byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// However far the file may grow.
const TO_THE_END: i64 = 0;

fn range(kind: libc::c_int, start: i64, bytes: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: bytes,
        l_pid: 0, // demanded by OFD locks
    }
}

fn lock(fd: BorrowedFd<'_>, kind: libc::c_int, start: i64, bytes: i64) -> io::Result<bool> {
    let lock = range(kind, start, bytes);
    // SAFETY: F_OFD_SETLK only reads the flock it is given, which outlives the call; `fd` is open as it is borrowed.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether nobody else has locked a byte, in whatever way.
fn is_free(fd: BorrowedFd<'_>, byte: i64) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, byte, 1);
    // SAFETY: F_OFD_GETLK reads and writes the flock it is given, which outlives the call; `fd` is open as it is borrowed.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(lock.l_type) == libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    /// What another program does with a file: the bytes it locks, all shared, and those it wants nobody else to have locked.
    struct Other(File);

    impl Other {
        fn new(file: &tempfile::NamedTempFile, bytes: &[i64]) -> Other {
            let other = File::options().read(true).write(true).open(file.path());
            let other = other.unwrap();
            for byte in bytes {
                assert!(lock(other.as_fd(), libc::F_RDLCK, *byte, 1).unwrap());
            }
            Other(other)
        }

        fn finds_free(&self, bytes: &[i64]) -> bool {
            let mut bytes = bytes.iter();
            bytes.all(|byte| is_free(self.0.as_fd(), *byte).unwrap())
        }
    }

    fn file() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().unwrap()
    }

    fn opened(file: &tempfile::NamedTempFile, mode: Mode) -> Option<File> {
        let writes = mode == Mode::Exclusive;
        let opened = File::options().read(true).write(writes).open(file.path());
        let opened = opened.unwrap();
        let locked = try_lock(opened.as_fd(), mode).unwrap();
        locked.then_some(opened)
    }

    /// What a writer of QEMU says.
    const WRITES: [i64; 4] = [100, 101, 201, 203];

    #[test]
    fn nobody_is_let_in_beside_a_writer_of_qemu() {
        let file = file();
        // Also one that others may write beside.
        for bytes in [&WRITES[..], &[101], &[103]] {
            let writer = Other::new(&file, bytes);
            assert!(opened(&file, Mode::Shared).is_none(), "{bytes:?}");
            assert!(opened(&file, Mode::Exclusive).is_none(), "{bytes:?}");
            drop(writer);
        }
        assert!(opened(&file, Mode::Exclusive).is_some());
    }

    #[test]
    fn readers_are_let_in_beside_a_reader_of_qemu() {
        let file = file();
        let reader = Other::new(&file, &READS);
        let _first = opened(&file, Mode::Shared).unwrap();
        let _second = opened(&file, Mode::Shared).unwrap();
        assert!(opened(&file, Mode::Exclusive).is_none());
        // Nor does one of QEMU that comes last find anything.
        assert!(reader.finds_free(&NO_READER));
    }

    /// It locks first, then looks for who reads and wants nobody to write.
    #[test]
    fn a_writer_of_qemu_finds_a_reader() {
        let file = file();
        let reader = opened(&file, Mode::Shared).unwrap();
        let writer = Other::new(&file, &[100, 101]);
        assert!(!writer.finds_free(&[201]));
        drop(reader);
        assert!(writer.finds_free(&[201]));
    }

    #[test]
    fn one_that_only_reads_finds_a_writer() {
        let file = file();
        let _writer = opened(&file, Mode::Exclusive).unwrap();
        let other = Other::new(&file, &[]);
        for byte in NO_READER {
            assert!(!other.finds_free(&[byte]), "{byte}");
        }
    }

    #[test]
    fn what_was_locked_in_vain_is_not_kept() {
        let file = file();
        let writer = Other::new(&file, &WRITES);
        assert!(opened(&file, Mode::Shared).is_none());
        assert!(writer.finds_free(&[100, 201, 203]));
    }
}
