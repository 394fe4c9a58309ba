// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hearing of an eventfd's signals again and again, at the cost of one completion each.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use io_uring::{opcode, types};

use crate::event::{Event, take};
use crate::executor::Core;
use crate::local::Local;
use crate::op::Op;
use crate::ring::News;
use crate::slots::Key;

/// The signals of an [`Event`] for one task, from the time this was made; what came before counts as one.
///
/// The count is left alone: one standing poll of the ring tells of each signal, where [`Event::wait`] takes a poll and a
/// read. So who waits at the same event otherwise finds it signalled for ever. On Linux before 5.13 both are made for each
/// signal here, too.
pub struct Signals {
    core: Rc<Core>,
    fd: Arc<OwnedFd>,
    state: State,
}

enum State {
    /// Nothing is asked of the kernel.
    Off,
    Standing(Key),
    /// The kernel has no standing polls.
    Single(Option<Op<Arc<OwnedFd>>>),
}

impl Event {
    /// Its signals, as a stream.
    pub fn signals(&self, local: &Local) -> Signals {
        let core = local.core();
        let standing = core.ring().has_standing_polls();
        Signals {
            core: Rc::clone(core),
            fd: Arc::clone(self.fd()),
            state: if standing {
                State::Off
            } else {
                State::Single(None)
            },
        }
    }
}

impl Signals {
    /// Ready when the event was signalled since this was last ready; several signals may make it ready once.
    ///
    /// # Errors
    /// Those of poll and read on an eventfd; `ECANCELED` when the executor is stopping.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.state {
                State::Off => self.stand()?,
                State::Standing(key) => {
                    let news = self.core.ring().poll_standing(*key, cx.waker());
                    match news {
                        News::None(replaced) => {
                            drop(replaced);
                            return Poll::Pending;
                        }
                        News::Some => return Poll::Ready(Ok(())),
                        News::Last(result) => {
                            self.state = State::Off;
                            if result == -libc::EINVAL {
                                self.state = State::Single(None);
                                continue;
                            }
                            return Poll::Ready(answer(result));
                        }
                    }
                }
                State::Single(None) => {
                    let fd = Arc::clone(&self.fd);
                    let entry = poll_entry(&fd).build();
                    // SAFETY: the entry points to no memory, and what is kept holds its descriptor open.
                    let op = unsafe { Op::new(&self.core, fd, |_| entry) };
                    self.state = State::Single(Some(op));
                }
                State::Single(Some(op)) => {
                    let Poll::Ready((result, _)) = Pin::new(op).poll(cx) else {
                        return Poll::Pending;
                    };
                    self.state = State::Single(None);
                    answer(result)?;
                    if take(&self.fd)?.is_some() {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }

    /// Asks the kernel to tell of every signal.
    fn stand(&mut self) -> io::Result<()> {
        let entry = poll_entry(&self.fd).multi(true).build();
        let keep = Box::new(Arc::clone(&self.fd));
        // SAFETY: the entry points to no memory, and what is kept holds its descriptor open. It posts one CQE without
        // F_MORE, its last.
        let key = unsafe { self.core.ring().submit_standing(entry, keep) };
        self.state = State::Standing(key.map_err(|_| canceled())?);
        Ok(())
    }
}

fn poll_entry(fd: &Arc<OwnedFd>) -> opcode::PollAdd {
    opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32)
}

fn answer(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(())
}

fn canceled() -> io::Error {
    io::Error::from_raw_os_error(libc::ECANCELED)
}

impl Drop for Signals {
    fn drop(&mut self) {
        if let State::Standing(key) = self.state {
            // Dropped when the ring is not borrowed any more: it may hold a waker.
            let dropped = self.core.ring().abandon(key);
            drop(dropped);
        }
    }
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals")
            .field("fd", &self.fd.as_raw_fd())
            .finish_non_exhaustive()
    }
}
