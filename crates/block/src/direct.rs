// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Direct I/O: past the page cache, which wants aligned memory.

use std::io;
use std::sync::Arc;

use ebbtide_iothread::Local;

use crate::aligned::AlignedBuffer;
use crate::buffer::Buffer;
use crate::image::{DirectAlignment, Image};
use crate::transfer::{Direction, transfer};

/// The most a guest can make us allocate for one request whose memory is not aligned.
const BOUNCE_BYTES: usize = 1 << 20;

/// As [`transfer`], for an image opened for direct I/O.
///
/// # Errors
/// `InvalidInput` when the range does not consist of whole blocks. Those of smaller size are not emulated: reading the
/// rest of a block to write it back would race with other writes to it, and drivers are told the block size.
pub(crate) async fn direct_transfer<B: Buffer>(
    local: &Local,
    image: &Arc<Image>,
    alignment: DirectAlignment,
    direction: Direction,
    offset: u64,
    buf: B,
) -> (io::Result<()>, B) {
    let block = u64::from(alignment.offset);
    if !offset.is_multiple_of(block) || !(buf.total_len() as u64).is_multiple_of(block) {
        return (Err(io::ErrorKind::InvalidInput.into()), buf);
    }
    if is_aligned(buf.iovecs(), alignment) {
        return transfer(local, image, direction, offset, buf).await;
    }
    let mut buf = buf;
    let result = bounce(local, image, alignment, direction, offset, &mut buf).await;
    (result, buf)
}

/// Whether an image opened for direct I/O takes this as it is.
pub(crate) fn is_plain(alignment: DirectAlignment, offset: u64, buf: &impl Buffer) -> bool {
    let block = u64::from(alignment.offset);
    offset.is_multiple_of(block)
        && (buf.total_len() as u64).is_multiple_of(block)
        && is_aligned(buf.iovecs(), alignment)
}

/// Both address and length of every piece: before Linux 6.0 a piece had to be whole blocks, too.
fn is_aligned(pieces: &[libc::iovec], alignment: DirectAlignment) -> bool {
    let memory = alignment.memory as usize;
    let whole = alignment.memory.max(alignment.offset) as usize;
    pieces.iter().all(|piece| {
        piece.iov_base.addr().is_multiple_of(memory) && piece.iov_len.is_multiple_of(whole)
    })
}

async fn bounce<B: Buffer>(
    local: &Local,
    image: &Arc<Image>,
    alignment: DirectAlignment,
    direction: Direction,
    offset: u64,
    buf: &mut B,
) -> io::Result<()> {
    let total = buf.total_len();
    let mut done = 0;
    let mut aligned = AlignedBuffer::new(
        total.min(BOUNCE_BYTES),
        alignment.memory.max(alignment.offset) as usize,
    )?;
    while done < total {
        if done > 0 {
            image.life.check()?;
        }
        aligned.set_len((total - done).min(BOUNCE_BYTES));
        if direction == Direction::ToImage {
            buf.copy_to(done, aligned.bytes_mut())?;
        }
        let here = offset.wrapping_add(done as u64);
        let (result, back) = transfer(local, image, direction, here, aligned).await;
        result?;
        aligned = back;
        if direction == Direction::FromImage {
            buf.copy_from(done, aligned.bytes())?;
        }
        done += aligned.total_len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_of_pieces() {
        let alignment = DirectAlignment {
            offset: 512,
            memory: 4,
        };
        let piece = |base, len| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        };
        assert!(is_aligned(
            &[piece(0x1004, 512), piece(0x2000, 4096)],
            alignment
        ));
        assert!(!is_aligned(&[piece(0x1002, 512)], alignment));
        assert!(!is_aligned(
            &[piece(0x1000, 256), piece(0x2000, 256)],
            alignment
        ));
    }
}
