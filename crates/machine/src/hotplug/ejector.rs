// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's eject write, on a vCPU thread, to the removal on the control thread.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use ebbtide_bus::acpi::DimmEjectSink;
use ebbtide_bus::pci::{EjectSink, SlotAddress};
use ebbtide_device::{Answer, Eject, NodeId};
use ebbtide_iothread::Notifier;

/// A slot whose device a guest can eject.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SlotKey {
    /// A slot of a PCI bus.
    Pci(SlotAddress),
    /// A DIMM slot.
    Dimm(u16),
}

/// What is in a slot.
pub(crate) struct Occupant {
    pub(crate) eject: Arc<Eject>,
    pub(crate) node: NodeId,
    /// The guest has ejected it against the policy: it has to be told that the device is still there.
    refused: AtomicBool,
    /// The guest has said that it keeps it.
    guest_refused: AtomicBool,
}

impl Occupant {
    /// Whether the guest has said that it keeps the device, since this was last asked.
    pub(crate) fn take_guest_refused(&self) -> bool {
        self.guest_refused.swap(false, Ordering::AcqRel)
    }

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
    reports: Mutex<VecDeque<OstReport>>,
    woken: Notifier,
}

/// What a guest has said about a DIMM slot (ACPI 6.5, 6.3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OstReport {
    pub(crate) slot: u16,
    pub(crate) source: u32,
    pub(crate) status: u32,
}

/// Reports that wait for the control thread. A guest that says more at once is not listened to.
const REPORTS: usize = 64;

impl Ejector {
    /// No slot is occupied. Ejects are announced by `woken`.
    pub(crate) fn new(woken: Notifier) -> Arc<Ejector> {
        Arc::new(Ejector {
            table: ArcSwap::default(),
            reports: Mutex::new(VecDeque::with_capacity(REPORTS)),
            woken,
        })
    }

    /// A device is in `slot`. On the control thread.
    pub(crate) fn occupy(&self, slot: SlotKey, eject: &Arc<Eject>, node: NodeId) {
        let occupant = Arc::new(Occupant {
            eject: Arc::clone(eject),
            node,
            refused: AtomicBool::new(false),
            guest_refused: AtomicBool::new(false),
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

    /// What guests have said since the last time.
    pub(crate) fn take_reports(&self) -> Vec<OstReport> {
        self.reports().drain(..).collect()
    }

    fn reports(&self) -> MutexGuard<'_, VecDeque<OstReport>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
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

impl DimmEjectSink for Ejector {
    fn eject(&self, slot: u16) {
        self.eject_slot(&SlotKey::Dimm(slot));
    }

    fn ost(&self, slot: u16, source: u32, status: u32) {
        let mut reports = self.reports();
        if reports.len() < REPORTS {
            reports.push_back(OstReport {
                slot,
                source,
                status,
            });
        }
        drop(reports);
        self.woken.notify();
    }

    fn refused(&self, slot: u16) {
        if let Some(occupant) = self.table.load().get(&SlotKey::Dimm(slot)) {
            occupant.guest_refused.store(true, Ordering::Release);
        }
        self.woken.notify();
    }
}
