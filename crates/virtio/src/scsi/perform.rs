// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carrying out a command on the disk.

use std::io;

use ebbtide_block::{Buffer, LocalDisk, Op, OwnedBuffer};
use ebbtide_memory::PinList;
use ebbtide_scsi::{Extents, Sense};

use super::command::Action;

/// What one step of a long command moves. A command that is aborted, or whose device is reset, ends between two steps.
const STEP_BYTES: u64 = 256 << 10;

/// Whether the command is still wanted.
type GoOn<'a> = &'a dyn Fn() -> bool;

/// Whether what was written has to be on the medium now.
type IsThrough<'a> = &'a dyn Fn() -> bool;

/// Carries it out. Returns what is wrong, if anything, and the driver's memory.
pub(super) async fn perform(
    disk: &LocalDisk,
    action: Action,
    go_on: GoOn<'_>,
    is_through: IsThrough<'_>,
) -> (Result<(), Sense>, Option<PinList>) {
    match action {
        Action::Read { offset, data, fua } => {
            if fua && let Err(sense) = flush(disk).await {
                return (Err(sense), Some(data));
            }
            let (result, data) = disk.submit(Op::Read { offset }, data).await;
            (result.map_err(reading), Some(data))
        }
        Action::Write {
            offset,
            data,
            through,
        } => {
            let (result, data) = disk.submit(Op::Write { offset }, data).await;
            let result = match result {
                Ok(()) if through || is_through() => flush(disk).await,
                result => result.map_err(writing),
            };
            (result, Some(data))
        }
        // Boxed, to keep the future of every read and write small.
        Action::Flush => (Box::pin(flush(disk)).await, None),
        Action::Verify {
            offset,
            len,
            expected,
        } => {
            let result = Box::pin(verify(disk, offset, len, expected.as_ref(), go_on)).await;
            (result, expected)
        }
        Action::WriteSame {
            offset,
            len,
            block,
            may_unmap,
            through,
        } => {
            let result = match block {
                None => Box::pin(zero(disk, offset, len, may_unmap)).await,
                Some(block) => Box::pin(repeat(disk, offset, len, &block, go_on)).await,
            };
            let result = match result {
                Ok(()) if through || is_through() => Box::pin(flush(disk)).await,
                result => result,
            };
            (result, None)
        }
        Action::Unmap(extents) => (Box::pin(unmap(disk, extents, go_on)).await, None),
    }
}

fn reading(error: io::Error) -> Sense {
    Sense::of_backend(&error, false)
}

fn writing(error: io::Error) -> Sense {
    Sense::of_backend(&error, true)
}

async fn flush(disk: &LocalDisk) -> Result<(), Sense> {
    let (result, _) = disk.submit(Op::Flush, PinList::new()).await;
    result.map_err(writing)
}

/// The command is not wanted any more; whatever is said, nobody hears it.
const UNWANTED: Sense = Sense::new(ebbtide_scsi::Key::AbortedCommand, 0, 0);

async fn verify(
    disk: &LocalDisk,
    offset: u64,
    len: u64,
    expected: Option<&PinList>,
    go_on: GoOn<'_>,
) -> Result<(), Sense> {
    let mut done = 0;
    while done < len {
        if !go_on() {
            return Err(UNWANTED);
        }
        let step = STEP_BYTES.min(len - done) as usize;
        let at = Op::Read {
            offset: offset + done,
        };
        let (result, read) = disk.submit(at, OwnedBuffer::zeroed(step)).await;
        result.map_err(reading)?;
        if let Some(expected) = expected {
            let mut bytes = vec![0; step];
            expected
                .copy_to(done as usize, &mut bytes)
                .map_err(|_| Sense::DATA_PHASE)?;
            if *read.into_bytes() != *bytes {
                return Err(Sense::MISCOMPARE);
            }
        }
        done += step as u64;
    }
    Ok(())
}

async fn zero(disk: &LocalDisk, offset: u64, len: u64, may_unmap: bool) -> Result<(), Sense> {
    let op = Op::WriteZeroes {
        offset,
        len,
        may_unmap,
    };
    disk.submit(op, PinList::new()).await.0.map_err(writing)
}

async fn repeat(
    disk: &LocalDisk,
    offset: u64,
    len: u64,
    block: &[u8],
    go_on: GoOn<'_>,
) -> Result<(), Sense> {
    // Both are whole blocks.
    let blocks = (STEP_BYTES.min(len) as usize / block.len().max(1)).max(1);
    let mut buffer = OwnedBuffer::new(block.repeat(blocks));
    let mut done = 0;
    while done < len {
        if !go_on() {
            return Err(UNWANTED);
        }
        let step = buffer.total_len() as u64;
        if step > len - done {
            buffer = OwnedBuffer::new(block.repeat((len - done) as usize / block.len().max(1)));
            continue;
        }
        let at = Op::Write {
            offset: offset + done,
        };
        let (result, back) = disk.submit(at, buffer).await;
        result.map_err(writing)?;
        buffer = back;
        done += step;
    }
    Ok(())
}

async fn unmap(disk: &LocalDisk, extents: Extents, go_on: GoOn<'_>) -> Result<(), Sense> {
    for extent in extents {
        if !go_on() {
            return Err(UNWANTED);
        }
        let op = Op::Discard {
            offset: extent.offset,
            len: extent.len,
        };
        disk.submit(op, PinList::new()).await.0.map_err(writing)?;
    }
    Ok(())
}
