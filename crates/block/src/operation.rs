// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An operation of a disk under way.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use crate::buffer::Buffer;
use crate::disk::{Backend, Here};
use crate::op::{Op, OpKind};
use crate::transfer::{Answered, Direction, Transfer};

/// Resolves when all of an operation is done, and gives its buffer back. Small, and nothing is allocated for it but what
/// the ring keeps: a guest makes one for each request. Made by [`LocalDisk::submit`](crate::LocalDisk::submit).
#[must_use = "an operation that is dropped is cancelled"]
pub struct Operation<B: Buffer> {
    here: Rc<Here>,
    kind: OpKind,
    state: State<B>,
}

enum State<B: Buffer> {
    Done(io::Result<()>, B),
    /// One call of the kernel, with nothing before it and most probably nothing after it.
    Plain(Transfer<B>),
    /// Anything else.
    Other(Pin<Box<dyn Future<Output = (io::Result<()>, B)>>>),
    Finished,
}

// No buffer is pinned in here: what the kernel points to is in a box of its own.
impl<B: Buffer> Unpin for Operation<B> {}

impl<B: Buffer> Operation<B> {
    pub(crate) fn start(here: &Rc<Here>, op: Op, buf: B) -> Operation<B> {
        let kind = op.kind();
        here.shared.life.begin(kind);
        Operation {
            here: Rc::clone(here),
            kind,
            state: State::start(here, op, buf),
        }
    }
}

impl<B: Buffer> State<B> {
    fn start(here: &Rc<Here>, op: Op, mut buf: B) -> State<B> {
        let Here { local, shared } = &**here;
        if let Err(error) = shared.check(&op, buf.total_len()) {
            return State::Done(Err(error), buf);
        }
        if !shared.faults.is_empty() {
            let here = Rc::clone(here);
            return State::Other(Box::pin(async move {
                here.shared.perform_with_faults(&here.local, op, buf).await
            }));
        }
        match (&*shared.backend, op) {
            (Backend::Null(null), op) if null.is_immediate() => {
                return State::Done(null.answer(op, &mut buf), buf);
            }
            (Backend::File(file), Op::Read { offset } | Op::Write { offset }) => {
                let direction = match op {
                    Op::Read { .. } => Direction::FromImage,
                    _ => Direction::ToImage,
                };
                match file.begin(local, direction, offset, buf) {
                    Ok(transfer) => return State::Plain(transfer),
                    Err(back) => buf = back,
                }
            }
            _ => {}
        }
        let here = Rc::clone(here);
        State::Other(Box::pin(async move {
            here.shared.perform(&here.local, op, buf).await
        }))
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(io::Result<()>, B)> {
        if let State::Plain(transfer) = self {
            match ready!(transfer.poll(cx)) {
                Answered::All(buf) => return Poll::Ready((Ok(()), buf)),
                Answered::Else(rest) => *self = State::Other(rest),
            }
        }
        if let State::Other(future) = self {
            return future.as_mut().poll(cx);
        }
        match std::mem::replace(self, State::Finished) {
            State::Done(result, buf) => Poll::Ready((result, buf)),
            _ => unreachable!("a finished operation was polled again"),
        }
    }
}

impl<B: Buffer> Future for Operation<B> {
    type Output = (io::Result<()>, B);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(io::Result<()>, B)> {
        let (result, buf) = ready!(self.state.poll(cx));
        self.state = State::Finished;
        if let Err(error) = &result {
            self.here.shared.failures.tell(self.kind, error);
        }
        Poll::Ready((result, buf))
    }
}

impl<B: Buffer> Drop for Operation<B> {
    fn drop(&mut self) {
        self.here.shared.life.end(self.kind);
    }
}

impl<B: Buffer> fmt::Debug for Operation<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operation")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}
