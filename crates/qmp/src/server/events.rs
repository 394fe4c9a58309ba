// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events to every client that has negotiated, no more often than each event's limit allows.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::{Rc, Weak};
use std::time::SystemTime;

use ebbtide_iothread::{Local, Task};

use super::peer::Peer;
use super::signal::Signal;
use super::throttle::Throttle;
use crate::executor::ClientId;
use crate::message;
use crate::schema::Event;

/// Where the machine puts its events. Belongs to the control thread; clones are the same sink.
///
/// It exists before the server and outlives it: without clients, events go nowhere.
#[derive(Clone)]
pub struct EventSink {
    hub: Rc<Hub>,
}

struct Hub {
    local: Local,
    peers: RefCell<BTreeMap<ClientId, Rc<Peer>>>,
    throttle: RefCell<Throttle<Vec<u8>>>,
    /// The throttle was offered something, so its next date may have changed.
    offered: Rc<Signal>,
    /// Sends what was kept back; ends with the hub.
    _timer: Task<()>,
}

impl EventSink {
    /// A sink without clients yet.
    pub fn new(local: &Local) -> Self {
        let offered = Rc::new(Signal::default());
        let hub = Rc::new_cyclic(|hub: &Weak<Hub>| Hub {
            local: local.clone(),
            peers: RefCell::default(),
            throttle: RefCell::new(Throttle::new()),
            offered: Rc::clone(&offered),
            _timer: local.spawn(send_what_was_kept(local.clone(), Weak::clone(hub), offered)),
        });
        Self { hub }
    }

    /// Sends an event, with the time of this call, to every client that has negotiated. Never waits.
    pub fn emit(&self, event: Event) {
        if cfg!(debug_assertions)
            && let Err(error) = event.info.check_data(&event.data)
        {
            tracing::error!(event = event.name(), %error, "an event differs from its declaration");
        }
        let text = message::event(&event, SystemTime::now());
        let now = self.hub.local.now();
        let at_once = self.hub.throttle.borrow_mut().offer(now, &event, text);
        if let Some(text) = at_once {
            self.hub.deliver(&text);
        }
        self.hub.offered.notify();
    }

    pub(super) fn add(&self, peer: Rc<Peer>) {
        self.hub.peers.borrow_mut().insert(peer.id, peer);
    }

    pub(super) fn remove(&self, id: ClientId) {
        self.hub.peers.borrow_mut().remove(&id);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSink")
            .field("clients", &self.hub.peers.borrow().len())
            .finish_non_exhaustive()
    }
}

impl Hub {
    fn deliver(&self, text: &[u8]) {
        for peer in self
            .peers
            .borrow()
            .values()
            .filter(|peer| peer.is_negotiated())
        {
            peer.send(text);
        }
    }
}

/// Holds the hub only while it acts, so that the hub can go.
async fn send_what_was_kept(local: Local, hub: Weak<Hub>, offered: Rc<Signal>) {
    let next_due = || {
        hub.upgrade()
            .and_then(|hub| hub.throttle.borrow().next_due())
    };
    loop {
        offered.until(|| next_due().is_some()).await;
        let Some(due) = next_due() else { continue };
        local.sleep_until(due).await;
        let Some(hub) = hub.upgrade() else { return };
        let texts = hub.throttle.borrow_mut().due(local.now());
        texts.iter().for_each(|text| hub.deliver(text));
    }
}
