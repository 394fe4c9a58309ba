// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which devices are being served on this thread's stack.
//!
//! A guest can tell a device to write to the device's own registers by DMA. Served, such a write
//! would enter the device a second time in the middle of the first, which no device is written
//! for. So every entry into a device is noted for as long as it lasts, whatever the entry is: a
//! register access, a timer, a bottom half, a queue, an ioeventfd. DMA that ends at the registers
//! of a noted device is a bus error. DMA by [`crate::Dma`] is noted by itself, so that a device
//! that forgets its entry is still safe from its own DMA.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;

use ebbtide_gate::{Entry, Gate, Lease};

/// By which way a device is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryPoint {
    /// A register access. Noted by the dispatch of the region.
    Mmio,
    /// A timer.
    Timer,
    /// A bottom half: a job put off to the event loop.
    BottomHalf,
    /// Work on a queue, also the completion of a request.
    Queue,
    /// An ioeventfd that the guest signalled.
    Ioeventfd,
    /// DMA by the device. Noted by [`crate::Dma`].
    Dma,
}

/// A device, or registers that no device is known for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(usize);

/// Outermost first.
type Stack = RefCell<Vec<(Key, EntryPoint)>>;

thread_local! {
    static STACK: Stack = const { RefCell::new(Vec::new()) };
}

impl Key {
    pub(crate) fn of<T: ?Sized>(owner: &Arc<T>) -> Key {
        Key(Arc::as_ptr(owner).cast::<()>() as usize)
    }

    /// Whether it is being served on this thread.
    pub(crate) fn is_busy(self) -> bool {
        STACK
            .try_with(|stack| stack.borrow().iter().any(|(key, _)| *key == self))
            .unwrap_or(false)
    }
}

/// A device is being served on this thread until this is dropped. It stays on its thread: never
/// keep it across an `.await`, whatever runs meanwhile would be taken for the device.
#[must_use = "the device counts as busy only until this is dropped"]
pub struct Busy<'g> {
    key: Key,
    point: EntryPoint,
    /// Dropped after the note is taken back.
    _lease: Option<Lease>,
    _gate: PhantomData<(&'g Gate, *const ())>,
}

impl<'g> Busy<'g> {
    /// Enters the device behind `gate` and notes it, or `None` once the gate is closed.
    pub fn enter(gate: &'g Arc<Gate>, point: EntryPoint) -> Option<Busy<'g>> {
        let kind = match point {
            EntryPoint::Mmio => Entry::Mmio,
            _ => Entry::Io,
        };
        let lease = gate.enter(kind)?;
        Some(Busy::keyed(Key::of(gate), point, Some(lease)))
    }

    /// Notes the device behind `gate`, which the caller has entered already.
    pub fn note(gate: &'g Arc<Gate>, point: EntryPoint) -> Busy<'g> {
        Busy::keyed(Key::of(gate), point, None)
    }

    pub(crate) fn keyed(key: Key, point: EntryPoint, lease: Option<Lease>) -> Busy<'g> {
        // A thread that is ending has no stack any more; there is nothing below it either.
        let _ = STACK.try_with(|stack| stack.borrow_mut().push((key, point)));
        Busy {
            key,
            point,
            _lease: lease,
            _gate: PhantomData,
        }
    }

    /// The way it was entered.
    pub fn point(&self) -> EntryPoint {
        self.point
    }

    /// By which ways, outermost first, the device behind `gate` is being served on this thread.
    pub fn points(gate: &Arc<Gate>) -> Vec<EntryPoint> {
        let key = Key::of(gate);
        let points = |stack: &Stack| {
            let stack = stack.borrow();
            let own = stack.iter().filter(|(other, _)| *other == key);
            own.map(|(_, point)| *point).collect()
        };
        STACK.try_with(points).unwrap_or_default()
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let _ = STACK.try_with(|stack| {
            let mut stack = stack.borrow_mut();
            if let Some(at) = stack
                .iter()
                .rposition(|note| *note == (self.key, self.point))
            {
                stack.remove(at);
            }
        });
    }
}
