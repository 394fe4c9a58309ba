// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The queue: takes chains from the available ring, gives them back through the used ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use ebbtide_memory::{Access, AccessError, AddressSpace, CachedMap, Gpa, GuestSlice, ReadGuard};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::chain::Chain;
use super::error::{QueueError, Ring};
use super::heads::Heads;
use super::layout::{ELEMENTS, FLAGS, INDEX, NO_INTERRUPT, NO_NOTIFY, QueueConfig};
use super::walk::Table;
use crate::features;

/// An element of the used ring (2.7.8).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct UsedElement {
    id: U32,
    len: U32,
}

/// One ring: its translation and where it is, for errors.
struct Mapped {
    ring: Ring,
    gpa: Gpa,
    map: CachedMap,
}

impl Mapped {
    fn new(space: &Arc<AddressSpace>, ring: Ring, gpa: Gpa, len: usize, access: Access) -> Self {
        Self {
            ring,
            gpa,
            map: CachedMap::new(space, gpa, len, access),
        }
    }

    fn get<'g>(&self, guard: &'g ReadGuard<'_>) -> Result<GuestSlice<'g>, QueueError> {
        self.map.get(guard).map_err(|e| self.error(e))
    }

    fn error(&self, source: AccessError) -> QueueError {
        QueueError::Access {
            ring: self.ring,
            gpa: self.gpa,
            source,
        }
    }
}

/// Everything about a queue that the rings in guest memory do not say themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Size and place.
    pub config: QueueConfig,
    /// Indirect descriptors were negotiated.
    pub indirect: bool,
    /// Event indices were negotiated.
    pub event_idx: bool,
    /// Index of the next chain to take.
    pub next_avail: u16,
    /// Index of the next used entry to write.
    pub next_used: u16,
    /// Used entries published since [`Queue::needs_interrupt`] was last asked.
    pub unsignalled: u32,
}

/// The device side of one split virtqueue. See the [module](super) for how to use it.
///
/// Belongs to one thread at a time (`Send`, not `Sync`).
pub struct Queue {
    config: QueueConfig,
    indirect: bool,
    event_idx: bool,
    descriptors: Mapped,
    avail: Mapped,
    used: Mapped,
    next_avail: u16,
    /// The last available index read; at most `size` ahead of `next_avail`.
    seen_avail: u16,
    /// Index of the next entry to write; those not yet published lie before it.
    next_used: u16,
    /// What the used ring's `idx` says.
    published_used: u16,
    unsignalled: u32,
    heads: Heads,
    broken: bool,
}

impl Queue {
    /// A queue at the start of its life: both indices 0, as the driver initialised its rings.
    ///
    /// `features` are the negotiated ones. Memory is not looked at; [`check`](Self::check) does.
    ///
    /// # Errors
    /// [`QueueError::Size`], [`QueueError::Misaligned`]; [`QueueError::PackedRing`] when that was negotiated.
    pub fn new(
        space: &Arc<AddressSpace>,
        config: QueueConfig,
        features: u64,
    ) -> Result<Queue, QueueError> {
        if features & features::RING_PACKED != 0 {
            return Err(QueueError::PackedRing);
        }
        Self::restore(
            space,
            &QueueState {
                config,
                indirect: features & features::RING_INDIRECT_DESC != 0,
                event_idx: features & features::RING_EVENT_IDX != 0,
                next_avail: 0,
                next_used: 0,
                unsignalled: 0,
            },
        )
    }

    /// The queue that [`save`](Self::save) described, over the same guest memory. Chains that were in flight then are known
    /// by their number only: of those it is not noticed when the driver makes one available again.
    ///
    /// # Errors
    /// [`QueueError::Size`], [`QueueError::Misaligned`]; [`QueueError::State`] for indices that lie further apart than
    /// the queue is long.
    pub fn restore(space: &Arc<AddressSpace>, state: &QueueState) -> Result<Queue, QueueError> {
        let QueueState {
            config,
            indirect,
            event_idx,
            next_avail,
            next_used,
            unsignalled,
        } = *state;
        config.validate()?;
        let in_flight = next_avail.wrapping_sub(next_used);
        if in_flight > config.size {
            return Err(QueueError::State {
                next_avail,
                next_used,
                size: config.size,
            });
        }
        let map = |ring, gpa, len, access| Mapped::new(space, ring, gpa, len, access);
        Ok(Queue {
            config,
            indirect,
            event_idx,
            descriptors: map(
                Ring::Descriptors,
                config.desc,
                config.desc_len(),
                Access::Read,
            ),
            avail: map(
                Ring::Available,
                config.avail,
                config.avail_len(),
                Access::Read,
            ),
            used: map(Ring::Used, config.used, config.used_len(), Access::Write),
            next_avail,
            seen_avail: next_avail,
            next_used,
            published_used: next_used,
            unsignalled,
            heads: Heads::new(config.size, in_flight),
            broken: false,
        })
    }

    /// What is needed to go on with this queue elsewhere. Chains in flight are counted as taken: finish them first.
    pub fn save(&self) -> QueueState {
        QueueState {
            config: self.config,
            indirect: self.indirect,
            event_idx: self.event_idx,
            next_avail: self.next_avail,
            next_used: self.published_used,
            unsignalled: self.unsignalled,
        }
    }

    /// Size and place of the queue.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// Chains taken and not given back.
    pub fn in_flight(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }

    /// Checks that all three rings lie in guest RAM right now.
    ///
    /// # Errors
    /// [`QueueError::Access`] names the first that does not.
    pub fn check(&self, guard: &ReadGuard<'_>) -> Result<(), QueueError> {
        self.descriptors.get(guard)?;
        self.avail.get(guard)?;
        self.used.get(guard)?;
        Ok(())
    }

    /// The next chain the driver made available, or `None` when there is none.
    ///
    /// # Errors
    /// Anything the driver did wrong. The queue is broken from then on: every later call fails too.
    pub fn pop(&mut self, guard: &ReadGuard<'_>) -> Result<Option<Chain>, QueueError> {
        let mut chain = Chain::new(0);
        let popped = self.pop_into(guard, &mut chain)?;
        Ok(popped.then_some(chain))
    }

    /// As [`pop`](Self::pop), into a chain that is used again: for who takes many. False: there was none, and what `chain`
    /// is now means nothing.
    ///
    /// # Errors
    /// As there.
    pub fn pop_into(
        &mut self,
        guard: &ReadGuard<'_>,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        self.guarded(|queue| queue.take(guard, chain))
    }

    /// Writes a used entry: the chain `head` is done and the device wrote `written` bytes, from the start of its
    /// writable buffers. The driver does not see it before [`publish_used`](Self::publish_used).
    ///
    /// # Errors
    /// [`QueueError::NotInFlight`] for a chain the queue has not handed out, or has got back; [`QueueError::Access`].
    pub fn add_used(
        &mut self,
        guard: &ReadGuard<'_>,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.guarded(|queue| queue.put(guard, head, written))
    }

    /// Lets the driver see all used entries written so far.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn publish_used(&mut self, guard: &ReadGuard<'_>) -> Result<(), QueueError> {
        self.guarded(|queue| queue.publish(guard))
    }

    /// [`add_used`](Self::add_used) and [`publish_used`](Self::publish_used) for one chain.
    ///
    /// # Errors
    /// As those two.
    pub fn push_used(
        &mut self,
        guard: &ReadGuard<'_>,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.add_used(guard, head, written)?;
        self.publish_used(guard)
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked (2.7.7, 2.7.10).
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn needs_interrupt(&mut self, guard: &ReadGuard<'_>) -> Result<bool, QueueError> {
        self.guarded(|queue| queue.wants_interrupt(guard))
    }

    /// Asks for kicks again. True: the driver made chains available that it may not have kicked for; take them first.
    ///
    /// # Errors
    /// [`QueueError::Access`], [`QueueError::AvailIndexJump`].
    pub fn enable_kick(&mut self, guard: &ReadGuard<'_>) -> Result<bool, QueueError> {
        self.guarded(|queue| queue.request_kick(guard))
    }

    /// Tells the driver that kicks are of no use for now. A hint: kicks may still come.
    ///
    /// # Errors
    /// [`QueueError::Access`].
    pub fn disable_kick(&mut self, guard: &ReadGuard<'_>) -> Result<(), QueueError> {
        if self.event_idx {
            // The event index left behind by enable_kick lies in the past, which says it already.
            return Ok(());
        }
        self.guarded(|queue| queue.store_used_u16(guard, FLAGS, NO_NOTIFY, Ordering::Relaxed))
    }

    /// Runs `f` unless the queue is broken, and breaks it when `f` fails.
    fn guarded<T>(
        &mut self,
        f: impl FnOnce(&mut Self) -> Result<T, QueueError>,
    ) -> Result<T, QueueError> {
        if self.broken {
            return Err(QueueError::Broken);
        }
        let result = f(self);
        self.broken = result.is_err();
        result
    }

    fn take(&mut self, guard: &ReadGuard<'_>, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.seen_avail == self.next_avail && !self.look_at_avail(guard)? {
            return Ok(false);
        }
        let size = self.config.size;
        if self.in_flight() >= size {
            return Err(QueueError::TooManyInFlight { size });
        }
        let element = self.config.avail_element(self.next_avail);
        // Ordered behind the index by the acquire load in look_at_avail.
        let head = self
            .avail
            .get(guard)?
            .load_u16(element, Ordering::Relaxed)
            .map_err(|e| self.avail.error(e))?;
        let table = Table {
            descriptors: self.descriptors.get(guard)?,
            gpa: self.config.desc,
            size,
            indirect: self.indirect,
        };
        table.read(guard, head, chain)?;
        if !self.heads.insert(head) {
            return Err(QueueError::HeadInFlight { head });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Reads the available index; true when chains are waiting.
    fn look_at_avail(&mut self, guard: &ReadGuard<'_>) -> Result<bool, QueueError> {
        let index = self
            .avail
            .get(guard)?
            .load_u16(INDEX, Ordering::Acquire)
            .map_err(|e| self.avail.error(e))?;
        let (next, size) = (self.next_avail, self.config.size);
        if index.wrapping_sub(next) > size {
            return Err(QueueError::AvailIndexJump { index, next, size });
        }
        self.seen_avail = index;
        Ok(index != next)
    }

    fn put(&mut self, guard: &ReadGuard<'_>, head: u16, written: u32) -> Result<(), QueueError> {
        let (size, in_flight) = (self.config.size, self.in_flight());
        if head >= size || in_flight == 0 || !self.heads.remove(head) {
            return Err(QueueError::NotInFlight {
                head,
                size,
                in_flight,
            });
        }
        let element = UsedElement {
            id: u32::from(head).into(),
            len: written.into(),
        };
        self.used
            .get(guard)?
            .write(self.config.used_element(self.next_used), element)
            .map_err(|e| self.used.error(e))?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    fn publish(&mut self, guard: &ReadGuard<'_>) -> Result<(), QueueError> {
        let added = self.next_used.wrapping_sub(self.published_used);
        if added == 0 {
            return Ok(());
        }
        // Release: a driver that sees the index sees the entries, and the data written before them.
        self.store_used_u16(guard, INDEX, self.next_used, Ordering::Release)?;
        self.published_used = self.next_used;
        self.unsignalled = self.unsignalled.saturating_add(u32::from(added));
        Ok(())
    }

    fn wants_interrupt(&mut self, guard: &ReadGuard<'_>) -> Result<bool, QueueError> {
        let unsignalled = std::mem::take(&mut self.unsignalled);
        if unsignalled == 0 {
            return Ok(false);
        }
        // The driver writes its wish, then looks at the used index; we wrote the index and now look at the wish. One of
        // the two must see the other's (2.7.10).
        fence(Ordering::SeqCst);
        let avail = self.avail.get(guard)?;
        let load = |offset| {
            avail
                .load_u16(offset, Ordering::Relaxed)
                .map_err(|e| self.avail.error(e))
        };
        if !self.event_idx {
            return Ok(load(FLAGS)? & NO_INTERRUPT == 0);
        }
        // The event is among the last `unsignalled` entries; with as many as there are indices, always.
        let behind = self
            .published_used
            .wrapping_sub(load(self.config.used_event())?)
            .wrapping_sub(1);
        Ok(u32::from(behind) < unsignalled)
    }

    fn request_kick(&mut self, guard: &ReadGuard<'_>) -> Result<bool, QueueError> {
        if self.event_idx {
            self.store_used_u16(
                guard,
                self.config.avail_event(),
                self.next_avail,
                Ordering::Relaxed,
            )?;
        } else {
            self.store_used_u16(guard, FLAGS, 0, Ordering::Relaxed)?;
        }
        // The mirror image of wants_interrupt.
        fence(Ordering::SeqCst);
        self.look_at_avail(guard)
    }

    fn store_used_u16(
        &self,
        guard: &ReadGuard<'_>,
        offset: usize,
        value: u16,
        order: Ordering,
    ) -> Result<(), QueueError> {
        self.used
            .get(guard)?
            .store_u16(offset, value, order)
            .map_err(|e| self.used.error(e))
    }
}

// The element offsets of layout.rs and the structure above describe the same ring.
const _: () = assert!(size_of::<UsedElement>() == super::layout::USED_ELEMENT && ELEMENTS == 4);
