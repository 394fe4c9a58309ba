// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOMMU regions: addresses that are translated when they are used.
//!
//! ```text
//!   DMA ──address──► Iommu::translate ──► address space, address, how far it goes, rights
//!   guest unmaps ──► Domain::unmap ──► notifiers (VFIO, vhost) ──► future: ready when no
//!                                      mapping made through the old translation is left
//! ```

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use ebbtide_models::seeded;

use crate::sync::{Mutex, lock};
use crate::{Access, AddressSpace, Gpa};

/// Translations that may follow each other before they are taken for a circle.
pub(crate) const MAX_TRANSLATIONS: u8 = 8;

/// Where an address of an IOMMU region leads.
#[derive(Clone, Debug)]
pub struct Translation {
    /// The address space it leads to; of the same memory as the region.
    pub space: Arc<AddressSpace>,
    /// The address there.
    pub target: Gpa,
    /// Bytes from there on for which the translation holds; at least 1.
    pub len: u64,
    /// What is allowed.
    pub access: Access,
}

/// Translates the addresses of an IOMMU region.
///
/// Called outside any read section, from several threads at once. It usually holds the address
/// space it translates to, and that the memory: the region must be taken out of the tree before
/// the memory can end.
pub trait Iommu: Send + Sync {
    /// The translation of `offset` (bytes) of the region, `None` if there is none for `access`.
    /// What allows less than `access` is taken for none.
    fn translate(&self, offset: u64, access: Access) -> Option<Translation>;

    /// Shows every translation that touches `range` (bytes of the region) to a new notifier.
    fn replay(&self, _range: Range<u64>, _show: &mut dyn FnMut(&IommuMapping)) {}
}

/// A translation that came into being, as a notifier sees it.
#[derive(Clone, Debug)]
pub struct IommuMapping {
    /// Bytes of the region.
    pub range: Range<u64>,
    /// Where they lead.
    pub translation: Translation,
}

/// Mirrors the translations of an IOMMU region elsewhere: VFIO containers, vhost back-ends.
///
/// Called on the thread that changes them; it must not add or remove notifiers of the region.
pub trait IommuNotifier: Send {
    /// A translation appears.
    fn map(&mut self, mapping: &IommuMapping);
    /// Whatever touches `range` (bytes of the region) is translated no more.
    fn unmap(&mut self, range: Range<u64>);
}

/// Names a notifier of one IOMMU region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IommuNotifierId(u64);

/// The translations of one IOMMU region as others follow them: notifiers, and DMA under way.
pub struct Domain {
    iommu: Arc<dyn Iommu>,
    notifiers: Mutex<Notifiers>,
    flights: Arc<Mutex<Flights>>,
}

#[derive(Default)]
struct Notifiers {
    last: u64,
    list: Vec<(IommuNotifierId, Range<u64>, Box<dyn IommuNotifier>)>,
}

/// Mappings made through translations, by age.
#[derive(Default)]
struct Flights {
    next: u64,
    list: Vec<(u64, Range<u64>)>,
    waiting: Vec<Waker>,
}

impl Flights {
    fn any_before(&self, before: u64, range: &Range<u64>) -> bool {
        self.list
            .iter()
            .any(|(id, other)| *id < before && overlaps(other, range))
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Domain {
    pub(crate) fn new(iommu: Arc<dyn Iommu>) -> Domain {
        Domain {
            iommu,
            notifiers: Mutex::new(Notifiers::default()),
            flights: Arc::new(Mutex::new(Flights::default())),
        }
    }

    /// Adds a notifier for `range` (bytes of the region); it is shown what is translated there.
    /// [`Iommu::replay`] is called under the lock that [`Domain::map`] and [`Domain::unmap`] take:
    /// an IOMMU calls those without holding what its `replay` waits for.
    pub fn add_notifier(
        &self,
        range: Range<u64>,
        mut notifier: Box<dyn IommuNotifier>,
    ) -> IommuNotifierId {
        let mut notifiers = lock(&self.notifiers);
        // Under the lock: a change that comes now is told after the replay.
        self.iommu
            .replay(range.clone(), &mut |mapping| notifier.map(mapping));
        notifiers.last += 1;
        let id = IommuNotifierId(notifiers.last);
        notifiers.list.push((id, range, notifier));
        id
    }

    /// Removes a notifier and hands it back. It is not told that anything goes.
    pub fn remove_notifier(&self, id: IommuNotifierId) -> Option<Box<dyn IommuNotifier>> {
        let mut notifiers = lock(&self.notifiers);
        let at = notifiers.list.iter().position(|(other, ..)| *other == id)?;
        Some(notifiers.list.remove(at).2)
    }

    /// Tells of a new translation, which [`Iommu::translate`] gives already.
    pub fn map(&self, mapping: &IommuMapping) {
        for (_, range, notifier) in &mut lock(&self.notifiers).list {
            if overlaps(range, &mapping.range) {
                notifier.map(mapping);
            }
        }
    }

    /// Tells that `range` (bytes of the region) is translated no more, or differently;
    /// [`Iommu::translate`] says so already. The future is ready once no mapping is left that
    /// was made through the old translation: only then may the guest be told that its
    /// invalidation is complete.
    pub fn unmap(&self, range: Range<u64>) -> impl Future<Output = ()> + Send + use<> {
        for (_, followed, notifier) in &mut lock(&self.notifiers).list {
            if overlaps(followed, &range) {
                notifier.unmap(range.clone());
            }
        }
        let before = lock(&self.flights).next;
        Landed {
            flights: Arc::clone(&self.flights),
            range,
            before,
        }
    }

    /// Translates, for DMA of `len` bytes at `offset`; the translation covers `len` bytes at most.
    pub(crate) fn translate(&self, offset: u64, len: u64, access: Access) -> Option<Translation> {
        let mut translation = self.iommu.translate(offset, access)?;
        let (reads, writes) = (translation.access.reads(), translation.access.writes());
        if access.reads() && !reads || access.writes() && !writes {
            return None;
        }
        translation.len = translation.len.clamp(1, len);
        Some(translation)
    }

    /// Runs `translate` with DMA to `range` counted as under way, and on until the flight is
    /// dropped. Counted first, asked then: an invalidation that the translation does not know
    /// yet waits for the flight.
    pub(crate) fn fly<T>(&self, range: Range<u64>, translate: impl FnOnce() -> T) -> (Flight, T) {
        if seeded!("iommu_late_flight") {
            let translated = translate();
            return (self.depart(range), translated);
        }
        let flight = self.depart(range);
        let translated = translate();
        (flight, translated)
    }

    fn depart(&self, range: Range<u64>) -> Flight {
        let mut flights = lock(&self.flights);
        let id = flights.next;
        flights.next += 1;
        flights.list.push((id, range));
        Flight {
            flights: Arc::clone(&self.flights),
            id,
        }
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flights = lock(&self.flights).list.len();
        f.debug_struct("Domain")
            .field("flights", &flights)
            .finish_non_exhaustive()
    }
}

/// DMA through a translation, until dropped.
pub(crate) struct Flight {
    flights: Arc<Mutex<Flights>>,
    id: u64,
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut flights = lock(&self.flights);
        flights.list.retain(|(id, _)| *id != self.id);
        let waiting = std::mem::take(&mut flights.waiting);
        drop(flights);
        // Outside the lock: a waker may run anything.
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Ready when no flight older than it touches its range.
struct Landed {
    flights: Arc<Mutex<Flights>>,
    range: Range<u64>,
    before: u64,
}

impl Future for Landed {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let waker = cx.waker().clone();
        let mut flights = lock(&self.flights);
        if !flights.any_before(self.before, &self.range) {
            return Poll::Ready(());
        }
        if !flights.waiting.iter().any(|other| other.will_wake(&waker)) {
            flights.waiting.push(waker);
            return Poll::Pending;
        }
        drop(flights);
        // `waker` goes outside the lock: with a waker may go a task, and with it a flight.
        Poll::Pending
    }
}
