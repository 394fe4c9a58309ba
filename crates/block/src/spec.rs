// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What to open and how.

use std::path::PathBuf;

/// Whether the host's page cache stands between the guest and the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Through the page cache; data is safe after a flush.
    #[default]
    Writeback,
    /// Past the page cache (`O_DIRECT`); data is still only safe after a flush, for the medium has a cache too.
    None,
}

/// What a guest's discard does to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discard {
    /// Space is given back to the host.
    #[default]
    Unmap,
    /// The guest is not offered discard, and space is never given back.
    Ignore,
}

/// An image to open with [`Disk::open`](crate::Disk::open).
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// A regular file with raw contents, or a host block device.
    pub path: PathBuf,
    /// Open for reading only, under a shared lock.
    pub readonly: bool,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// Reaction to the guest's discards.
    pub discard: Discard,
    /// Take the lock that keeps a second writer out. Off only for file systems that cannot lock.
    pub locking: bool,
}

impl DiskSpec {
    /// A writable, locked image behind the page cache that gives discarded space back.
    pub fn new(path: impl Into<PathBuf>) -> DiskSpec {
        DiskSpec {
            path: path.into(),
            readonly: false,
            cache: Cache::default(),
            discard: Discard::default(),
            locking: true,
        }
    }

    /// The same image for reading only.
    pub fn readonly(mut self) -> DiskSpec {
        self.readonly = true;
        self
    }
}
