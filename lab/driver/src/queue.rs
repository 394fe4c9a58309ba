// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a split virtqueue (virtio 1.3, 2.7), honest by default, hostile on request.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};

use ebbtide_memory::{Access, CachedMap, Gpa, GuestSlice};
use ebbtide_virtio::virtq::{Descriptor, QueueConfig};

use crate::ram::GuestRam;

const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it is.
    pub gpa: Gpa,
    /// Its bytes.
    pub len: u32,
    /// The device writes it; otherwise the device reads it.
    pub writable: bool,
}

impl Part {
    /// A buffer the device reads.
    pub fn readable(gpa: Gpa, len: usize) -> Self {
        Self {
            gpa,
            len: u32::try_from(len).expect("a buffer below 4 GiB"),
            writable: false,
        }
    }

    /// A buffer the device writes.
    pub fn writable(gpa: Gpa, len: usize) -> Self {
        Self {
            writable: true,
            ..Self::readable(gpa, len)
        }
    }

    /// The same bytes as two buffers, the first with `at` bytes.
    pub fn split(self, at: u32) -> [Part; 2] {
        let behind = Gpa(self.gpa.0 + u64::from(at));
        [
            Part { len: at, ..self },
            Part {
                gpa: behind,
                len: self.len - at,
                ..self
            },
        ]
    }
}

/// How a chain is laid out in descriptors. The device must not care.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// One descriptor for each part.
    #[default]
    Direct,
    /// One descriptor, which points to a table with the parts.
    Indirect,
    /// So many direct descriptors, the rest in a table.
    Mixed(usize),
}

/// What the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// First descriptor of the chain.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub written: u32,
}

/// A queue in guest RAM and the driver's books about it.
pub struct DriverQueue {
    ram: GuestRam,
    config: QueueConfig,
    event_idx: bool,
    avail: CachedMap,
    used: CachedMap,
    free: Vec<u16>,
    in_flight: HashMap<u16, InFlight>,
    avail_idx: u16,
    /// The available index at the last [`needs_kick`](Self::needs_kick).
    kicked_idx: u16,
    used_idx: u16,
}

struct InFlight {
    descriptors: Vec<u16>,
    table: Option<(Gpa, usize)>,
}

impl DriverQueue {
    /// Allocates the three rings for `size` descriptors.
    pub fn new(ram: &GuestRam, size: u16, event_idx: bool) -> Self {
        let sizes = QueueConfig {
            size,
            ..QueueConfig::default()
        };
        let config = QueueConfig {
            size,
            desc: ram.alloc(sizes.desc_len(), 16),
            avail: ram.alloc(sizes.avail_len(), 2),
            used: ram.alloc(sizes.used_len(), 4),
        };
        let map = |gpa, len| CachedMap::new(ram.space(), gpa, len, Access::ReadWrite);
        Self {
            ram: ram.clone(),
            config,
            event_idx,
            avail: map(config.avail, config.avail_len()),
            used: map(config.used, config.used_len()),
            free: (0..size).rev().collect(),
            in_flight: HashMap::new(),
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
        }
    }

    /// Gives the rings back, with the indirect tables of chains in flight.
    pub fn free(self) {
        for (_, InFlight { table, .. }) in self.in_flight {
            if let Some((gpa, len)) = table {
                self.ram.free(gpa, len);
            }
        }
        self.ram.free(self.config.desc, self.config.desc_len());
        self.ram.free(self.config.avail, self.config.avail_len());
        self.ram.free(self.config.used, self.config.used_len());
    }

    /// Where the rings are.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// Descriptors left.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Chains the device has.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Writes a chain and makes it available. Returns its head, or `None` when descriptors are short. Kick afterwards.
    ///
    /// # Panics
    /// For a chain without parts, or a table that does not fit guest RAM.
    pub fn add(&mut self, parts: &[Part], layout: Layout) -> Option<u16> {
        assert!(!parts.is_empty(), "a chain has at least one part");
        let direct = match layout {
            Layout::Direct => parts.len(),
            Layout::Indirect => 0,
            Layout::Mixed(direct) => direct.min(parts.len()),
        };
        let (direct, rest) = parts.split_at(direct);
        let needed = direct.len() + usize::from(!rest.is_empty());
        let at = self.free.len().checked_sub(needed)?;
        let descriptors = self.free.split_off(at);
        let table = (!rest.is_empty()).then(|| self.write_table(rest));
        for (at, &index) in descriptors.iter().enumerate() {
            let next = descriptors.get(at + 1).copied();
            let descriptor = match (direct.get(at), table) {
                (Some(part), _) => descriptor(part, next),
                (None, Some((gpa, len))) => Descriptor::new(
                    gpa.0,
                    u32::try_from(len).expect("a small table"),
                    Descriptor::INDIRECT,
                    0,
                ),
                (None, None) => unreachable!("every descriptor has a part or is the table's"),
            };
            self.set_descriptor(index, &descriptor);
        }
        let head = descriptors[0];
        self.in_flight.insert(head, InFlight { descriptors, table });
        self.make_available(head);
        Some(head)
    }

    fn write_table(&self, parts: &[Part]) -> (Gpa, usize) {
        let len = 16 * parts.len();
        let gpa = self.ram.alloc(len, 16);
        for (at, part) in (0u16..).zip(parts) {
            let next = (usize::from(at) + 1 < parts.len()).then_some(at + 1);
            self.ram
                .put(Gpa(gpa.0 + 16 * u64::from(at)), &descriptor(part, next));
        }
        (gpa, len)
    }

    /// Whether the device wants a kick for what was added since this was last asked (2.7.13.4).
    pub fn needs_kick(&mut self) -> bool {
        let (old, new) = (
            std::mem::replace(&mut self.kicked_idx, self.avail_idx),
            self.avail_idx,
        );
        // The index is written, now look whether the device sleeps.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.on_used(|used| used.load_u16(0, Ordering::Relaxed)) & NO_NOTIFY == 0;
        }
        let at = 4 + 8 * usize::from(self.config.size);
        let event = self.on_used(|used| used.load_u16(at, Ordering::Relaxed));
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Takes the next chain the device gave back.
    ///
    /// # Panics
    /// When the device gave back a chain it did not have.
    pub fn poll_used(&mut self) -> Option<Used> {
        let used = self.poll_used_raw()?;
        let Some(InFlight { descriptors, table }) = self.in_flight.remove(&used.head) else {
            panic!(
                "the device gave back chain {}, which it did not have",
                used.head
            );
        };
        self.free.extend(descriptors);
        if let Some((gpa, len)) = table {
            self.ram.free(gpa, len);
        }
        Some(used)
    }

    /// The next used entry, whatever it says, without books: for chains made by hand.
    pub fn poll_used_raw(&mut self) -> Option<Used> {
        if self.device_used_idx() == self.used_idx {
            return None;
        }
        let at = 4 + 8 * usize::from(self.used_idx % self.config.size);
        let id = self.on_used(|used| used.load_u32(at, Ordering::Relaxed));
        let written = self.on_used(|used| used.load_u32(at + 4, Ordering::Relaxed));
        self.used_idx = self.used_idx.wrapping_add(1);
        Some(Used {
            head: u16::try_from(id).expect("a descriptor index"),
            written,
        })
    }

    /// The used ring's index, which the device writes.
    pub fn device_used_idx(&self) -> u16 {
        self.on_used(|used| used.load_u16(2, Ordering::Acquire))
    }

    /// Asks for an interrupt at the next used chain (with event indices), or for all of them (without). True when there
    /// are used chains already, for which none may come.
    pub fn enable_interrupts(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.used_idx);
        } else {
            self.set_avail_flags(0);
        }
        fence(Ordering::SeqCst);
        self.device_used_idx() != self.used_idx
    }

    /// Asks for no interrupts; with event indices, for one as late as possible. An index just behind would be later
    /// still, but it is the one that a device still compares with when its answer has been seen by polling.
    pub fn disable_interrupts(&mut self) {
        if self.event_idx {
            self.set_used_event(self.used_idx.wrapping_add(1 << 15));
        } else {
            self.set_avail_flags(NO_INTERRUPT);
        }
    }

    /// Writes a descriptor as it is.
    pub fn set_descriptor(&self, index: u16, descriptor: &Descriptor) {
        self.ram
            .put(Gpa(self.config.desc.0 + 16 * u64::from(index)), descriptor);
    }

    /// Writes `head` to the available ring and moves the index on by one.
    pub fn make_available(&mut self, head: u16) {
        let at = 4 + 2 * usize::from(self.avail_idx % self.config.size);
        self.on_avail(|avail| avail.store_u16(at, head, Ordering::Relaxed));
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        // Release: the device that sees the index sees the descriptors.
        self.on_avail(|avail| avail.store_u16(2, index, Ordering::Release));
    }

    /// The available index as last written.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Sets the event index for interrupts to anything.
    pub fn set_used_event(&self, event: u16) {
        let at = 4 + 2 * usize::from(self.config.size);
        self.on_avail(|avail| avail.store_u16(at, event, Ordering::Relaxed));
    }

    /// Sets the flags of the available ring to anything.
    pub fn set_avail_flags(&self, flags: u16) {
        self.on_avail(|avail| avail.store_u16(0, flags, Ordering::Relaxed));
    }

    fn on_avail<T>(
        &self,
        f: impl FnOnce(GuestSlice<'_>) -> Result<T, ebbtide_memory::AccessError>,
    ) -> T {
        self.on(&self.avail, f)
    }

    fn on_used<T>(
        &self,
        f: impl FnOnce(GuestSlice<'_>) -> Result<T, ebbtide_memory::AccessError>,
    ) -> T {
        self.on(&self.used, f)
    }

    fn on<T>(
        &self,
        map: &CachedMap,
        f: impl FnOnce(GuestSlice<'_>) -> Result<T, ebbtide_memory::AccessError>,
    ) -> T {
        let space = self.ram.space();
        let reader = space.memory().register();
        let guard = space.read(&reader);
        map.get(&guard)
            .and_then(f)
            .expect("the driver's own ring is in RAM")
    }
}

fn descriptor(part: &Part, next: Option<u16>) -> Descriptor {
    let write = if part.writable { Descriptor::WRITE } else { 0 };
    let flags = write | if next.is_some() { Descriptor::NEXT } else { 0 };
    Descriptor::new(part.gpa.0, part.len, flags, next.unwrap_or(0))
}
