// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a file can still provide a block's memory.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::RamBlock;
use crate::Error;

/// Unit of `stat`'s count of blocks, in bytes.
const STAT_BLOCK: u64 = 512;
const TMPFS_MAGIC: i64 = 0x0102_1994;

impl RamBlock {
    /// Whether its memory is that of a file with a name, which others may cut short and whose filesystem they may fill.
    pub fn is_file(&self) -> bool {
        self.mapping().is_file()
    }

    /// Whether the file behind the block can still provide all of it. Nobody else tells: under KVM a guest that touches
    /// what is not there waits for it as if it were swapped out, for ever if need be. Of a block without a file nothing
    /// can be told: `Ok`. Asks the filesystem, and may block.
    ///
    /// # Errors
    /// `BackingTooShort` when the file was cut short; `BackingWithoutRoom` when it has holes for which the filesystem has
    /// no room; `Host`.
    pub fn check_provided(&self) -> Result<(), Error> {
        let (Some(path), Some(fd)) = (self.mapping().path(), self.fd()) else {
            return Ok(());
        };
        self.mapping().check_length(self.size_bytes())?;
        if self.is_readonly() {
            return Ok(());
        }
        let file = fd.try_clone_to_owned().map(File::from);
        let file = file.map_err(|source| unseen(self.name(), path, source))?;
        check_room(self.name(), path, &file, self.is_shared())
    }
}

/// Whether the filesystem has room for the holes of `file`, should somebody write to them. In a file that is not `shared`
/// that takes no room, unless the filesystem is itself in memory.
pub(super) fn check_room(name: &str, path: &Path, file: &File, shared: bool) -> Result<(), Error> {
    let metadata = file.metadata().map_err(|e| unseen(name, path, e))?;
    let filesystem = filesystem_of(file).map_err(|e| unseen(name, path, e))?;
    // One without a limit says 0 of 0.
    let limited = filesystem.f_blocks > 0 && (shared || filesystem.f_type == TMPFS_MAGIC);
    if !metadata.is_file() || !limited {
        return Ok(());
    }
    let block = filesystem.f_bsize.unsigned_abs();
    let (missing, room) = (holes(&metadata), filesystem.f_bavail.saturating_mul(block));
    if missing <= room {
        return Ok(());
    }
    Err(Error::BackingWithoutRoom {
        name: name.to_owned(),
        path: path.to_owned(),
        room,
        missing,
    })
}

/// Bytes that have no place yet.
fn holes(metadata: &Metadata) -> u64 {
    let there = metadata.blocks().saturating_mul(STAT_BLOCK);
    metadata.len().saturating_sub(there)
}

pub(super) fn filesystem_of(file: &File) -> io::Result<libc::statfs> {
    // SAFETY: all zeroes is a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor of ours and a place for the answer.
    if unsafe { libc::fstatfs(file.as_raw_fd(), std::ptr::from_mut(&mut stat)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat)
}

fn unseen(name: &str, path: &Path, source: io::Error) -> Error {
    Error::Host {
        name: name.to_owned(),
        what: format!("cannot examine {}", path.display()),
        source,
    }
}
