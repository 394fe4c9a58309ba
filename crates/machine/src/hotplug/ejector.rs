// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's eject write, on a vCPU thread, to the removal on the control thread.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use ebbtide_device::{Answer, Eject, NodeId};
use ebbtide_iothread::Sender;

/// Which slot a guest ejects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SlotKey {
    /// A slot of the PCI bus of this number.
    Pci {
        /// Which bus, by [`ebbtide_bus`]'s numbering of them.
        bus: u32,
        /// Slot 0 to 31.
        slot: u8,
    },
    /// A DIMM slot.
    Dimm(u16),
}

type Table = BTreeMap<SlotKey, (Arc<Eject>, NodeId)>;

/// Which device is in which slot, for vCPU threads. They read it without a lock.
pub(crate) struct Ejector {
    table: ArcSwap<Table>,
    ejected: Sender<NodeId>,
}

impl Ejector {
    /// No slot is occupied. Devices the guest ejects are sent to `ejected`.
    pub(crate) fn new(ejected: Sender<NodeId>) -> Arc<Ejector> {
        Arc::new(Ejector {
            table: ArcSwap::default(),
            ejected,
        })
    }

    /// A device is in `slot`. On the control thread.
    pub(crate) fn occupy(&self, slot: SlotKey, eject: &Arc<Eject>, node: NodeId) {
        self.change(|table| table.insert(slot, (Arc::clone(eject), node)));
    }

    /// Nothing is in `slot` any more. On the control thread.
    pub(crate) fn vacate(&self, slot: SlotKey) {
        self.change(|table| table.remove(&slot));
    }

    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) {
        let mut table = Table::clone(&self.table.load());
        change(&mut table);
        self.table.store(Arc::new(table));
    }

    /// The guest ejects what is in `slot`. Shuts its gates if the guest may do that now, and returns at once. None: the
    /// slot is empty.
    pub(crate) fn eject(&self, slot: SlotKey) -> Option<Answer> {
        let table = self.table.load();
        let (eject, node) = table.get(&slot)?;
        let answer = eject.eject();
        if answer == Answer::Isolated {
            self.ejected.send(*node);
        }
        Some(answer)
    }
}
