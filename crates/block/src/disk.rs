// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk and its use on one iothread.

use std::future::Future;
use std::io;
use std::sync::Arc;

use ebbtide_iothread::Local;

use crate::buffer::Buffer;
use crate::error::Error;
use crate::fault::{Faults, Point};
use crate::file::FileBackend;
use crate::image::{Image, SECTOR_BYTES};
use crate::op::Op;
use crate::spec::{Discard, DiskSpec};
use crate::transfer::Direction;

/// What a disk can do besides reading, writing and flushing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// [`Op::Discard`] is worth sending.
    pub discard: bool,
    /// [`Op::WriteZeroes`] may be sent. Always so for a disk that can be written.
    pub write_zeroes: bool,
}

/// An opened, locked disk. Closed and unlocked when it and every [`LocalDisk`] of it are gone and no operation is in
/// the kernel.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    backend: Backend,
    size_bytes: u64,
    logical_block_bytes: u32,
    physical_block_bytes: u32,
    readonly: bool,
    features: Features,
    faults: Option<Faults>,
}

#[derive(Debug)]
enum Backend {
    File(FileBackend),
    /// Reads zeroes, forgets what is written.
    Null,
}

impl Disk {
    /// Opens the image of `spec`. May block.
    ///
    /// # Errors
    /// The image is missing, no regular file or block device, not permitted, locked, of an impossible size, or its
    /// file system cannot do what was asked; the message names the path and the reason.
    pub fn open(spec: &DiskSpec) -> Result<Disk, Error> {
        let image = Image::open(spec)?;
        Ok(Disk {
            shared: Arc::new(Shared {
                size_bytes: image.size_bytes,
                logical_block_bytes: image.logical_block_bytes,
                physical_block_bytes: image.physical_block_bytes,
                readonly: spec.readonly,
                features: Features {
                    discard: !spec.readonly && spec.discard == Discard::Unmap,
                    write_zeroes: !spec.readonly,
                },
                backend: Backend::File(FileBackend::new(image)),
                faults: None,
            }),
        })
    }

    /// A disk of `size_bytes` (rounded down to whole sectors) that reads zeroes and forgets what is written: for
    /// measuring everything above the medium.
    pub fn null(size_bytes: u64) -> Disk {
        let sector = u64::from(SECTOR_BYTES);
        Disk {
            shared: Arc::new(Shared {
                backend: Backend::Null,
                size_bytes: size_bytes / sector * sector,
                logical_block_bytes: SECTOR_BYTES,
                physical_block_bytes: SECTOR_BYTES,
                readonly: false,
                features: Features {
                    discard: true,
                    write_zeroes: true,
                },
                faults: None,
            }),
        }
    }

    /// The same disk with faults on order, for tests. `Err`: it is attached already, and gets none.
    pub fn with_faults(self, faults: &Faults) -> Result<Disk, Disk> {
        match Arc::try_unwrap(self.shared) {
            Ok(mut shared) => {
                shared.faults = Some(faults.clone());
                Ok(Disk {
                    shared: Arc::new(shared),
                })
            }
            Err(shared) => Err(Disk { shared }),
        }
    }

    /// Size in bytes, whole logical blocks.
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes
    }

    /// Whether it refuses writes.
    pub fn readonly(&self) -> bool {
        self.shared.readonly
    }

    /// The unit it is addressed in, in bytes; a power of two from 512.
    pub fn logical_block_bytes(&self) -> u32 {
        self.shared.logical_block_bytes
    }

    /// The unit it is best written in, in bytes; a power of two, at least a logical block.
    pub fn physical_block_bytes(&self) -> u32 {
        self.shared.physical_block_bytes
    }

    /// What it can do besides reading, writing and flushing.
    pub fn features(&self) -> Features {
        self.shared.features
    }

    /// The disk for tasks of one iothread. Several may exist.
    pub fn attach(&self, local: &Local) -> LocalDisk {
        LocalDisk {
            local: local.clone(),
            shared: Arc::clone(&self.shared),
        }
    }
}

/// A disk on one iothread.
#[derive(Clone)]
pub struct LocalDisk {
    local: Local,
    shared: Arc<Shared>,
}

impl LocalDisk {
    /// Starts an operation when first polled; resolves when all of it is done, and gives the buffer back. Operations do
    /// not wait for each other.
    ///
    /// When the future is dropped earlier, the kernel keeps the buffer until it has done with it.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside the disk or, with direct I/O, not of whole blocks; `PermissionDenied` for
    /// changes to a read-only disk; `UnexpectedEof` where the image has become shorter; and whatever the host says:
    /// `ENOSPC`, `EIO`, ... A failed write may have written a part.
    pub fn submit<B: Buffer>(
        &self,
        op: Op,
        buf: B,
    ) -> impl Future<Output = (io::Result<()>, B)> + 'static {
        let local = self.local.clone();
        let shared = Arc::clone(&self.shared);
        async move {
            if let Err(error) = shared.check(&op, buf.total_len()) {
                return (Err(error), buf);
            }
            let fault = shared
                .faults
                .as_ref()
                .and_then(|faults| Some((faults, faults.meet(&op)?)));
            match fault {
                None => shared.perform(&local, op, buf).await,
                Some((faults, (fault, Point::Before))) => {
                    if let Err(error) = faults.suffer(&local, fault).await {
                        return (Err(error), buf);
                    }
                    shared.perform(&local, op, buf).await
                }
                Some((faults, (fault, Point::After))) => {
                    let (result, buf) = shared.perform(&local, op, buf).await;
                    let suffered = faults.suffer(&local, fault).await;
                    (result.and(suffered), buf)
                }
            }
        }
    }
}

impl Shared {
    fn check(&self, op: &Op, buffer_bytes: usize) -> io::Result<()> {
        if self.readonly && op.modifies() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        match op.range(buffer_bytes as u64) {
            Some(range) if range.end <= self.size_bytes => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "range outside the disk",
            )),
        }
    }

    async fn perform<B: Buffer>(&self, local: &Local, op: Op, mut buf: B) -> (io::Result<()>, B) {
        let file = match &self.backend {
            Backend::File(file) => file,
            Backend::Null => {
                let result = match op {
                    Op::Read { .. } => fill_with_zeroes(&mut buf),
                    _ => Ok(()),
                };
                return (result, buf);
            }
        };
        let result = match op {
            Op::Read { offset } => {
                return file
                    .transfer(local, Direction::FromImage, offset, buf)
                    .await;
            }
            Op::Write { offset } => {
                return file.transfer(local, Direction::ToImage, offset, buf).await;
            }
            Op::Flush => file.flush(local).await,
            Op::Discard { offset, len } => file.discard(local, offset, len).await,
            Op::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => file.write_zeroes(local, offset, len, may_unmap).await,
        };
        (result, buf)
    }
}

fn fill_with_zeroes<B: Buffer>(buf: &mut B) -> io::Result<()> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let total = buf.total_len();
    let mut done = 0;
    while done < total {
        let here = ZEROES.get(..total - done).unwrap_or(&ZEROES);
        buf.copy_from(done, here)?;
        done += here.len();
    }
    Ok(())
}
