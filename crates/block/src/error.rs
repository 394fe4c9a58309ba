// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an image could not be opened.

use std::io;
use std::path::{Path, PathBuf};

/// Everything that can go wrong while an image is opened. Each message is one line naming the path, and says what to do
/// where that is not obvious. Errors of single requests are plain [`io::Error`]s, for they go to the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing at the path.
    #[error("disk '{}': no such file", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// The path names a directory.
    #[error("disk '{}': is a directory, not an image", path.display())]
    IsDirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// The path names a FIFO, socket or character device.
    #[error("disk '{}': is a {kind}; an image is a regular file or a block device", path.display())]
    WrongKind {
        /// The path as given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// This process may not open the file the way it was asked to.
    #[error("disk '{}': permission denied {}{}", path.display(), access_word(*readonly), if *readonly { "" } else { " (readonly=on needs read permission only)" })]
    PermissionDenied {
        /// The path as given.
        path: PathBuf,
        /// Whether only read access was asked for.
        readonly: bool,
    },
    /// Write access was asked for and the medium or its file system cannot be written.
    #[error("disk '{}': cannot be written (read-only file system or device); use readonly=on", path.display())]
    NotWritable {
        /// The path as given.
        path: PathBuf,
    },
    /// Somebody else holds a lock that excludes ours.
    #[error("disk '{}': locked; {}", path.display(), if *readonly {
        "it is open for writing, in this process or another"
    } else {
        "it is open, in this process or another (several users need readonly=on in each of them)"
    })]
    Locked {
        /// The path as given.
        path: PathBuf,
        /// Whether a shared (read-only) lock was asked for.
        readonly: bool,
    },
    /// The lock call itself failed (a file system without locks).
    #[error("disk '{}': cannot be locked: {source}; locking=off opens it unprotected", path.display())]
    LockFailed {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The image does not hold a single sector.
    #[error("disk '{}': {size_bytes} bytes is smaller than one sector of {sector_bytes} bytes", path.display())]
    TooSmall {
        /// The path as given.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
        /// The sector it does not fill.
        sector_bytes: u32,
    },
    /// The image ends within a sector.
    #[error("disk '{}': size of {size_bytes} bytes is not a multiple of {sector_bytes} bytes", path.display())]
    PartialSector {
        /// The path as given.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
        /// The sector size it should be a multiple of.
        sector_bytes: u32,
    },
    /// Writing to the end of the image would exceed the process's limit on file sizes, for which the kernel ends it.
    #[error("disk '{}': {size_bytes} bytes is more than this process may write (ulimit -f: {limit_bytes}); raise the limit or use readonly=on", path.display())]
    BehindFileLimit {
        /// The path as given.
        path: PathBuf,
        /// Its size in bytes.
        size_bytes: u64,
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// The file system cannot bypass its page cache.
    #[error("disk '{}': its file system does not support direct I/O; leave direct=on away", path.display())]
    DirectUnsupported {
        /// The path as given.
        path: PathBuf,
    },
    /// A disk without a medium, larger than offsets reach.
    #[error("null-co: size of {size_bytes} bytes is more than {max_bytes}")]
    NullTooLarge {
        /// The size asked for.
        size_bytes: u64,
        /// The largest there is.
        max_bytes: u64,
    },
    /// A disk that was not made larger.
    #[error("cannot make the disk {size_bytes} bytes large: {reason}")]
    NotGrown {
        /// The size asked for.
        size_bytes: u64,
        /// Why not.
        reason: String,
    },
    /// A rule for faults that cannot be read.
    #[error("fault rule '{rule}': {reason}")]
    FaultRule {
        /// The rule as given.
        rule: String,
        /// What is wrong with it, and what is accepted.
        reason: String,
    },
    /// Anything else the kernel refused.
    #[error("disk '{}': cannot {action}: {source}", path.display())]
    Os {
        /// The path as given.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn access_word(readonly: bool) -> &'static str {
    if readonly {
        "to read it"
    } else {
        "to read and write it"
    }
}

impl Error {
    /// Attaches the path and the attempted action to what the kernel answered.
    pub(crate) fn os(path: &Path, action: &'static str, source: impl Into<io::Error>) -> Error {
        Error::Os {
            path: path.to_owned(),
            action,
            source: source.into(),
        }
    }
}
