// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A value behind a gate: one owner, many handles. The only `unsafe` of this crate.
//!
//! The invariant all of it relies on (V): *the value is alive, and only shared references to it exist, from
//! [`Owned::new`] until its owner has seen the gate drained.* The gate gives the rest: a lease exists only if it
//! was admitted while the gate was open, and a gate that has been seen drained never has a lease again.

use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use ebbtide_models::seeded;

use crate::gate::Gate;
use crate::word::Entry;

/// The one owner of a value that others reach through [`Handle`]s.
///
/// The way to the end is [`close`](Self::close), waiting for [`Gate::drained`], then
/// [`try_into_inner`](Self::try_into_inner). Dropping an `Owned` closes the gate and drops the value if nobody is
/// inside; if somebody is, the value is leaked and an error logged: it is never freed under a lease.
#[must_use = "dropping the owner closes the gate"]
pub struct Owned<D> {
    gate: Arc<Gate>,
    // Not a Box: a Box may not be moved while others hold pointers into it.
    value: NonNull<D>,
    _owns: PhantomData<D>,
}

// SAFETY: an Owned is a `Box<D>` and an `Arc<Gate>` in all but aliasing: sending it sends D (dropped or taken out
// there), and by (V) shared references may be in use on other threads, hence Sync.
unsafe impl<D: Send + Sync> Send for Owned<D> {}
// SAFETY: a shared Owned gives out `&D` and Handles, which give out `&D` on any thread.
unsafe impl<D: Send + Sync> Sync for Owned<D> {}

impl<D: Send + Sync + 'static> Owned<D> {
    /// Puts `value` behind a new, open gate called `name`.
    pub fn new(name: impl Into<String>, value: D) -> Owned<D> {
        Owned {
            gate: Gate::new(name),
            value: NonNull::from(Box::leak(Box::new(value))),
            _owns: PhantomData,
        }
    }

    /// A way in for others. It does not keep the value alive.
    pub fn handle(&self) -> Handle<D> {
        Handle {
            gate: Arc::clone(&self.gate),
            value: self.value,
        }
    }

    /// The gate in front of the value.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The value, for its owner: needs no lease, for only the owner ends its life.
    pub fn get(&self) -> &D {
        // SAFETY: (V): alive as long as this Owned is, which outlives the returned reference.
        unsafe { self.value.as_ref() }
    }

    /// Shuts the gate: no handle gets in any more. Never waits.
    pub fn close(&self) {
        self.gate.close();
    }

    /// The value, once the gate is closed and drained.
    ///
    /// # Errors
    /// Gives `self` back while the gate is open or somebody is inside.
    pub fn try_into_inner(self) -> Result<D, Owned<D>> {
        let drained = if seeded!("take_out_undrained") {
            self.gate.is_closed()
        } else {
            self.gate.is_drained()
        };
        if !drained {
            return Err(self);
        }
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is never used again, so the Arc is moved out exactly once.
        let gate = unsafe { std::ptr::read(&this.gate) };
        drop(gate);
        // SAFETY: the pointer came from a Box in `new`, is turned back only here or in `drop` (which
        // ManuallyDrop prevents), and the gate is drained: by (V) no reference to the value is left.
        Ok(*unsafe { Box::from_raw(this.value.as_ptr()) })
    }
}

impl<D> Drop for Owned<D> {
    fn drop(&mut self) {
        self.gate.close();
        if !self.gate.is_drained() {
            tracing::error!(gate = self.gate.name(), held = %self.gate.held(),
                "the owner is dropped while somebody is inside: its value is leaked");
            return;
        }
        // SAFETY: as in `try_into_inner`; drop runs once.
        drop(unsafe { Box::from_raw(self.value.as_ptr()) });
    }
}

impl<D> fmt::Debug for Owned<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owned")
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// What maps, timers, event loops and jobs keep of a value: the right to ask for it.
///
/// It does not keep the value alive; once the owner has closed the gate, [`enter`](Self::enter) says `None`.
pub struct Handle<D> {
    gate: Arc<Gate>,
    value: NonNull<D>,
}

// SAFETY: a Handle only ever gives out `&D`, to whichever thread it is on; it never drops a D.
unsafe impl<D: Sync> Send for Handle<D> {}
// SAFETY: as for Send.
unsafe impl<D: Sync> Sync for Handle<D> {}

impl<D> Handle<D> {
    /// The value with a lease on it, or `None` once the gate is closed (or its count full). Never waits.
    pub fn enter(&self, kind: Entry) -> Option<Live<'_, D>> {
        // Not `then_some`: a Live that is made leaves when dropped.
        self.gate.admit(kind).then(|| Live { handle: self, kind })
    }

    /// The gate in front of the value, for instance to take a [`Lease`](crate::Lease) that outlives a [`Live`].
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl<D> Clone for Handle<D> {
    fn clone(&self) -> Self {
        Handle {
            gate: Arc::clone(&self.gate),
            value: self.value,
        }
    }
}

impl<D> fmt::Debug for Handle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// A value in use: dereferences to it and holds its gate until dropped.
///
/// It borrows the gate from its [`Handle`] instead of counting a reference: entering and leaving are one atomic
/// operation each. Not to be kept across an `.await`: a task that sleeps inside holds up the drain for as long as
/// it sleeps. What has to outlive the access is a [`Lease`](crate::Lease), owned by the request it protects.
#[must_use = "dropping it leaves the gate at once"]
pub struct Live<'a, D> {
    handle: &'a Handle<D>,
    kind: Entry,
}

impl<D> Live<'_, D> {
    /// What it was entered for.
    pub fn kind(&self) -> Entry {
        self.kind
    }
}

impl<D> Deref for Live<'_, D> {
    type Target = D;

    fn deref(&self) -> &D {
        // SAFETY: this Live was admitted by the gate and has not left it, so the gate has not been seen drained
        // and by (V) the value is alive and only shared.
        unsafe { self.handle.value.as_ref() }
    }
}

impl<D> Drop for Live<'_, D> {
    fn drop(&mut self) {
        self.handle.gate.leave(self.kind);
    }
}

impl<D: fmt::Debug> fmt::Debug for Live<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
