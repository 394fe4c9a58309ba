// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Recorded messages and lines.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ebbtide_bus::irq::{IrqError, IrqLine, MsiController, MsiMessage, MsiRoute};

use super::lock;
use crate::Error;

const PINS: usize = 24;

/// What happened to a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineRecord {
    /// Its level.
    pub high: bool,
    /// How often it went from low to high.
    pub rises: u64,
    /// Somebody holds it.
    pub taken: bool,
}

#[derive(Default)]
struct Messages {
    queue: VecDeque<MsiMessage>,
    wakers: Vec<Waker>,
}

#[derive(Default)]
struct Record {
    messages: Mutex<Messages>,
    arrived: Condvar,
    lines: Mutex<[LineRecord; PINS]>,
    routes: AtomicUsize,
}

impl Record {
    fn signal(&self, message: MsiMessage) {
        let mut messages = lock(&self.messages);
        messages.queue.push_back(message);
        messages.wakers.drain(..).for_each(Waker::wake);
        self.arrived.notify_all();
    }
}

pub(super) struct Interrupts(Arc<Record>);

impl Interrupts {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Arc::default()))
    }

    pub(super) fn take_messages(&self) -> Vec<MsiMessage> {
        lock(&self.0.messages).queue.drain(..).collect()
    }

    pub(super) fn next_message(&self) -> NextMessage {
        NextMessage(Arc::clone(&self.0))
    }

    pub(super) fn wait_message(&self, limit: Duration) -> Option<MsiMessage> {
        let messages = lock(&self.0.messages);
        let (mut messages, _) = self
            .0
            .arrived
            .wait_timeout_while(messages, limit, |messages| messages.queue.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        messages.queue.pop_front()
    }

    pub(super) fn routes_in_use(&self) -> usize {
        self.0.routes.load(Ordering::Relaxed)
    }

    pub(super) fn line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, Error> {
        let mut lines = lock(&self.0.lines);
        let Some(line) = lines.get_mut(gsi as usize) else {
            return Err(Error::NoSuchLine {
                gsi,
                last: PINS as u32 - 1,
            });
        };
        if line.taken {
            return Err(Error::LineTaken { gsi });
        }
        line.taken = true;
        Ok(Arc::new(SimLine {
            record: Arc::clone(&self.0),
            gsi: gsi as usize,
        }))
    }

    pub(super) fn line_record(&self, gsi: u32) -> LineRecord {
        lock(&self.0.lines)
            .get(gsi as usize)
            .copied()
            .unwrap_or_default()
    }
}

impl MsiController for Interrupts {
    fn route(&self) -> Result<Arc<dyn MsiRoute>, IrqError> {
        self.0.routes.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(SimRoute {
            record: Arc::clone(&self.0),
            message: Mutex::new(None),
        }))
    }
}

/// The oldest message not taken yet, once there is one.
pub struct NextMessage(Arc<Record>);

impl Future for NextMessage {
    type Output = MsiMessage;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<MsiMessage> {
        let mut messages = lock(&self.0.messages);
        if let Some(message) = messages.queue.pop_front() {
            return Poll::Ready(message);
        }
        messages.wakers.push(context.waker().clone());
        Poll::Pending
    }
}

struct SimRoute {
    record: Arc<Record>,
    message: Mutex<Option<MsiMessage>>,
}

impl MsiRoute for SimRoute {
    fn program(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        *lock(&self.message) = message;
        Ok(())
    }

    fn signal(&self) {
        let message = *lock(&self.message);
        if let Some(message) = message {
            self.record.signal(message);
        }
    }
}

impl Drop for SimRoute {
    fn drop(&mut self) {
        self.record.routes.fetch_sub(1, Ordering::Relaxed);
    }
}

struct SimLine {
    record: Arc<Record>,
    gsi: usize,
}

impl SimLine {
    fn change(&self, change: impl FnOnce(&mut LineRecord)) {
        if let Some(line) = lock(&self.record.lines).get_mut(self.gsi) {
            change(line);
        }
    }
}

impl IrqLine for SimLine {
    fn set(&self, high: bool) {
        self.change(|line| {
            line.rises += u64::from(high && !line.high);
            line.high = high;
        });
    }
}

impl Drop for SimLine {
    fn drop(&mut self) {
        self.change(|line| {
            line.high = false;
            line.taken = false;
        });
    }
}
