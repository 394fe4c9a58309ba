// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading and writing through the ring until all of a buffer is done.

use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ebbtide_iothread::{Local, Op};
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

/// A transfer that one call of the kernel does, as nearly all are.
pub(crate) struct Transfer<B: 'static> {
    op: Op<Whole<B>>,
    local: Local,
    direction: Direction,
    offset: u64,
    bytes: usize,
}

/// What the ring owns of it.
struct Whole<B> {
    buf: B,
    image: Arc<Image>,
}

/// The answer to that call.
pub(crate) enum Answered<B> {
    /// All was moved.
    All(B),
    /// Some was, or the call is to be repeated, or it failed: what is to be done about that.
    Else(Pin<Box<dyn Future<Output = (io::Result<()>, B)>>>),
}

impl<B: Buffer> Transfer<B> {
    /// Begins to move all of `buf`, whose pieces are for one call: see [`is_one_call`].
    pub(crate) fn begin(
        local: &Local,
        image: &Arc<Image>,
        direction: Direction,
        offset: u64,
        buf: B,
    ) -> Transfer<B> {
        let bytes = buf.total_len();
        let whole = Whole {
            buf,
            image: Arc::clone(image),
        };
        // SAFETY: the entry names a file, a list of pieces and their memory. `whole` owns all three, the ring owns `whole`
        // until the answer, and the entry is made when it is where it stays. Nobody else uses the memory in a way that
        // minds it changing (`Buffer`).
        let op = unsafe {
            local.submit_with(whole, |k| {
                entry(&k.image, direction, offset, k.buf.iovecs())
            })
        };
        Transfer {
            op,
            local: local.clone(),
            direction,
            offset,
            bytes,
        }
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Answered<B>> {
        let (answer, Whole { buf, image }) = ready!(Pin::new(&mut self.op).poll(cx));
        if usize::try_from(answer) == Ok(self.bytes) {
            return Poll::Ready(Answered::All(buf));
        }
        let in_kernel = InKernel {
            rest: Pieces::new(buf.iovecs()),
            buf,
            image,
        };
        let (local, direction, offset) = (self.local.clone(), self.direction, self.offset);
        let rest = async move { go_on(&local, direction, offset, in_kernel, Some(answer)).await };
        Poll::Ready(Answered::Else(Box::pin(rest)))
    }
}

/// Whether one call of the kernel can take these pieces: there is something in them, and they are not too many.
pub(crate) fn is_one_call(buf: &impl Buffer) -> bool {
    buf.total_len() > 0 && buf.iovecs().len() <= PIECES_MAX
}

/// Moves all of `buf` between memory and the image, from byte `offset` of the image on.
pub(crate) async fn transfer<B: Buffer>(
    local: &Local,
    image: &Arc<Image>,
    direction: Direction,
    offset: u64,
    buf: B,
) -> (io::Result<()>, B) {
    let in_kernel = InKernel {
        rest: Pieces::new(buf.iovecs()),
        buf,
        image: Arc::clone(image),
    };
    go_on(local, direction, offset, in_kernel, None).await
}

/// Moves what is left, after an `answer` of the kernel if there was one.
async fn go_on<B: Buffer>(
    local: &Local,
    direction: Direction,
    mut offset: u64,
    mut in_kernel: InKernel<B>,
    mut answer: Option<i32>,
) -> (io::Result<()>, B) {
    let mut patience = Patience::default();
    loop {
        match answer.map(moved) {
            None => {}
            Some(Ok(0)) => return (Err(ended(direction)), in_kernel.buf),
            Some(Ok(bytes)) => {
                in_kernel.rest.advance(bytes);
                offset = offset.wrapping_add(bytes as u64);
                patience = Patience::default();
            }
            Some(Err(error)) => {
                if let Err(error) = patience.again(local, error).await {
                    return (Err(error), in_kernel.buf);
                }
            }
        }
        if in_kernel.rest.is_empty() {
            return (Ok(()), in_kernel.buf);
        }
        if answer.is_some()
            && let Err(error) = in_kernel.image.life.check()
        {
            return (Err(error), in_kernel.buf);
        }
        // SAFETY: as in `Transfer::begin`.
        let op = unsafe {
            local.submit_with(in_kernel, |k| {
                entry(&k.image, direction, offset, k.rest.batch())
            })
        };
        let (answered, back) = op.await;
        in_kernel = back;
        answer = Some(answered);
    }
}

fn entry(
    image: &Image,
    direction: Direction,
    offset: u64,
    pieces: &[libc::iovec],
) -> squeue::Entry {
    let fd = types::Fd(image.file.as_raw_fd());
    // One piece spares the kernel the list.
    if let &[piece] = pieces
        && let Ok(len) = u32::try_from(piece.iov_len)
    {
        let base = piece.iov_base.cast::<u8>();
        return match direction {
            Direction::FromImage => opcode::Read::new(fd, base, len).offset(offset).build(),
            Direction::ToImage => opcode::Write::new(fd, base, len).offset(offset).build(),
        };
    }
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
        image.life.check()?;
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
