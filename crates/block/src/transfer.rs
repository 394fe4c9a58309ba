// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading and writing through the ring until all of a buffer is done.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_iothread::Local;
use io_uring::{opcode, squeue, types};
use smallvec::SmallVec;

use crate::buffer::Buffer;
use crate::image::Image;

/// The most pieces the kernel takes in one call (limits.h, IOV_MAX).
const PIECES_MAX: usize = 1024;

/// How often EAGAIN is tried again. With the doubling pause this adds up to about four seconds.
const AGAIN_MAX: u32 = 12;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    FromImage,
    ToImage,
}

/// What the ring owns until the kernel has answered: the memory, the list that describes it, the open file.
struct InKernel<B> {
    buf: B,
    rest: Pieces,
    image: Arc<Image>,
}

/// Moves all of `buf` between memory and the image, from byte `offset` of the image on.
pub(crate) async fn transfer<B: Buffer>(
    local: &Local,
    image: &Arc<Image>,
    direction: Direction,
    mut offset: u64,
    buf: B,
) -> (io::Result<()>, B) {
    let mut in_kernel = InKernel {
        rest: Pieces::new(buf.iovecs()),
        buf,
        image: Arc::clone(image),
    };
    let mut patience = Patience::default();
    while !in_kernel.rest.is_empty() {
        // SAFETY: the entry names a file, a list of pieces and their memory. `in_kernel` owns all three, the ring owns
        // `in_kernel` until the answer, and the entry is made when it is where it stays. Nobody else uses the memory
        // in a way that minds it changing (`Buffer`).
        let op = unsafe {
            local.submit_with(in_kernel, |k| {
                vectored(&k.image, direction, offset, k.rest.batch())
            })
        };
        let (answer, back) = op.await;
        in_kernel = back;
        match moved(answer) {
            Ok(0) => return (Err(ended(direction)), in_kernel.buf),
            Ok(bytes) => {
                in_kernel.rest.advance(bytes);
                offset = offset.wrapping_add(bytes as u64);
                patience = Patience::default();
            }
            Err(error) => {
                if let Err(error) = patience.again(local, error).await {
                    return (Err(error), in_kernel.buf);
                }
            }
        }
    }
    (Ok(()), in_kernel.buf)
}

fn vectored(
    image: &Image,
    direction: Direction,
    offset: u64,
    pieces: &[libc::iovec],
) -> squeue::Entry {
    let fd = types::Fd(image.file.as_raw_fd());
    let count = u32::try_from(pieces.len()).unwrap_or(0);
    match direction {
        Direction::FromImage => opcode::Readv::new(fd, pieces.as_ptr(), count)
            .offset(offset)
            .build(),
        Direction::ToImage => opcode::Writev::new(fd, pieces.as_ptr(), count)
            .offset(offset)
            .build(),
    }
}

/// Reading nothing means that the image has shrunk under us; writing nothing is not supposed to happen.
fn ended(direction: Direction) -> io::Error {
    match direction {
        Direction::FromImage => {
            io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter")
        }
        Direction::ToImage => io::ErrorKind::WriteZero.into(),
    }
}

/// Submits an operation without memory and waits for it; interrupted ones are repeated.
pub(crate) async fn simple(
    local: &Local,
    image: &Arc<Image>,
    entry: impl Fn(types::Fd) -> squeue::Entry,
) -> io::Result<()> {
    let mut patience = Patience::default();
    loop {
        let keep = Arc::clone(image);
        // SAFETY: the entry refers to the file only, which `keep` holds open.
        let (answer, _) =
            unsafe { local.submit(entry(types::Fd(keep.file.as_raw_fd())), keep) }.await;
        match moved(answer) {
            Ok(_) => return Ok(()),
            Err(error) => patience.again(local, error).await?,
        }
    }
}

fn moved(answer: i32) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::from_raw_os_error(answer.wrapping_neg()))
}

/// What to do about answers that mean "try again".
#[derive(Default)]
struct Patience {
    tries: u32,
}

impl Patience {
    /// Returns when the operation is to be submitted again, or with the error that is to be reported.
    async fn again(&mut self, local: &Local, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            Some(libc::EAGAIN) if self.tries < AGAIN_MAX => {
                local.sleep(Duration::from_millis(1 << self.tries)).await;
                self.tries += 1;
                Ok(())
            }
            _ => Err(error),
        }
    }
}

/// The pieces of memory that are still to be moved.
struct Pieces {
    list: SmallVec<[libc::iovec; 4]>,
    /// The pieces before this one are done.
    first: usize,
}

impl Pieces {
    fn new(list: &[libc::iovec]) -> Pieces {
        let mut pieces = Pieces {
            list: SmallVec::from_slice(list),
            first: 0,
        };
        pieces.skip_empty();
        pieces
    }

    fn is_empty(&self) -> bool {
        self.first >= self.list.len()
    }

    /// As many of them as the kernel takes at once.
    fn batch(&self) -> &[libc::iovec] {
        let rest = self.list.get(self.first..).unwrap_or_default();
        rest.get(..PIECES_MAX).unwrap_or(rest)
    }

    fn advance(&mut self, mut bytes: usize) {
        while let Some(piece) = self.list.get_mut(self.first) {
            if bytes < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(bytes);
                piece.iov_len -= bytes;
                break;
            }
            bytes -= piece.iov_len;
            self.first += 1;
        }
        self.skip_empty();
    }

    /// Empty pieces would make "nothing moved" ambiguous.
    fn skip_empty(&mut self) {
        while self
            .list
            .get(self.first)
            .is_some_and(|piece| piece.iov_len == 0)
        {
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(base: usize, len: usize) -> libc::iovec {
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        }
    }

    fn seen(pieces: &Pieces) -> Vec<(usize, usize)> {
        pieces
            .batch()
            .iter()
            .map(|p| (p.iov_base.addr(), p.iov_len))
            .collect()
    }

    #[test]
    fn advancing_cuts_and_drops_pieces() {
        let mut pieces = Pieces::new(&[piece(10, 0), piece(100, 8), piece(200, 0), piece(300, 4)]);
        assert_eq!(seen(&pieces), [(100, 8), (200, 0), (300, 4)]);
        pieces.advance(3);
        assert_eq!(seen(&pieces), [(103, 5), (200, 0), (300, 4)]);
        pieces.advance(5);
        assert_eq!(seen(&pieces), [(300, 4)]);
        pieces.advance(4);
        assert!(pieces.is_empty());
    }

    #[test]
    fn advancing_over_several_pieces() {
        let mut pieces = Pieces::new(&[piece(100, 8), piece(200, 8), piece(300, 8)]);
        pieces.advance(18);
        assert_eq!(seen(&pieces), [(302, 6)]);
        pieces.advance(1000);
        assert!(pieces.is_empty());
    }

    #[test]
    fn nothing_but_empty_pieces_is_nothing() {
        assert!(Pieces::new(&[piece(1, 0), piece(2, 0)]).is_empty());
        assert!(Pieces::new(&[]).is_empty());
    }

    #[test]
    fn a_batch_is_what_one_call_takes() {
        let list: Vec<_> = (0..PIECES_MAX + 3).map(|i| piece(i + 1, 1)).collect();
        let mut pieces = Pieces::new(&list);
        assert_eq!(pieces.batch().len(), PIECES_MAX);
        pieces.advance(PIECES_MAX);
        assert_eq!(pieces.batch().len(), 3);
    }

    #[test]
    fn answers_become_errors() {
        assert_eq!(moved(7).unwrap(), 7);
        assert_eq!(
            moved(-libc::ENOSPC).unwrap_err().raw_os_error(),
            Some(libc::ENOSPC)
        );
    }
}
