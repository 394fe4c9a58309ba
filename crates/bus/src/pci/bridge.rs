// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a type 1 header adds to a function (PCI-to-PCI Bridge 1.2, 3): a bus behind it, the bus numbers it answers for and
//! the address windows it forwards.
//!
//! A bridge's bus has a memory container of its own, in which a BAR is at the address the guest wrote. The bridge shows
//! two parts of it, its windows, in the container of the bus above, by aliases at the same addresses:
//!
//! ```text
//! bus 0      |------[ memory window ]--------[ prefetchable window ]------|
//!                    |  alias          |      |  alias              |
//! bus 1      |-------[BAR]--[BAR]------------------[BAR]------------------|
//! ```
//!
//! So what is shown of a BAR is what all the windows above it cover, and moving a window is moving two aliases, however
//! many functions are below. There is no I/O window: the base and limit registers read zero, which is how a bridge says so,
//! and a function with an I/O BAR is refused behind it.
//!
//! Interrupt pins behind it lead to its own four, rotated by slot (9.1), and from there on as if it drove them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::{Error, Region};

use super::bar::{BAR_PRIORITY, BarSpace};
use super::registers::{
    BRIDGE_CONTROL, BUS_NUMBERS, MEMORY_BASE, PREFETCHABLE_BASE, PREFETCHABLE_BASE_UPPER,
    PREFETCHABLE_LIMIT_UPPER, Registers, SECONDARY_STATUS, STATUS_ERRORS,
};
use super::{Bus, Reservation};

/// HEADER_TYPE of a bridge.
pub(super) const HEADER_BRIDGE: u8 = 1;
/// Windows begin and end at multiples of this.
pub(super) const WINDOW_BYTES: u64 = 1 << 20;
/// The low bits of the prefetchable base and limit: 64 bits wide.
const WIDE: u16 = 1;
/// Address bits in a base or limit register.
const ADDRESS_BITS: u16 = 0xfff0;
/// BRIDGE_CONTROL bits a guest may set: parity response, SERR#, master abort mode. A secondary bus reset is not offered:
/// requests in flight below would have to be waited for.
const CONTROL_WRITABLE: u16 = 1 << 5 | 1 << 1 | 1;

/// The secondary side of a bridge.
pub struct Bridge {
    bus: Arc<Bus>,
    /// The bus number registers as a dword: primary, secondary, subordinate. Apart from the registers, so that routing a
    /// request takes no lock of a bridge on its way.
    numbers: AtomicU32,
    reservation: Option<Reservation>,
    shown: Mutex<[Option<Shown>; 2]>,
}

/// A window in the map.
struct Shown {
    range: Range<u64>,
    alias: Arc<Region>,
}

/// The way of requests from a bus to memory: whether each bridge on it is bus master.
pub(super) enum Upstream {
    /// Of the root bus: there is memory.
    Memory,
    /// Of a bridge's bus.
    Bridge {
        master: AtomicBool,
        /// That of the bus the bridge is on, if it is on one.
        above: Mutex<Option<Arc<Upstream>>>,
    },
}

impl Upstream {
    /// That of a bridge that is not master and on no bus yet.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self::Bridge {
            master: AtomicBool::new(false),
            above: Mutex::default(),
        })
    }

    /// Whether it leads to the root: every bridge on it is on a bus.
    pub(super) fn is_connected(&self) -> bool {
        match self {
            Self::Memory => true,
            Self::Bridge { above, .. } => lock(above)
                .as_ref()
                .is_some_and(|above| above.is_connected()),
        }
    }

    /// Whether a request gets through.
    pub(super) fn is_open(&self) -> bool {
        match self {
            Self::Memory => true,
            Self::Bridge { master, above } => {
                let above = || lock(above).as_ref().is_some_and(|above| above.is_open());
                master.load(Ordering::Acquire) && above()
            }
        }
    }
}

impl Bridge {
    pub(super) fn new(bus: Arc<Bus>, reservation: Option<Reservation>) -> Self {
        Self {
            bus,
            numbers: AtomicU32::new(0),
            reservation,
            shown: Mutex::default(),
        }
    }

    /// The bus behind it.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// The number of the bus behind it; 0 until somebody gave it one.
    pub fn secondary(&self) -> u8 {
        self.number(1)
    }

    /// The highest bus number behind it.
    pub fn subordinate(&self) -> u8 {
        self.number(2)
    }

    /// What is kept free behind it for functions that come later.
    pub fn reservation(&self) -> Option<Reservation> {
        self.reservation
    }

    /// Whether configuration requests for bus `number` go through it.
    pub(super) fn leads_to(&self, number: u8) -> bool {
        let secondary = self.secondary();
        secondary != 0 && (secondary..=self.subordinate()).contains(&number)
    }

    fn number(&self, byte: u32) -> u8 {
        (self.numbers.load(Ordering::Acquire) >> (8 * byte)) as u8
    }

    /// The registers of a type 1 header that a type 0 header lacks.
    pub(super) fn define(registers: &mut Registers) {
        registers.define(BUS_NUMBERS, &[0; 4], &[0xff, 0xff, 0xff, 0]);
        registers.define_write_one_clears(SECONDARY_STATUS, &STATUS_ERRORS.to_le_bytes());
        let address = ADDRESS_BITS.to_le_bytes();
        let wide = WIDE.to_le_bytes();
        // The windows are closed: bases at the top, limits at the bottom.
        let closed = (ADDRESS_BITS | WIDE).to_le_bytes();
        registers.define(MEMORY_BASE, &address, &address);
        registers.define(MEMORY_BASE + 2, &[0; 2], &address);
        registers.define(PREFETCHABLE_BASE, &closed, &address);
        registers.define(PREFETCHABLE_BASE + 2, &wide, &address);
        registers.define(PREFETCHABLE_BASE_UPPER, &[0xff; 4], &[0xff; 4]);
        registers.define(PREFETCHABLE_LIMIT_UPPER, &[0; 4], &[0xff; 4]);
        registers.define(BRIDGE_CONTROL, &[0; 2], &CONTROL_WRITABLE.to_le_bytes());
    }

    /// Takes over bus numbers and whether requests from below are forwarded.
    pub(super) fn route(&self, registers: &Registers, master: bool) {
        self.numbers
            .store(registers.read(BUS_NUMBERS, 4), Ordering::Release);
        if let Upstream::Bridge { master: is, .. } = &*self.bus.space().upstream {
            is.store(master, Ordering::Release);
        }
    }

    /// Says which bus the bridge is on.
    pub(super) fn connect(&self, to: Option<Arc<Upstream>>) {
        if let Upstream::Bridge { above, .. } = &*self.bus.space().upstream {
            *lock(above) = to;
        }
    }

    /// Makes the map of `space`, the bus above, show the windows the registers say. What the map refuses stays hidden.
    pub(super) fn follow(
        &self,
        space: &BarSpace,
        registers: &Registers,
        decode: bool,
    ) -> Result<(), Error> {
        let wanted = windows(registers).map(|window| window.filter(|_| decode));
        let mut shown = lock(&self.shown);
        if shown
            .iter()
            .zip(&wanted)
            .all(|(is, to)| is.as_ref().map(|it| &it.range) == to.as_ref())
        {
            return Ok(());
        }
        let result = self.show(space, &mut shown, &wanted);
        if result.is_err() {
            // Nothing was changed. What is no longer wanted goes in any case.
            self.show(space, &mut shown, &[None, None])?;
        }
        result
    }

    /// Takes the windows out of the map.
    pub(super) fn hide(&self, space: &BarSpace) -> Result<(), Error> {
        self.show(space, &mut lock(&self.shown), &[None, None])
    }

    fn show(
        &self,
        space: &BarSpace,
        shown: &mut [Option<Shown>; 2],
        wanted: &[Option<Range<u64>>; 2],
    ) -> Result<(), Error> {
        let container = &self.bus.space().container;
        let next = wanted.clone().map(|range| {
            let range = range?;
            let size = range.end - range.start;
            let alias = Region::alias(
                format!("{}-window", container.name()),
                container,
                range.start,
                size,
            );
            Some(Shown { range, alias })
        });
        space.memory.update(|change| {
            for old in shown.iter().flatten() {
                change.remove(&old.alias)?;
            }
            for new in next.iter().flatten() {
                change.add(&space.container, &new.alias, new.range.start, BAR_PRIORITY)?;
            }
            Ok(())
        })?;
        *shown = next;
        Ok(())
    }
}

/// The memory window and the prefetchable window; one whose limit is below its base is closed.
pub(super) fn windows(registers: &Registers) -> [Option<Range<u64>>; 2] {
    let low = |register| u64::from(registers.read_u16(register) & ADDRESS_BITS) << 16;
    let high = |register| u64::from(registers.read(register, 4)) << 32;
    let window = |base: u64, limit: u64| {
        let last = limit | (WINDOW_BYTES - 1);
        (base <= last).then(|| base..last.saturating_add(1))
    };
    [
        window(low(MEMORY_BASE), low(MEMORY_BASE + 2)),
        window(
            high(PREFETCHABLE_BASE_UPPER) | low(PREFETCHABLE_BASE),
            high(PREFETCHABLE_LIMIT_UPPER) | low(PREFETCHABLE_BASE + 2),
        ),
    ]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
