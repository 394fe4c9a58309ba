// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's eject write, on a vCPU thread, to the removal on the control thread.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use ebbtide_bus::acpi::DimmEjectSink;
use ebbtide_bus::pci::{EjectSink, SlotAddress};
use ebbtide_device::{Answer, Eject, NodeId};
use ebbtide_iothread::LaterNotifier;

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
    /// The guest has ejected it, whoever isolated it.
    let_go: AtomicBool,
    /// The same, for good.
    ejected: AtomicBool,
    /// The one before it in the slot went without the guest's eject, which may still come.
    is_successor: AtomicBool,
    /// The guest has found it; `None`: that is not known of a DIMM.
    enumerated: Option<Arc<AtomicBool>>,
}

impl Occupant {
    /// Whether the guest has said that it keeps the device, since this was last asked.
    pub(crate) fn take_guest_refused(&self) -> bool {
        self.guest_refused.swap(false, Ordering::AcqRel)
    }

    /// Whether the guest has let go of an isolated device since this was last asked.
    pub(crate) fn take_let_go(&self) -> bool {
        self.let_go.swap(false, Ordering::AcqRel)
    }

    /// Whether the guest has tried in vain since this was last asked.
    pub(crate) fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::AcqRel)
    }
}

impl Occupant {
    /// Whether an eject is not meant for this one: a guest that was at work with the one before when that was forced out ejects
    /// *the slot* at the end, whatever is in it by then. What it has not found yet it does not use, and so has no
    /// reason to eject, but for being asked to.
    fn is_taken_for_another(&self) -> bool {
        let is_found = |enumerated: &Arc<AtomicBool>| enumerated.load(Ordering::Acquire);
        self.is_successor.load(Ordering::Acquire)
            && !self.enumerated.as_ref().is_none_or(is_found)
            && !self.eject.is_requested()
            && !self.eject.is_isolated()
    }
}

type Table = BTreeMap<SlotKey, Arc<Occupant>>;

/// Which device is in which slot, for vCPU threads: they take no lock, allocate nothing and wait for nothing. What they
/// did the control thread finds in the table when it is woken.
pub(crate) struct Ejector {
    table: ArcSwap<Table>,
    reports: Mutex<VecDeque<OstReport>>,
    /// Slots that were left without the guest's eject by those who were in them last. Of the control thread.
    owed: Mutex<BTreeSet<SlotKey>>,
    /// Since when reports are counted, and how many they are. Of the control thread.
    told: Mutex<(Option<Instant>, usize)>,
    news: LaterNotifier,
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
/// Reports in a second that management is told of: more than any guest makes of as many slots as there can be. A client that
/// is told without end is dropped when it does not read for a moment.
const TOLD_A_SECOND: usize = 1024;
const SECOND: Duration = Duration::from_secs(1);

impl Ejector {
    /// No slot is occupied. Ejects are announced by `news`: later, so that no vCPU waits, within its register write, for
    /// what the control thread then does, on a host without a core to spare.
    pub(crate) fn new(news: LaterNotifier) -> Arc<Ejector> {
        Arc::new(Ejector {
            table: ArcSwap::default(),
            reports: Mutex::new(VecDeque::with_capacity(REPORTS)),
            owed: Mutex::default(),
            told: Mutex::default(),
            news,
        })
    }

    /// A device is in `slot`; `enumerated` says once the guest has found it. On the control thread.
    pub(crate) fn occupy(
        &self,
        slot: SlotKey,
        eject: &Arc<Eject>,
        node: NodeId,
        enumerated: Option<&Arc<AtomicBool>>,
    ) {
        let occupant = Arc::new(Occupant {
            eject: Arc::clone(eject),
            node,
            refused: AtomicBool::new(false),
            guest_refused: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
            is_successor: AtomicBool::new(self.owed().contains(&slot)),
            enumerated: enumerated.cloned(),
        });
        self.change(|table| table.insert(slot, occupant));
    }

    /// `node` is in `slot` no more. On the control thread.
    pub(crate) fn vacate(&self, slot: &SlotKey, node: NodeId) {
        let left = self.change(|table| {
            let is_there = table.get(slot).is_some_and(|it| it.node == node);
            is_there.then(|| table.remove(slot)).flatten()
        });
        match left.map(|occupant| occupant.ejected.load(Ordering::Acquire)) {
            Some(false) => _ = self.owed().insert(slot.clone()),
            Some(true) => _ = self.owed().remove(slot),
            None => {}
        }
    }

    /// The bus of this name is no more, nor are its slots. On the control thread.
    pub(crate) fn forget_bus(&self, name: &str) {
        let is_there = |slot: &SlotKey| matches!(slot, SlotKey::Pci(at) if &*at.bus == name);
        self.owed().retain(|slot| !is_there(slot));
    }

    /// The guest is another one, which has none of the ejects to make that the last one owed. On the control thread, while no
    /// vCPU runs.
    pub(crate) fn next_guest(&self) {
        self.owed().clear();
        for occupant in self.occupants() {
            occupant.is_successor.store(false, Ordering::Release);
        }
    }

    /// What is in the slots now. On the control thread.
    pub(crate) fn occupants(&self) -> Vec<Arc<Occupant>> {
        self.table.load().values().cloned().collect()
    }

    /// What guests have said since the last time, and whether management is to be told of it. On the control thread.
    pub(crate) fn take_reports(&self, now: Instant) -> Vec<(OstReport, bool)> {
        let mut counted = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, count) = &mut *counted;
        let is_over = |since: Instant| now.saturating_duration_since(since) >= SECOND;
        if since.is_none_or(is_over) {
            (*since, *count) = (Some(now), 0);
        }
        let reports = self.reports().drain(..).collect::<Vec<_>>();
        let judged = reports.into_iter().map(|report| {
            *count = count.saturating_add(1);
            (report, *count <= TOLD_A_SECOND)
        });
        judged.collect()
    }

    fn reports(&self) -> MutexGuard<'_, VecDeque<OstReport>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owed(&self) -> MutexGuard<'_, BTreeSet<SlotKey>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) -> R {
        let mut table = Table::clone(&self.table.load());
        let result = change(&mut table);
        self.table.store(Arc::new(table));
        result
    }

    /// The guest ejects what is in `slot`: shuts its gates if the guest may do that now, and returns at once.
    fn eject_slot(&self, slot: &SlotKey) {
        let table = self.table.load();
        let Some(occupant) = table.get(slot) else {
            return;
        };
        let answer = match occupant.is_taken_for_another() {
            true => Answer::Refused,
            false => occupant.eject.eject(),
        };
        if answer != Answer::Refused {
            occupant.ejected.store(true, Ordering::Release);
        }
        match answer {
            Answer::Isolated => {
                occupant.let_go.store(true, Ordering::Release);
                self.news.announce();
            }
            // Management was first; said once, the guest need not be heard again.
            Answer::Already => {
                if !occupant.let_go.swap(true, Ordering::AcqRel) {
                    self.news.announce();
                }
            }
            Answer::Refused => {
                occupant.refused.store(true, Ordering::Release);
                self.news.announce();
            }
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
        self.news.announce();
    }

    fn refused(&self, slot: u16) {
        if let Some(occupant) = self.table.load().get(&SlotKey::Dimm(slot)) {
            occupant.guest_refused.store(true, Ordering::Release);
        }
        self.news.announce();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebbtide_device::{Draining, GuestEject, Identity, Model, Tree};
    use ebbtide_gate::Gate;
    use ebbtide_iothread::LaterEvent;

    const BUSES: [&str; 2] = ["pcie.0", "rp1"];

    struct Still(Arc<Gate>);

    impl Model for Still {
        fn gate(&self) -> &Arc<Gate> {
            &self.0
        }

        fn drain(&mut self) -> Draining {
            Box::pin(self.0.drained())
        }
    }

    fn at(bus: &str, slot: u8) -> SlotAddress {
        SlotAddress {
            bus: bus.into(),
            slot,
        }
    }

    /// A machine's slots, without a machine.
    struct Slots {
        ejector: Arc<Ejector>,
        tree: Tree<()>,
        /// Who is told.
        _announced: LaterEvent,
    }

    impl Slots {
        fn new() -> Slots {
            let (announced, notifier) = LaterEvent::new(Duration::from_millis(1)).unwrap();
            Slots {
                ejector: Ejector::new(notifier),
                tree: Tree::default(),
                _announced: announced,
            }
        }

        fn plug(&mut self, key: &SlotKey, policy: GuestEject) -> (NodeId, Arc<Gate>) {
            self.plug_found(key, policy, None)
        }

        fn plug_found(
            &mut self,
            key: &SlotKey,
            policy: GuestEject,
            enumerated: Option<&Arc<AtomicBool>>,
        ) -> (NodeId, Arc<Gate>) {
            let gate = Gate::new("device");
            let eject = Eject::new(policy, &gate);
            let identity = Identity {
                id: None,
                path: format!("{key:?}"),
            };
            let model = Box::new(Still(Arc::clone(&gate)));
            let node = self
                .tree
                .plug(
                    None,
                    identity,
                    model,
                    Some(Arc::clone(&eject)),
                    (),
                    Instant::now(),
                )
                .map_err(|(error, _)| error)
                .unwrap();
            self.ejector.occupy(key.clone(), &eject, node, enumerated);
            (node, gate)
        }

        /// The guest ejects whatever a machine could have.
        fn eject_all(&self) {
            for slot in 0..=u8::MAX {
                for bus in BUSES.into_iter().chain(["", "nowhere"]) {
                    EjectSink::eject(&*self.ejector, &at(bus, slot));
                }
            }
            for slot in 0..=u16::MAX {
                DimmEjectSink::eject(&*self.ejector, slot);
            }
        }
    }

    #[test]
    fn a_guest_that_ejects_everything_gets_what_its_policies_allow() {
        let mut slots = Slots::new();
        slots.eject_all();
        let mut plugged = Vec::new();
        for (slot, policy) in [
            (3, GuestEject::On),
            (4, GuestEject::Off),
            (5, GuestEject::Requested),
            (6, GuestEject::Requested),
        ] {
            let dimm = SlotKey::Dimm(slot.into());
            let keys = BUSES.map(|bus| SlotKey::Pci(at(bus, slot)));
            for key in keys.into_iter().chain([dimm]) {
                let (node, gate) = slots.plug(&key, policy);
                if slot == 6 {
                    slots.tree.request(node, Instant::now()).unwrap();
                }
                plugged.push((slot, node, gate));
            }
        }
        slots.eject_all();
        slots.eject_all();
        for (slot, node, gate) in plugged {
            let occupants = slots.ejector.occupants();
            let mut it = occupants.iter().filter(|it| it.node == node);
            let (Some(occupant), None) = (it.next(), it.next()) else {
                panic!("slot {slot}: in no slot, or in several");
            };
            let allowed = matches!(slot, 3 | 6);
            assert_eq!(gate.is_closed(), allowed, "slot {slot}");
            assert_eq!(occupant.eject.is_isolated(), allowed, "slot {slot}");
            assert_eq!(occupant.take_refused(), !allowed, "slot {slot}");
            assert!(!occupant.take_refused(), "slot {slot}: told twice");
            assert_eq!(occupant.take_let_go(), allowed, "slot {slot}");
        }
    }

    #[test]
    fn an_eject_allocates_nothing() {
        let mut slots = Slots::new();
        for (slot, policy) in [(3, GuestEject::On), (4, GuestEject::Off)] {
            slots.plug(&SlotKey::Pci(at("rp1", slot)), policy);
            slots.plug(&SlotKey::Dimm(slot.into()), policy);
        }
        // The first look at the table fills what the thread keeps for itself.
        EjectSink::eject(&*slots.ejector, &at("rp1", 9));
        let addresses = [3, 4, 3, 5].map(|slot| at("rp1", slot));
        let ejects = || {
            for address in &addresses {
                EjectSink::eject(&*slots.ejector, address);
            }
            for slot in 0..8 {
                DimmEjectSink::eject(&*slots.ejector, slot);
                DimmEjectSink::ost(&*slots.ejector, slot, 3, 0x84);
                DimmEjectSink::refused(&*slots.ejector, slot);
            }
        };
        assert_eq!(crate::allocations::of(ejects), 0);
    }

    #[test]
    fn a_guest_lets_go_of_what_management_has_isolated() {
        let mut slots = Slots::new();
        let key = SlotKey::Pci(at("rp1", 0));
        slots.plug(&key, GuestEject::Requested);
        let occupants = slots.ejector.occupants();
        assert!(occupants[0].eject.isolate());
        assert!(!occupants[0].take_let_go(), "the guest knows nothing");
        slots.eject_all();
        assert!(occupants[0].take_let_go());
    }

    #[test]
    fn who_has_left_a_slot_is_not_ejected_from_it_and_takes_nobody_along() {
        let mut slots = Slots::new();
        let key = SlotKey::Pci(at("rp1", 0));
        let (first, first_gate) = slots.plug(&key, GuestEject::On);
        slots.ejector.vacate(&key, first);
        slots.eject_all();
        assert!(!first_gate.is_closed() && slots.ejector.occupants().is_empty());
        let (second, second_gate) = slots.plug(&key, GuestEject::On);
        slots.ejector.vacate(&key, first);
        assert_eq!(slots.ejector.occupants().len(), 1);
        slots.eject_all();
        assert!(second_gate.is_closed() && !first_gate.is_closed());
        slots.ejector.vacate(&key, second);
        assert!(slots.ejector.occupants().is_empty());
    }

    /// The guest was at work with a device that was forced out, and ejects the slot at the end. Another is there by then.
    #[test]
    fn a_late_eject_does_not_take_what_came_after() {
        for ejected in [false, true] {
            let mut slots = Slots::new();
            let key = SlotKey::Pci(at("rp1", 0));
            let (first, _) = slots.plug(&key, GuestEject::On);
            if ejected {
                slots.eject_all();
            }
            slots.ejector.vacate(&key, first);
            let found = Arc::new(AtomicBool::new(false));
            let (_, gate) = slots.plug_found(&key, GuestEject::On, Some(&found));
            slots.eject_all();
            assert_eq!(gate.is_closed(), ejected);
            let second = &slots.ejector.occupants()[0];
            assert_eq!(second.take_refused(), !ejected, "it is told what is there");
            // By then it has learnt of the second, and ejects that.
            found.store(true, Ordering::Release);
            slots.eject_all();
            assert!(gate.is_closed());
        }
    }

    #[test]
    fn nothing_is_owed_of_a_bus_that_is_gone() {
        let mut slots = Slots::new();
        for bus in ["rp1", "rp2"] {
            let key = SlotKey::Pci(at(bus, 0));
            let (node, _) = slots.plug(&key, GuestEject::On);
            slots.ejector.vacate(&key, node);
        }
        slots.ejector.forget_bus("rp1");
        let left: Vec<SlotKey> = slots.ejector.owed().iter().cloned().collect();
        assert_eq!(left, [SlotKey::Pci(at("rp2", 0))]);
    }

    #[test]
    fn what_is_not_found_yet_is_ejected_when_that_is_asked_for_or_the_guest_is_another() {
        for is_asked in [false, true] {
            let mut slots = Slots::new();
            let key = SlotKey::Pci(at("rp1", 0));
            let (first, _) = slots.plug(&key, GuestEject::On);
            slots.ejector.vacate(&key, first);
            let found = Arc::default();
            let (second, gate) = slots.plug_found(&key, GuestEject::On, Some(&found));
            match is_asked {
                true => slots.tree.request(second, Instant::now()).unwrap(),
                false => slots.ejector.next_guest(),
            }
            slots.eject_all();
            assert!(gate.is_closed());
        }
    }

    #[test]
    fn a_guest_that_talks_without_end_is_not_listened_to_without_end() {
        let slots = Slots::new();
        for status in 0..10_000 {
            slots.ejector.ost(7, 3, status);
        }
        let begun = Instant::now();
        let reports = slots.ejector.take_reports(begun);
        assert_eq!(reports.len(), REPORTS);
        assert_eq!((reports[0].0.slot, reports[0].0.status), (7, 0));
        assert!(slots.ejector.take_reports(begun).is_empty());
    }

    #[test]
    fn management_is_told_of_so_many_reports_a_second_and_the_last_is_known() {
        let slots = Slots::new();
        let (begun, mut told) = (Instant::now(), 0);
        for ms in 0..2000 {
            for status in 0..REPORTS {
                slots.ejector.ost(7, 3, status as u32);
            }
            let reports = slots
                .ejector
                .take_reports(begun + Duration::from_millis(ms));
            assert_eq!(reports.len(), REPORTS);
            told += reports.iter().filter(|(_, is_told)| *is_told).count();
        }
        assert_eq!(told, 2 * TOLD_A_SECOND);
    }
}
