// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the queues of a card have in common, and the outside with them.
//!
//! Locks: the transport's configuration lock, then `link` or `filter`, neither within the other.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Sender;
use ebbtide_memory::AddressSpace;
use ebbtide_net::{Claim, MacAddress};

use super::config::Config;
use super::feature::CTRL_VLAN;
use super::filter::Filter;
use super::metrics::Counters;
use super::{NetEvent, NetSpec};
use crate::control::{Change, TransportControl};
use crate::device::ActiveQueue;

pub(super) struct Shared {
    pub name: String,
    pub claim: Claim,
    pub counters: Counters,
    /// What the driver does wrong.
    pub complaints: LogLimit,
    mac: MacAddress,
    mtu: u16,
    link: Mutex<LinkState>,
    filter: Mutex<Filter>,
    control: OnceLock<TransportControl>,
    events: Option<Sender<NetEvent>>,
}

#[derive(Clone, Copy)]
struct LinkState {
    /// Nobody pulled it.
    plugged: bool,
    /// The backend has its peer.
    peer: bool,
}

impl LinkState {
    fn is_up(self) -> bool {
        self.plugged && self.peer
    }
}

/// What a queue's task gets.
pub(super) struct Served {
    pub shared: Arc<Shared>,
    pub queue: ActiveQueue,
    pub features: u64,
    pub gate: Arc<Gate>,
    pub space: Arc<AddressSpace>,
    pub control: TransportControl,
}

impl Shared {
    pub(super) fn new(spec: NetSpec, claim: Claim) -> Arc<Shared> {
        let NetSpec {
            id,
            mac,
            mtu,
            rx_queue_size: _,
            tx_queue_size: _,
            features_off: _,
            events,
        } = spec;
        Arc::new(Shared {
            name: id,
            claim,
            counters: Counters::default(),
            complaints: LogLimit::default(),
            mac,
            mtu: mtu.unwrap_or(0),
            link: Mutex::new(LinkState {
                plugged: true,
                peer: true,
            }),
            filter: Mutex::new(Filter::new(mac, false)),
            control: OnceLock::new(),
            events,
        })
    }

    pub(super) fn attach(&self, control: TransportControl) {
        // Called once, before anything else.
        let _ = self.control.set(control);
    }

    pub(super) fn config(&self) -> Config {
        Config {
            mac: self.mac(),
            link_is_up: self.link_is_up(),
            mtu: self.mtu,
        }
    }

    pub(super) fn new_driver(&self, features: u64) {
        *self.filter() = Filter::new(self.mac, features & CTRL_VLAN != 0);
    }

    pub(super) fn filter(&self) -> MutexGuard<'_, Filter> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mac(&self) -> MacAddress {
        self.filter().mac()
    }

    pub(super) fn link_is_up(&self) -> bool {
        self.link().is_up()
    }

    pub(super) fn set_link(&self, up: bool) {
        self.change_link(|link| link.plugged = up);
    }

    /// The backend lost its peer for good.
    pub(super) fn peer_is_gone(&self, why: &std::io::Error) {
        let changed = self.change_link(|link| link.peer = false);
        if !changed {
            return;
        }
        tracing::warn!(device = self.name, netdev = self.claim.id(), %why, "the network backend has lost its peer");
        if let Some(events) = &self.events {
            events.send(NetEvent::PeerGone {
                device: self.name.clone(),
                netdev: self.claim.id().to_owned(),
            });
        }
    }

    /// Whether anything changed.
    fn change_link(&self, change: impl FnOnce(&mut LinkState)) -> bool {
        let update = || {
            let mut link = self.link();
            let before = *link;
            change(&mut link);
            let announced = before.is_up() != link.is_up();
            let changed = before.plugged != link.plugged || before.peer != link.peer;
            let told = if announced {
                Change::Announced
            } else {
                Change::None
            };
            (changed, told)
        };
        match self.control.get() {
            Some(control) => control.update_config(update),
            None => update().0,
        }
    }

    fn link(&self) -> MutexGuard<'_, LinkState> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The driver broke a queue: it is told, unless its activation is over.
pub(super) fn broken(
    shared: &Shared,
    gate: &Arc<Gate>,
    control: &TransportControl,
    queue: u16,
    fault: &dyn std::fmt::Display,
) {
    let Some(_lease) = gate.enter(Entry::Io) else {
        return;
    };
    if let Some(suppressed) = shared.complaints.allow() {
        tracing::warn!(device = shared.name, queue, suppressed, %fault, "the driver's queue is unusable");
    }
    control.needs_reset();
}
