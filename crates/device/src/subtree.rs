// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device with everything below it on its way out. The order is in the types: each step takes the state before it.
//!
//! ```text
//!   Subtree<Plugged> ─ isolate ─▶ Subtree<Isolated> ─ drain().await ─▶ Subtree<Drained>
//!        all gates closed            all at once, nobody waits for another
//!   ─ detach(bus) ─▶ (Subtree<Detached>, GuestNotice) ─ destroy(pool).await ─▶ Vec<Gone>
//!        children first           the guest is told once, at the top     on a thread that may block; children first
//! ```
//!
//! A [`GuestNotice`] comes only from a sub-tree that has drained, a [`Gone`] only from a device that has been dropped.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use ebbtide_iothread::Blocking;
use ebbtide_models::seeded;

use crate::model::{Draining, Holder, Model};

/// Who a device is, for management.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The id it was given.
    pub id: Option<String>,
    /// Its QOM path, such as `/machine/peripheral/disk0`.
    pub path: String,
}

impl Identity {
    /// As reports call it: its id, else its path.
    pub fn name(&self) -> &str {
        self.id.as_ref().unwrap_or(&self.path)
    }
}

/// Working.
#[derive(Debug)]
pub enum Plugged {}
/// The guest cannot reach it; what is under way goes on.
#[derive(Debug)]
pub enum Isolated {}
/// Nothing of it is in use.
#[derive(Debug)]
pub enum Drained {}
/// The bus has forgotten it.
#[derive(Debug)]
pub enum Detached {}

/// A device and what is below it.
#[must_use = "a sub-tree that is dropped ends without telling anybody"]
pub struct Subtree<S> {
    identity: Identity,
    model: Box<dyn Model>,
    below: Vec<Subtree<S>>,
    _state: PhantomData<fn() -> S>,
}

/// The right to tell the guest that a slot is empty.
#[derive(Debug)]
#[must_use = "the guest waits to hear of it"]
pub struct GuestNotice(());

/// A device that is no more: the right to tell management so.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "management waits to hear of it"]
pub struct Gone {
    identity: Identity,
}

impl Gone {
    /// Who it was.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

impl<S> Subtree<S> {
    /// Who is at its top.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The device at its top.
    pub fn model(&self) -> &dyn Model {
        &*self.model
    }

    /// Every device, what is below before what it is below of.
    pub fn for_each(&self, visit: &mut impl FnMut(&Identity, &dyn Model)) {
        for below in &self.below {
            below.for_each(visit);
        }
        visit(&self.identity, &*self.model);
    }

    fn into_state<T>(self) -> Subtree<T> {
        Subtree {
            identity: self.identity,
            model: self.model,
            below: self.below.into_iter().map(Subtree::into_state).collect(),
            _state: PhantomData,
        }
    }
}

impl Subtree<Plugged> {
    /// A plugged device with what is plugged below it.
    pub fn new(
        identity: Identity,
        model: Box<dyn Model>,
        below: Vec<Subtree<Plugged>>,
    ) -> Subtree<Plugged> {
        Subtree {
            identity,
            model,
            below,
            _state: PhantomData,
        }
    }

    /// Shuts every gate. Where the guest has ejected it they are shut already.
    pub fn isolate(self) -> Subtree<Isolated> {
        self.for_each(&mut |_, model| {
            model.gate().close();
        });
        self.into_state()
    }
}

impl Subtree<Isolated> {
    /// Begins the drain of all devices at once.
    pub fn drain(mut self) -> Drain {
        let mut pending = Vec::new();
        self.begin(&mut pending);
        Drain {
            subtree: Some(self),
            pending,
        }
    }

    fn begin(&mut self, pending: &mut Vec<Option<Draining>>) {
        for below in &mut self.below {
            below.begin(pending);
        }
        pending.push(Some(self.model.drain()));
    }

    fn force(&mut self) -> bool {
        let mut any = false;
        for below in &mut self.below {
            any |= below.force();
        }
        any | self.model.force()
    }
}

/// The drain of a sub-tree: ready when nothing of any of its devices is in use.
///
/// It may be waited for again and again with a time-out; a time-out is a report and frees nothing.
#[must_use = "futures do nothing unless polled"]
pub struct Drain {
    subtree: Option<Subtree<Isolated>>,
    /// In the order of [`Subtree::for_each`]; None: drained.
    pending: Vec<Option<Draining>>,
}

impl Drain {
    /// The devices that have not drained yet, each with who keeps it.
    pub fn undrained(&self) -> Vec<(Identity, Vec<Holder>)> {
        let mut devices = Vec::new();
        let mut pending = self.pending.iter();
        if let Some(subtree) = &self.subtree {
            subtree.for_each(&mut |identity, model| {
                if pending.next().is_some_and(Option::is_some) {
                    devices.push((identity.clone(), model.holders()));
                }
            });
        }
        devices
    }

    /// Gives up what the devices wait for; see [`Model::force`]. False when none had anything to give up.
    pub fn force(&mut self) -> bool {
        self.subtree.as_mut().is_some_and(Subtree::force)
    }
}

impl Future for Drain {
    type Output = Subtree<Drained>;

    /// Pending for ever when it is polled after it was ready.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Subtree<Drained>> {
        let this = &mut *self;
        let mut waiting = false;
        for drain in &mut this.pending {
            if let Some(future) = drain {
                if seeded!("drain_waits_for_the_first") && waiting {
                    *drain = None;
                    continue;
                }
                match future.as_mut().poll(cx) {
                    // Dropped at once: it may hold what another device waits for.
                    Poll::Ready(()) => *drain = None,
                    Poll::Pending => waiting = true,
                }
            }
        }
        if waiting {
            return Poll::Pending;
        }
        match this.subtree.take() {
            Some(subtree) => Poll::Ready(subtree.into_state()),
            None => Poll::Pending,
        }
    }
}

/// Where devices are plugged: forgets them.
pub trait Bus {
    /// Takes `device` off its bus. It has drained, and so has everything below it, which has been forgotten before.
    /// Cannot fail: what could go wrong has to be seen to before the drain ends.
    fn forget(&mut self, identity: &Identity, device: &dyn Model);
}

impl Subtree<Drained> {
    /// Takes all devices off their buses, children first. The notice is for the slot the top one was in.
    pub fn detach(self, bus: &mut impl Bus) -> (Subtree<Detached>, GuestNotice) {
        self.for_each(&mut |identity, model| bus.forget(identity, model));
        (self.into_state(), GuestNotice(()))
    }
}

impl Subtree<Detached> {
    /// Drops the devices on `pool`, which may block. Children come first, in the answer as in the dropping.
    pub async fn destroy(self, pool: &Blocking) -> Vec<Gone> {
        pool.run(move || self.destroy_here()).await
    }

    /// Drops the devices on this thread, which may block.
    pub fn destroy_here(self) -> Vec<Gone> {
        let mut gone = Vec::new();
        self.drop_devices(&mut gone);
        gone
    }

    fn drop_devices(self, gone: &mut Vec<Gone>) {
        for below in self.below {
            below.drop_devices(gone);
        }
        drop(self.model);
        gone.push(Gone {
            identity: self.identity,
        });
    }
}
