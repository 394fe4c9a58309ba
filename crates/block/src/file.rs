// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend that keeps its data in a file or on a block device of the host.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ebbtide_iothread::{Blocking, Local};
use io_uring::{opcode, types};
use rustix::fs::FallocateFlags;

use crate::buffer::Buffer;
use crate::direct::{direct_transfer, is_plain};
use crate::image::Image;
use crate::transfer::{Direction, Transfer, is_one_call, simple, transfer};
use crate::zeroes::{BATCH_BYTES, Zeroes};

const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO_RANGE: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// A way of the host to do something with a range, until it says that it cannot.
#[derive(Debug)]
struct Ability(AtomicBool);

impl Ability {
    fn presumed() -> Ability {
        Ability(AtomicBool::new(true))
    }

    fn present(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Notes the answer to a try. `Ok(false)`: the host cannot do it.
    fn learn(&self, answer: io::Result<()>) -> io::Result<bool> {
        match answer {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) => {
                    self.0.store(false, Ordering::Relaxed);
                    Ok(false)
                }
                // Not for this range: block devices want theirs aligned.
                Some(libc::EINVAL) => Ok(false),
                _ => Err(error),
            },
        }
    }
}

#[derive(Debug)]
pub(crate) struct FileBackend {
    image: Arc<Image>,
    punch_hole: Ability,
    zero_range: Ability,
    device_discard: Ability,
    /// For the one call that io_uring does not know. Who serves a disk may not be allowed to start threads, so a device
    /// that may need it has it from the start.
    blocking: Option<Blocking>,
}

impl FileBackend {
    /// Makes the image longer. The process's limit on file sizes is looked at first: the kernel ends who exceeds it.
    pub(crate) fn grow(&self, size_bytes: u64) -> io::Result<()> {
        if self.image.block_device {
            return Err(io::Error::other(
                "it is a block device: grow it on the host",
            ));
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        if limit.is_some_and(|limit| size_bytes > limit) {
            return Err(io::Error::other(
                "it would exceed the limit on file sizes (ulimit -f)",
            ));
        }
        // Never shorter: two may grow it at once.
        let length = self.image.file.metadata()?.len();
        if size_bytes <= length {
            return Ok(());
        }
        self.image.file.set_len(size_bytes)
    }

    pub(crate) fn new(image: Image) -> FileBackend {
        let blocking = image.block_device.then(|| {
            Blocking::new("disk-discard", 1).inspect_err(
                |error| tracing::warn!(%error, "discard is not passed on to the block device"),
            )
        });
        FileBackend {
            image: Arc::new(image),
            punch_hole: Ability::presumed(),
            zero_range: Ability::presumed(),
            device_discard: Ability::presumed(),
            blocking: blocking.and_then(Result::ok),
        }
    }

    /// Begins a transfer that takes one call of the kernel; gives the buffer back of one that takes
    /// [more](Self::transfer).
    pub(crate) fn begin<B: Buffer>(
        &self,
        local: &Local,
        direction: Direction,
        offset: u64,
        buf: B,
    ) -> Result<Transfer<B>, B> {
        let aligned = match self.image.direct {
            None => true,
            Some(alignment) => is_plain(alignment, offset, &buf),
        };
        if !aligned || !is_one_call(&buf) {
            return Err(buf);
        }
        Ok(Transfer::begin(local, &self.image, direction, offset, buf))
    }

    pub(crate) async fn transfer<B: Buffer>(
        &self,
        local: &Local,
        direction: Direction,
        offset: u64,
        buf: B,
    ) -> (io::Result<()>, B) {
        match self.image.direct {
            None => transfer(local, &self.image, direction, offset, buf).await,
            Some(alignment) => {
                direct_transfer(local, &self.image, alignment, direction, offset, buf).await
            }
        }
    }

    pub(crate) async fn flush(&self, local: &Local) -> io::Result<()> {
        simple(local, &self.image, |fd| {
            opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build()
        })
        .await
    }

    /// Gives space back. Succeeds without effect where the host has no way to.
    pub(crate) async fn discard(&self, local: &Local, offset: u64, len: u64) -> io::Result<()> {
        if self
            .fallocate(local, &self.punch_hole, PUNCH_HOLE, offset, len)
            .await?
        {
            return Ok(());
        }
        if !self.image.block_device || !self.device_discard.present() {
            return Ok(());
        }
        let Some(blocking) = &self.blocking else {
            return Ok(());
        };
        let image = Arc::clone(&self.image);
        let answer = blocking
            .run(move || crate::blkdev::discard(image.file.as_fd(), offset, len))
            .await;
        self.device_discard.learn(answer.map_err(io::Error::from))?;
        Ok(())
    }

    pub(crate) async fn write_zeroes(
        &self,
        local: &Local,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        if may_unmap
            && self
                .fallocate(local, &self.punch_hole, PUNCH_HOLE, offset, len)
                .await?
        {
            return Ok(());
        }
        if self
            .fallocate(local, &self.zero_range, ZERO_RANGE, offset, len)
            .await?
        {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            if done > 0 {
                self.image.life.check()?;
            }
            let here = (len - done).min(BATCH_BYTES);
            // At most BATCH_BYTES.
            let zeroes = Zeroes::new(here as usize);
            let at = offset.wrapping_add(done);
            self.transfer(local, Direction::ToImage, at, zeroes)
                .await
                .0?;
            done += here;
        }
        Ok(())
    }

    /// `Ok(false)`: the host cannot do this here.
    async fn fallocate(
        &self,
        local: &Local,
        ability: &Ability,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    ) -> io::Result<bool> {
        if !ability.present() {
            return Ok(false);
        }
        if len == 0 {
            return Ok(true);
        }
        let mode = mode.bits().cast_signed();
        let answer = simple(local, &self.image, |fd| {
            opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(mode)
                .build()
        })
        .await;
        ability.learn(answer)
    }
}
