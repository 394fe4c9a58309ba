// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who listens to the discards of one sparse RAM block, and what they have been told.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::{ListenerError, RamBlock};

/// Follows which parts of a sparse RAM block are populated: VFIO, vhost-user, whoever keeps a way
/// of its own to the pages.
///
/// Called on the thread that plugs or unplugs, one call after the other; it may take as long as
/// the mapping takes, while the guest waits for its answer. It must not plug, unplug, subscribe or
/// unsubscribe on the same block. Ranges are in bytes of the block, made of whole blocks, and
/// inside what was subscribed to.
pub trait DiscardListener: Send {
    /// The name, for errors.
    fn name(&self) -> &str;

    /// A range that was discarded is going to be used. An error is a veto: the plug fails and has
    /// changed nothing, and those who were told before are told of a discard.
    fn populate(&mut self, range: Range<u64>) -> Result<(), ListenerError>;

    /// A populated range is going to be discarded. Nobody uses it any more; its pages go when the
    /// call returns.
    fn discard(&mut self, range: Range<u64>);

    /// The range that was just to be discarded stays, with its contents, for the host did not take
    /// it. This cannot be vetoed.
    fn restore(&mut self, range: Range<u64>) {
        let (start, end) = (range.start, range.end);
        if let Err(error) = self.populate(range) {
            let listener = self.name();
            tracing::error!(
                listener,
                start,
                end,
                %error,
                "cannot use memory again that was not discarded after all"
            );
        }
    }
}

/// A subscription to the discards of one RAM block. Dropping it ends it: the listener is told that
/// all its memory is discarded, which ends its use of it, and then nothing more.
#[must_use = "the subscription ends when it is dropped"]
pub struct DiscardSubscription {
    block: Arc<RamBlock>,
    id: u64,
}

impl DiscardSubscription {
    pub(crate) fn new(block: &Arc<RamBlock>, id: u64) -> DiscardSubscription {
        DiscardSubscription {
            block: Arc::clone(block),
            id,
        }
    }

    /// The block.
    pub fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }
}

impl Drop for DiscardSubscription {
    fn drop(&mut self) {
        // Outside the source's lock: the listener's end may have a say in the block.
        drop(self.block.unsubscribe(self.id));
    }
}

impl fmt::Debug for DiscardSubscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiscardSubscription({}, {})", self.block.name(), self.id)
    }
}

/// A listener refused that a range is populated.
#[derive(Debug)]
pub(crate) struct Veto {
    pub(crate) listener: String,
    pub(crate) range: Range<u64>,
    pub(crate) source: ListenerError,
}

/// The listeners of one sparse block.
///
/// What they were told is kept apart from the plugged bitmap: a sealed range is unplugged for
/// everybody else but still theirs until it is discarded.
pub(crate) struct Source {
    granule: u64,
    state: Mutex<State>,
    /// How many listeners there are, for who must not wait for the lock.
    count: AtomicUsize,
}

struct State {
    /// One flag per block: what listeners were told is populated.
    populated: Vec<bool>,
    listeners: Vec<Entry>,
    last_id: u64,
    /// The block is gone.
    closed: bool,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    listener: Box<dyn DiscardListener>,
}

impl Entry {
    /// Its part of `range`.
    fn part(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let part = range.start.max(self.range.start)..range.end.min(self.range.end);
        (part.start < part.end).then_some(part)
    }
}

impl Source {
    /// For `blocks` blocks of `granule` bytes, all discarded.
    pub(crate) fn new(granule: u64, blocks: u64) -> Source {
        let state = State {
            populated: vec![false; blocks as usize],
            listeners: Vec::new(),
            last_id: 0,
            closed: false,
        };
        Source {
            granule,
            state: Mutex::new(state),
            count: AtomicUsize::new(0),
        }
    }

    /// Tells that a discarded `range` is going to be used; when one refuses, nobody has been told
    /// in the end.
    pub(crate) fn populate(&self, range: &Range<u64>) -> Result<(), Veto> {
        let mut state = self.lock();
        let State {
            populated,
            listeners,
            ..
        } = &mut *state;
        for at in 0..listeners.len() {
            let Some(part) = listeners[at].part(range) else {
                continue;
            };
            let listener = &mut listeners[at].listener;
            if let Err(source) = listener.populate(part.clone()) {
                let listener = listener.name().to_owned();
                tell_discard(&mut listeners[..at], range);
                return Err(Veto {
                    listener,
                    range: part,
                    source,
                });
            }
        }
        self.mark(populated, range, true);
        Ok(())
    }

    /// Tells that a populated `range` is going to be discarded; those who came last hear it first.
    pub(crate) fn discard(&self, range: &Range<u64>) {
        let mut state = self.lock();
        tell_discard(&mut state.listeners, range);
        self.mark(&mut state.populated, range, false);
    }

    /// Tells that a `range` that was told to be discarded was not.
    pub(crate) fn restore(&self, range: &Range<u64>) {
        let mut state = self.lock();
        for entry in &mut state.listeners {
            if let Some(part) = entry.part(range) {
                entry.listener.restore(part);
            }
        }
        self.mark(&mut state.populated, range, true);
    }

    /// Adds a listener and shows it what is populated of `range`. When it refuses a part, it is
    /// told that those before are discarded, and not added. `None`: the block is gone.
    pub(crate) fn subscribe(
        &self,
        range: Range<u64>,
        mut listener: Box<dyn DiscardListener>,
    ) -> Option<Result<u64, Veto>> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        let runs = self.runs(&state.populated, &range, true);
        for (at, run) in runs.iter().enumerate() {
            if let Err(source) = listener.populate(run.clone()) {
                for told in runs[..at].iter().rev() {
                    listener.discard(told.clone());
                }
                return Some(Err(Veto {
                    listener: listener.name().to_owned(),
                    range: run.clone(),
                    source,
                }));
            }
        }
        state.last_id += 1;
        let id = state.last_id;
        state.listeners.push(Entry {
            id,
            range,
            listener,
        });
        self.count.store(state.listeners.len(), Relaxed);
        Some(Ok(id))
    }

    /// Accepts no listener any more, unless there is one. Returns whether there is none.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.lock();
        state.closed = state.listeners.is_empty();
        state.closed
    }

    /// Takes a listener out, after telling it that all it was told of is discarded.
    pub(crate) fn unsubscribe(&self, id: u64) -> Option<Box<dyn DiscardListener>> {
        let mut state = self.lock();
        let at = state.listeners.iter().position(|entry| entry.id == id)?;
        let mut entry = state.listeners.remove(at);
        self.count.store(state.listeners.len(), Relaxed);
        for run in self.runs(&state.populated, &entry.range, true).iter().rev() {
            entry.listener.discard(run.clone());
        }
        Some(entry.listener)
    }

    /// The longest runs of blocks in `range` that listeners were told are populated, or are not.
    pub(crate) fn replay(&self, range: &Range<u64>, populated: bool) -> Vec<Range<u64>> {
        self.runs(&self.lock().populated, range, populated)
    }

    /// Whether anybody listens. Takes no lock.
    pub(crate) fn has_listeners(&self) -> bool {
        self.count.load(Relaxed) != 0
    }

    /// Who listens.
    pub(crate) fn listeners(&self) -> Vec<String> {
        let state = self.lock();
        let names = state.listeners.iter();
        names
            .map(|entry| entry.listener.name().to_owned())
            .collect()
    }

    fn blocks(&self, range: &Range<u64>) -> Range<usize> {
        (range.start / self.granule) as usize..(range.end / self.granule) as usize
    }

    fn mark(&self, populated: &mut [bool], range: &Range<u64>, to: bool) {
        populated[self.blocks(range)].fill(to);
    }

    fn runs(&self, populated: &[bool], range: &Range<u64>, wanted: bool) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for at in self.blocks(range).filter(|at| populated[*at] == wanted) {
            let start = at as u64 * self.granule;
            let end = start + self.granule;
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn tell_discard(listeners: &mut [Entry], range: &Range<u64>) {
    for entry in listeners.iter_mut().rev() {
        if let Some(part) = entry.part(range) {
            entry.listener.discard(part);
        }
    }
}
