// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk and its use on one iothread.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use ebbtide_iothread::{Local, Sender};

use crate::abandon::{Abandoned, InFlight, Life};
use crate::buffer::Buffer;
use crate::error::Error;
use crate::failure::{Failure, Teller};
use crate::fault::{Faults, Point};
use crate::file::FileBackend;
use crate::image::{Image, SECTOR_BYTES};
use crate::null::{NullBackend, NullSpec};
use crate::op::Op;
use crate::operation::Operation;
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
pub(crate) struct Shared {
    pub(crate) backend: Arc<Backend>,
    pub(crate) life: Arc<Life>,
    logical_block_bytes: u32,
    physical_block_bytes: u32,
    readonly: bool,
    features: Features,
    /// The outermost first: an operation meets them on its way in, and on its way out the other way round.
    pub(crate) faults: Vec<Faults>,
    pub(crate) failures: Teller,
}

#[derive(Debug)]
pub(crate) enum Backend {
    File(FileBackend),
    Null(NullBackend),
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
                logical_block_bytes: image.logical_block_bytes,
                physical_block_bytes: image.physical_block_bytes,
                readonly: spec.readonly,
                features: Features {
                    discard: !spec.readonly && spec.discard == Discard::Unmap,
                    write_zeroes: !spec.readonly,
                },
                life: Arc::clone(&image.life),
                backend: Arc::new(Backend::File(FileBackend::new(image))),
                faults: Vec::new(),
                failures: Teller::default(),
            }),
        })
    }

    /// A disk of `size_bytes` (rounded down to whole sectors; less than 2^63) that reads zeroes at once and forgets what is
    /// written: for measuring everything above the medium.
    pub fn null(size_bytes: u64) -> Disk {
        let spec = NullSpec {
            size_bytes,
            read_zeroes: true,
            ..NullSpec::default()
        };
        let (backend, size_bytes) = NullBackend::clamped(&spec);
        Disk::without_medium(backend, size_bytes)
    }

    /// A disk without a medium, as `null-co` is.
    ///
    /// # Errors
    /// [`Error::NullTooLarge`].
    pub fn null_co(spec: &NullSpec) -> Result<Disk, Error> {
        let (backend, size_bytes) = NullBackend::new(spec)?;
        Ok(Disk::without_medium(backend, size_bytes))
    }

    fn without_medium(backend: NullBackend, size_bytes: u64) -> Disk {
        Disk {
            shared: Arc::new(Shared {
                backend: Arc::new(Backend::Null(backend)),
                life: Life::new(size_bytes),
                logical_block_bytes: SECTOR_BYTES,
                physical_block_bytes: SECTOR_BYTES,
                readonly: false,
                features: Features {
                    discard: true,
                    write_zeroes: true,
                },
                faults: Vec::new(),
                failures: Teller::default(),
            }),
        }
    }

    /// The same disk with faults on order, for tests. `Err`: it is attached already, and gets none.
    pub fn with_faults(self, faults: &Faults) -> Result<Disk, Disk> {
        match Arc::try_unwrap(self.shared) {
            Ok(mut shared) => {
                shared.faults.insert(0, faults.clone());
                Ok(Disk {
                    shared: Arc::new(shared),
                })
            }
            Err(shared) => Err(Disk { shared }),
        }
    }

    /// A second disk in front of this one's backend, which suffers `faults` and then those of this one: a node
    /// `x-ebbtide-fault` over a node. This one goes on without them.
    pub fn behind(&self, faults: &Faults) -> Disk {
        let below = &*self.shared;
        let mut layers = vec![faults.clone()];
        layers.extend(below.faults.iter().cloned());
        Disk {
            shared: Arc::new(Shared {
                backend: Arc::clone(&below.backend),
                life: Arc::clone(&below.life),
                faults: layers,
                failures: Teller::default(),
                ..*below
            }),
        }
    }

    /// The outermost faults it was given.
    pub fn faults(&self) -> Option<&Faults> {
        self.shared.faults.first()
    }

    /// From now on tells `failures` of operations that fail, though they were possible, calling this disk `name`. False: it
    /// tells somebody already.
    pub fn tell_failures(&self, name: &str, failures: Sender<Failure>) -> bool {
        self.shared.failures.set(name, failures)
    }

    /// Gives the backend up: whatever is submitted from now on fails with `NotConnected`, also through another disk over
    /// the same backend. What is under way goes on owning its buffer until the backend answers, which may be never.
    pub fn abandon(&self) -> Abandoned {
        Abandoned::of(&self.shared.life)
    }

    /// What has begun on the backend and has not ended.
    pub fn in_flight(&self) -> InFlight {
        self.shared.life.in_flight()
    }

    /// Makes the disk larger: `size_bytes` from now on, zeroes in what is new. May block. Who uses it has to tell its
    /// guest.
    ///
    /// # Errors
    /// [`Error::NotGrown`] for a size that is not larger or not of whole blocks, a read-only disk, a block device (which
    /// is grown on the host), and when the file system refuses.
    pub fn grow(&self, size_bytes: u64) -> Result<(), Error> {
        let refuse = |reason: String| Error::NotGrown { size_bytes, reason };
        let (now, block) = (self.size_bytes(), self.logical_block_bytes());
        if size_bytes <= now {
            return Err(refuse(format!("it has {now} bytes, and can only grow")));
        }
        if !size_bytes.is_multiple_of(block.into()) || i64::try_from(size_bytes).is_err() {
            return Err(refuse(format!("not a possible multiple of {block} bytes")));
        }
        if self.readonly() {
            return Err(refuse("it is read-only".to_owned()));
        }
        if let Backend::File(file) = &*self.shared.backend {
            file.grow(size_bytes).map_err(|e| refuse(e.to_string()))?;
        }
        self.shared.life.grown(size_bytes);
        Ok(())
    }

    /// Size in bytes, whole logical blocks.
    pub fn size_bytes(&self) -> u64 {
        self.shared.life.size_bytes()
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
            here: Rc::new(Here {
                local: local.clone(),
                shared: Arc::clone(&self.shared),
            }),
        }
    }
}

/// A disk on one iothread.
#[derive(Clone)]
pub struct LocalDisk {
    here: Rc<Here>,
}

/// What every operation of a [`LocalDisk`] refers to.
pub(crate) struct Here {
    pub(crate) local: Local,
    pub(crate) shared: Arc<Shared>,
}

impl LocalDisk {
    /// Starts an operation; resolves when all of it is done, and gives the buffer back. Operations do not wait for each
    /// other.
    ///
    /// When the future is dropped earlier, the kernel keeps the buffer until it has done with it.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside the disk or, with direct I/O, not of whole blocks; `PermissionDenied` for
    /// changes to a read-only disk; `UnexpectedEof` where the image has become shorter; and whatever the host says:
    /// `ENOSPC`, `EIO`, ... A failed write may have written a part.
    pub fn submit<B: Buffer>(&self, op: Op, buf: B) -> Operation<B> {
        Operation::start(&self.here, op, buf)
    }
}

impl Shared {
    pub(crate) fn check(&self, op: &Op, buffer_bytes: usize) -> io::Result<()> {
        self.life.check()?;
        if self.readonly && op.modifies() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        match op.range(buffer_bytes as u64) {
            Some(range) if range.end <= self.life.size_bytes() => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "range outside the disk",
            )),
        }
    }

    pub(crate) async fn perform_with_faults<B: Buffer>(
        &self,
        local: &Local,
        op: Op,
        buf: B,
    ) -> (io::Result<()>, B) {
        let (mut begun, mut after) = (Vec::new(), Vec::new());
        let mut result = Ok(());
        for faults in &self.faults {
            match faults.meet(&op) {
                None => {}
                Some((fault, Point::Begun)) => begun.push((faults, fault)),
                Some((fault, Point::After)) => after.push((faults, fault)),
                Some((fault, Point::Before)) => result = faults.suffer(local, fault).await,
            }
            if result.is_err() {
                // What is below does not hear of it.
                break;
            }
        }
        // It may have waited for long.
        if let Err(error) = self.life.check() {
            return (result.and(Err(error)), buf);
        }
        for (faults, fault) in begun {
            let suffered = faults.suffer(local, fault).await;
            result = result.and(suffered);
        }
        let (mut result, buf) = match result {
            Ok(()) => self.perform(local, op, buf).await,
            Err(error) => (Err(error), buf),
        };
        for (faults, fault) in after.into_iter().rev() {
            let suffered = faults.suffer(local, fault).await;
            result = result.and(suffered);
        }
        (result, buf)
    }

    pub(crate) async fn perform<B: Buffer>(
        &self,
        local: &Local,
        op: Op,
        buf: B,
    ) -> (io::Result<()>, B) {
        let file = match &*self.backend {
            Backend::File(file) => file,
            Backend::Null(null) => return null.perform(local, op, buf).await,
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
