// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's eject write, on a vCPU thread, to the removal on the control thread.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use ebbtide_bus::pci::{EjectSink, SlotAddress};
use ebbtide_device::{Answer, Eject, NodeId};
use ebbtide_iothread::Notifier;

/// A slot whose device a guest can eject.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SlotKey {
    /// A slot of a PCI bus.
    Pci(SlotAddress),
}

/// What is in a slot.
pub(crate) struct Occupant {
    pub(crate) eject: Arc<Eject>,
    pub(crate) node: NodeId,
    /// The guest has ejected it against the policy: it has to be told that the device is still there.
    refused: AtomicBool,
}

impl Occupant {
    /// Whether the guest has tried in vain since this was last asked.
    pub(crate) fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::AcqRel)
    }
}

type Table = BTreeMap<SlotKey, Arc<Occupant>>;

/// Which device is in which slot, for vCPU threads: they take no lock, allocate nothing and wait for nothing. What they
/// did the control thread finds in the table when it is woken.
pub(crate) struct Ejector {
    table: ArcSwap<Table>,
    woken: Notifier,
}

impl Ejector {
    /// No slot is occupied. Ejects are announced by `woken`.
    pub(crate) fn new(woken: Notifier) -> Arc<Ejector> {
        Arc::new(Ejector {
            table: ArcSwap::default(),
            woken,
        })
    }

    /// A device is in `slot`. On the control thread.
    pub(crate) fn occupy(&self, slot: SlotKey, eject: &Arc<Eject>, node: NodeId) {
        let occupant = Arc::new(Occupant {
            eject: Arc::clone(eject),
            node,
            refused: AtomicBool::new(false),
        });
        self.change(|table| table.insert(slot, occupant));
    }

    /// `node` is in `slot` no more. On the control thread.
    pub(crate) fn vacate(&self, slot: &SlotKey, node: NodeId) {
        self.change(|table| {
            if table
                .get(slot)
                .is_some_and(|occupant| occupant.node == node)
            {
                table.remove(slot);
            }
        });
    }

    /// What is in the slots now. On the control thread.
    pub(crate) fn occupants(&self) -> Vec<Arc<Occupant>> {
        self.table.load().values().cloned().collect()
    }

    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) {
        let mut table = Table::clone(&self.table.load());
        change(&mut table);
        self.table.store(Arc::new(table));
    }

    /// The guest ejects what is in `slot`: shuts its gates if the guest may do that now, and returns at once.
    fn eject_slot(&self, slot: &SlotKey) {
        let table = self.table.load();
        let Some(occupant) = table.get(slot) else {
            return;
        };
        match occupant.eject.eject() {
            Answer::Isolated => self.woken.notify(),
            Answer::Refused => {
                occupant.refused.store(true, Ordering::Release);
                self.woken.notify();
            }
            Answer::Already => {}
        }
    }
}

impl EjectSink for Ejector {
    fn eject(&self, slot: &SlotAddress) {
        self.eject_slot(&SlotKey::Pci(slot.clone()));
    }
}
