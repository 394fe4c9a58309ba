// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a RAM block is to be, and how the host is to treat its memory.

use std::path::PathBuf;

use super::HostMemory;
use super::source::Source;
use crate::Error;

/// Blocks of sparse RAM are aligned to their size in this process, as pins look them up by host
/// address, and the arena goes no further than this.
const MAX_BLOCK: u64 = 1 << 30;

/// Where a block's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anon {
        /// Advise transparent huge pages.
        thp: bool,
    },
    /// A memfd, which other processes can map.
    Memfd {
        /// Advise transparent huge pages.
        thp: bool,
    },
    /// Huge pages from the host's pool, behind a memfd.
    Hugetlb {
        /// Page size in bytes.
        page_size_bytes: u64,
    },
    /// A file.
    File {
        /// Its path. A file that does not exist or is empty is made as large as the block's
        /// maximum; any other must be that large, and what lies behind is left alone.
        path: PathBuf,
        /// Whether guest writes reach the file.
        share: bool,
        /// The file is only read and must exist. When shared, the block is read-only for
        /// everybody; otherwise what the guest writes stays private.
        readonly: bool,
    },
}

/// What a RAM block is to be.
#[derive(Clone, Debug)]
pub struct RamSpec {
    /// Name, unique in the list (QEMU: idstr).
    pub name: String,
    /// Bytes used.
    pub size_bytes: u64,
    /// Bytes it may grow to; at least `size_bytes`.
    pub max_size_bytes: u64,
    /// Where the memory comes from.
    pub backing: Backing,
    /// Allocate all of it now.
    pub prefault: bool,
    /// Sparse: made of blocks of this many bytes, all unplugged at first.
    pub block_size_bytes: Option<u64>,
}

/// How the host is to treat a block's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamPolicy {
    /// Which of the host's NUMA nodes it comes from.
    pub numa: Option<NumaPolicy>,
    /// Let the host merge equal pages (`MADV_MERGEABLE`). It does so with private memory only:
    /// anonymous, or a file that is not shared.
    pub merge: bool,
    /// Whether core dumps of this process contain it (not: `MADV_DONTDUMP`).
    pub dump: bool,
    /// Threads that allocate large pieces of it at once; 0 for as many as help.
    pub prefault_threads: usize,
}

impl Default for RamPolicy {
    /// As the host treats any memory: no policy, not merged, dumped.
    fn default() -> RamPolicy {
        RamPolicy {
            numa: None,
            merge: false,
            dump: true,
            prefault_threads: 0,
        }
    }
}

/// Which of the host's NUMA nodes memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NumaPolicy {
    /// These and no others.
    Bind(Vec<u32>),
    /// This one for as long as it has memory.
    Preferred(u32),
    /// These in turn, page by page.
    Interleave(Vec<u32>),
}

impl RamSpec {
    /// A block of anonymous memory in huge pages where the host has them, that does not grow, is
    /// allocated as it is touched and is not sparse. To start from:
    ///
    /// ```
    /// # use ebbtide_memory::{Backing, RamSpec};
    /// let spec = RamSpec {
    ///     backing: Backing::Memfd { thp: true },
    ///     ..RamSpec::anon("dimm0", 64 << 20)
    /// };
    /// # assert_eq!(spec.max_size_bytes, 64 << 20);
    /// ```
    pub fn anon(name: impl Into<String>, size_bytes: u64) -> RamSpec {
        RamSpec {
            name: name.into(),
            size_bytes,
            max_size_bytes: size_bytes,
            backing: Backing::Anon { thp: true },
            prefault: false,
            block_size_bytes: None,
        }
    }

    pub(super) fn refuse<T>(&self, reason: String) -> Result<T, Error> {
        Err(Error::BadSpec {
            name: self.name.clone(),
            reason,
        })
    }

    /// What can be said before the backing is opened.
    pub(super) fn check(&self, policy: &RamPolicy) -> Result<(), Error> {
        if self.max_size_bytes < self.size_bytes {
            return self.refuse(format!(
                "size {} is above its maximum {}",
                self.size_bytes, self.max_size_bytes
            ));
        }
        if self.max_size_bytes == 0 {
            return self.refuse("size is 0".to_owned());
        }
        // What the kernel takes for lengths and offsets, less any alignment.
        if self.max_size_bytes > 1 << 62 {
            return self.refuse(format!("size {} is above 2^62", self.max_size_bytes));
        }
        if policy.merge && !self.is_private() {
            return self.refuse("merge=on: the host merges private memory only".to_owned());
        }
        match self.block_size_bytes {
            Some(block) => self.check_block(block),
            None => self.check_host(),
        }
    }

    fn is_private(&self) -> bool {
        matches!(
            self.backing,
            Backing::Anon { .. } | Backing::File { share: false, .. }
        )
    }

    fn check_block(&self, block: u64) -> Result<(), Error> {
        if !block.is_power_of_two() || block > MAX_BLOCK {
            let reason = "is not a power of two up to 1 GiB";
            return self.refuse(format!("block size {block} {reason}"));
        }
        if self.size_bytes != self.max_size_bytes || !self.size_bytes.is_multiple_of(block) {
            let (size, max) = (self.size_bytes, self.max_size_bytes);
            return self.refuse(format!(
                "size {size} (maximum {max}) is not a number of {block}-byte blocks"
            ));
        }
        match self.backing {
            Backing::File { readonly: true, .. } => {
                self.refuse("a file that is only read cannot be sparse".to_owned())
            }
            Backing::File { share: false, .. } => {
                // Its freed pages would show the file again, not zeroes.
                self.refuse("a private mapping of a file cannot be sparse".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn check_host(&self) -> Result<(), Error> {
        // A model makes a hundred thousand blocks of a page each; asking is what would take long.
        let asks = matches!(self.backing, Backing::Anon { .. } | Backing::Memfd { .. });
        if !asks || cfg!(loom) {
            return Ok(());
        }
        let host = HostMemory::read();
        if self.size_bytes <= host.limit_bytes() {
            return Ok(());
        }
        Err(Error::NoHostMemory {
            name: self.name.clone(),
            bytes: self.size_bytes,
            detail: host.to_string(),
        })
    }

    /// Before anything is made: sizes against the page size the backing is known to have.
    pub(super) fn check_pages(&self, page: u64) -> Result<(), Error> {
        for (what, bytes) in [
            ("size", self.size_bytes),
            ("maximum size", self.max_size_bytes),
        ] {
            if !bytes.is_multiple_of(page) {
                return self.refuse(format!(
                    "{what} {bytes} is not a multiple of the page size {page}"
                ));
            }
        }
        if let Some(block) = self.block_size_bytes
            && block < page
        {
            return self.refuse(format!("block size {block} is below the page size {page}"));
        }
        Ok(())
    }

    pub(super) fn check_against(&self, source: &Source) -> Result<(), Error> {
        self.check_pages(source.page_size_bytes())
    }
}
