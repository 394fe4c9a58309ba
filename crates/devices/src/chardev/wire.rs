// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two byte queues between a device and the host side of it.
//!
//! The device's side never waits. What it sends while nobody listens is dropped. When the listener is slow, a device that
//! cannot wait ([`put`](Wire::put), a serial port) loses its oldest bytes, which are counted; one that can keep them
//! ([`offer`](Wire::offer), a console) loses none. What comes from the host is accepted as far as there is room, and the
//! host waits for more. The host's side is woken once for everything that is sent until it looks, not for each byte.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use ebbtide_iothread::Signal;

/// Bytes kept for a slow listener.
const OUTPUT_BYTES: usize = 256 << 10;
/// Bytes accepted ahead of what the guest has read.
const INPUT_BYTES: usize = 4096;

/// See the module.
#[derive(Default)]
pub struct Wire {
    output: Mutex<Output>,
    input: Mutex<Input>,
    changes: Signal,
    on_input: Mutex<Listeners>,
}

/// Names a call that [`Wire::on_input`] made known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputKey(u64);

/// Who is told about input.
#[derive(Default)]
struct Listeners {
    last_key: u64,
    current: Option<(InputKey, Arc<dyn Fn() + Send + Sync>)>,
}

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    listening: bool,
    closed: bool,
    waiting: Option<Waker>,
    dropped: u64,
}

#[derive(Default)]
struct Input {
    bytes: VecDeque<u8>,
    closed: bool,
    waiting: Option<Waker>,
}

impl Wire {
    /// A wire nobody listens on.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Device: sends bytes. Never blocks.
    pub fn put(&self, bytes: &[u8]) {
        let mut output = self.output();
        if !output.listening {
            return;
        }
        output.bytes.extend(bytes);
        let excess = output.bytes.len().saturating_sub(OUTPUT_BYTES);
        output.bytes.drain(..excess);
        output.dropped = output.dropped.saturating_add(excess as u64);
        wake(output, |output| &mut output.waiting);
    }

    /// Device: sends as many of these bytes as there is room for, from the first on, and says how many that were. Nothing
    /// that was sent before is dropped. While nobody listens there is room for everything, and it goes nowhere. Never
    /// blocks; [`changes`](Self::changes) tells when to try again.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut output = self.output();
        if !output.listening {
            return bytes.len();
        }
        let room = OUTPUT_BYTES.saturating_sub(output.bytes.len());
        let sent = bytes.get(..room).unwrap_or(bytes);
        output.bytes.extend(sent);
        wake(output, |output| &mut output.waiting);
        sent.len()
    }

    /// Device: raised when bytes were received, when there is room for output again, and when somebody begins or ceases
    /// to listen.
    pub fn changes(&self) -> &Signal {
        &self.changes
    }

    /// Device: whether somebody listens.
    pub fn is_listening(&self) -> bool {
        self.output().listening
    }

    /// Device: takes received bytes, as many as there are and fit.
    pub fn get(&self, bytes: &mut [u8]) -> usize {
        let mut input = self.input();
        let count = bytes.len().min(input.bytes.len());
        for (to, from) in bytes.iter_mut().zip(input.bytes.drain(..count)) {
            *to = from;
        }
        if count > 0 {
            wake(input, |input| &mut input.waiting);
        }
        count
    }

    /// Device: what to call when bytes were received, from now on instead of what was called before. It is called on the
    /// host side's thread, with no lock held.
    pub fn on_input(&self, call: impl Fn() + Send + Sync + 'static) -> InputKey {
        let mut listeners = self.listeners();
        listeners.last_key += 1;
        let key = InputKey(listeners.last_key);
        let before = listeners.current.replace((key, Arc::new(call)));
        drop(listeners);
        // What it owns is dropped without the lock.
        drop(before);
        key
    }

    /// Device: nothing is called any more, unless another device has taken the wire since `key` was given. A call that is
    /// under way may still end after this. Input is kept for the next device.
    pub fn forget_input(&self, key: InputKey) {
        let mut listeners = self.listeners();
        let ours = listeners.current.take_if(|(current, _)| *current == key);
        drop(listeners);
        drop(ours);
    }

    /// Whether somebody is told about input.
    pub fn has_input_listener(&self) -> bool {
        self.listeners().current.is_some()
    }

    /// Host: starts or stops to listen. What was not taken before is dropped when it stops.
    pub fn listen(&self, listening: bool) {
        let mut output = self.output();
        output.listening = listening && !output.closed;
        if !output.listening {
            output.bytes.clear();
        }
        drop(output);
        self.changes.raise();
    }

    /// Host: waits until there are bytes to [`take`](Self::take). False when the wire was closed and all were taken.
    pub async fn output_ready(&self) -> bool {
        poll_fn(|context| {
            let mut output = self.output();
            if !output.bytes.is_empty() {
                return Poll::Ready(true);
            }
            if output.closed {
                return Poll::Ready(false);
            }
            output.waiting = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Whether bytes wait to be [taken](Self::take).
    pub fn has_output(&self) -> bool {
        !self.output().bytes.is_empty()
    }

    /// Host: all bytes sent until now.
    pub fn take(&self) -> Vec<u8> {
        let bytes = std::mem::take(&mut self.output().bytes);
        self.changes.raise();
        bytes.into()
    }

    /// Host: waits until bytes can be handed to the guest and says how many. 0 when the wire was closed.
    pub async fn input_room(&self) -> usize {
        poll_fn(|context| {
            let mut input = self.input();
            let room = INPUT_BYTES.saturating_sub(input.bytes.len());
            if input.closed {
                return Poll::Ready(0);
            }
            if room > 0 {
                return Poll::Ready(room);
            }
            input.waiting = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Host: hands bytes to the guest, not more than [`input_room`](Self::input_room) said; others are dropped.
    pub fn receive(&self, bytes: &[u8]) {
        let mut input = self.input();
        let room = INPUT_BYTES.saturating_sub(input.bytes.len());
        input.bytes.extend(bytes.iter().take(room));
        drop(input);
        self.changes.raise();
        let call = self
            .listeners()
            .current
            .as_ref()
            .map(|(_, call)| Arc::clone(call));
        if let Some(call) = call {
            call();
        }
    }

    /// How many bytes were dropped because the listener was slow.
    pub fn dropped_bytes(&self) -> u64 {
        self.output().dropped
    }

    /// Nothing is sent or received any more; the host side ends once it has taken what is left.
    pub fn close(&self) {
        let mut output = self.output();
        output.closed = true;
        output.listening = false;
        wake(output, |output| &mut output.waiting);
        let mut input = self.input();
        input.closed = true;
        wake(input, |input| &mut input.waiting);
        self.changes.raise();
    }

    /// Whether [`close`](Self::close) was called.
    pub fn is_closed(&self) -> bool {
        self.output().closed
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listeners(&self) -> MutexGuard<'_, Listeners> {
        self.on_input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes whoever waits, after the lock is gone.
fn wake<T>(mut locked: MutexGuard<'_, T>, waiting: impl FnOnce(&mut T) -> &mut Option<Waker>) {
    let waker = waiting(&mut locked).take();
    drop(locked);
    if let Some(waker) = waker {
        waker.wake();
    }
}
