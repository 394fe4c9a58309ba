// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What firmware does before it starts an operating system, for a kernel that is started directly: every bus gets a
//! number, every bridge its windows, every BAR an address.
//!
//! Linux keeps what it finds (unless told `pci=realloc`) and gives a function that is plugged later addresses from the
//! windows of the port it is behind, so whatever may come later has to be kept free now: a [`Reservation`]. When all
//! reservations together do not fit, all of them are halved until they do.

use super::bar::{Windows, bar_offset};
use super::bridge::WINDOW_BYTES;
use super::placement::{Extent, Part, Request, extent};
use super::registers::{
    BUS_NUMBERS, COMMAND, MEMORY_BASE, PREFETCHABLE_BASE, PREFETCHABLE_BASE_UPPER,
    PREFETCHABLE_LIMIT_UPPER,
};
use super::{BarKind, Bridge, Bus, Command, Devfn, Function, PciError};

/// How often reservations are halved before room is given up: 1 GiB is then 1 MiB.
const MAX_HALVINGS: u32 = 10;
/// A closed window: the base is above the limit.
const CLOSED: u32 = 0x0000_fff0;

/// What is kept free behind a bridge for functions that are plugged while the guest runs. What is there at boot counts
/// against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Bus numbers, the bridge's own bus included.
    pub buses: u8,
    /// Bytes of addresses for 32-bit BARs.
    pub memory_bytes: u64,
    /// Bytes of addresses for 64-bit prefetchable BARs.
    pub prefetchable_bytes: u64,
}

impl Default for Reservation {
    /// Room for a switch with six ports, for each of which Linux wants 2 MiB for 32-bit BARs, or for one device with a BAR
    /// of 1 GiB.
    fn default() -> Self {
        Self {
            buses: 8,
            memory_bytes: 16 << 20,
            prefetchable_bytes: 1 << 30,
        }
    }
}

impl Reservation {
    fn halved(self, times: u32) -> Self {
        Self {
            buses: (self.buses >> times.min(7)).max(1),
            memory_bytes: (self.memory_bytes >> times).max(WINDOW_BYTES.min(self.memory_bytes)),
            prefetchable_bytes: (self.prefetchable_bytes >> times)
                .max(WINDOW_BYTES.min(self.prefetchable_bytes)),
        }
    }
}

/// Programmes everything on `root` and below. `last_bus` is the highest bus number there is.
pub(super) fn start(root: &Bus, last_bus: u8) -> Result<(), PciError> {
    let mut result = place_root(root);
    let halvings = (0..MAX_HALVINGS).find(|&times| numbers(root, times) <= u32::from(last_bus) + 1);
    let numbering = Numbering {
        last_bus,
        halvings: halvings.unwrap_or(MAX_HALVINGS),
    };
    result = result.and(numbering.assign(root, 0).map(drop));
    program(root);
    for function in root.functions_below() {
        function.settle();
    }
    result
}

/// Gives addresses to everything, with reservations as large as they can be.
fn place_root(root: &Bus) -> Result<(), PciError> {
    let windows = &root.space().windows;
    let mut times = 0;
    loop {
        let mut trial = root.placement().clone();
        let placed = trial.place(windows, true, requests(root, times));
        if placed.is_ok() || times == MAX_HALVINGS {
            *root.placement() = trial;
            return placed.and(place_below(root, times));
        }
        times += 1;
    }
}

/// Gives addresses to what is behind the bridges on `bus`, which have theirs.
fn place_below(bus: &Bus, halvings: u32) -> Result<(), PciError> {
    let mut result = Ok(());
    for (devfn, bridge) in bridges(bus).iter().map(|(devfn, it)| (*devfn, &**it)) {
        let Some(bridge) = bridge.config().bridge() else {
            continue;
        };
        let window = |part| bus.placement().range(devfn, part).unwrap_or(0..0);
        let windows = Windows {
            mmio32: window(Part::Memory),
            mmio64: window(Part::Prefetchable),
            io: 0..0,
        };
        let behind = bridge.bus();
        let requests = requests(behind, halvings);
        let mut placement = behind.placement();
        let mut placed = placement.place(&windows, false, requests.clone());
        if placed.is_err() {
            // Addresses kept from earlier may be in the way of new ones; the windows are large enough for all.
            placement.clear();
            placed = placement.place(&windows, false, requests);
        }
        drop(placement);
        result = result.and(placed).and(place_below(behind, halvings));
    }
    result
}

/// What the functions on `bus` ask for.
fn requests(bus: &Bus, halvings: u32) -> Vec<Request> {
    let mut all = Vec::new();
    for (devfn, function) in bus.shown() {
        all.extend(function.config().bars().into_iter().map(|bar| Request {
            devfn,
            part: Part::Bar(bar.index),
            size_bytes: bar.spec.size_bytes,
            align_bytes: bar.spec.size_bytes,
            kind: bar.spec.kind,
        }));
        if let Some(bridge) = function.config().bridge() {
            all.extend(windows_for(devfn, bridge, halvings));
        }
    }
    all
}

/// The windows a bridge needs: room for what is behind it, and at least what is reserved.
fn windows_for(
    devfn: Devfn,
    bridge: &Bridge,
    halvings: u32,
) -> impl Iterator<Item = Request> + use<> {
    let behind = requests(bridge.bus(), halvings);
    let reserved = bridge.reservation().map(|it| it.halved(halvings));
    let (memory, prefetchable) =
        reserved.map_or((0, 0), |it| (it.memory_bytes, it.prefetchable_bytes));
    let wide = BarKind::Mem64 { prefetchable: true };
    [
        (Part::Memory, BarKind::Mem32, memory),
        (Part::Prefetchable, wide, prefetchable),
    ]
    .into_iter()
    .filter_map(move |(part, kind, reserved)| {
        let needed = extent(&behind, kind.is_prefetchable()).unwrap_or(Extent {
            size_bytes: 0,
            align_bytes: WINDOW_BYTES,
        });
        let size_bytes = needed.size_bytes.max(reserved);
        // A reservation is for BARs as large as itself, which are aligned to their size.
        let align_bytes = match reserved.checked_ilog2() {
            Some(log) => needed.align_bytes.max(1 << log),
            None => needed.align_bytes,
        };
        (size_bytes > 0).then(|| Request {
            devfn,
            part,
            size_bytes: size_bytes
                .checked_next_multiple_of(WINDOW_BYTES)
                .unwrap_or(size_bytes),
            align_bytes: align_bytes.max(WINDOW_BYTES),
            kind,
        })
    })
}

/// How many bus numbers `bus` and everything behind it take.
fn numbers(bus: &Bus, halvings: u32) -> u32 {
    let behind = bridges(bus).into_iter().filter_map(|(_, function)| {
        let bridge = function.config().bridge()?;
        let reserved = bridge
            .reservation()
            .map_or(1, |it| it.halved(halvings).buses);
        Some(numbers(bridge.bus(), halvings).max(reserved.into()))
    });
    behind.fold(1, u32::saturating_add)
}

/// The numbering of buses: depth first, as whoever scans them expects it.
struct Numbering {
    last_bus: u8,
    halvings: u32,
}

impl Numbering {
    /// Numbers everything behind `bus`, which has the number `own`. Returns the last number given out.
    fn assign(&self, bus: &Bus, own: u8) -> Result<u8, PciError> {
        let (mut last, mut result) = (own, Ok(()));
        for (devfn, function) in bridges(bus) {
            let Some(bridge) = function.config().bridge() else {
                continue;
            };
            let Some(secondary) = last.checked_add(1).filter(|&it| it <= self.last_bus) else {
                function.write_config(BUS_NUMBERS, 4, 0);
                result = result.and(Err(PciError::NoBusNumber {
                    name: function.config().gate().name().to_owned(),
                    devfn,
                    last_bus: self.last_bus,
                }));
                continue;
            };
            let reserved = bridge
                .reservation()
                .map_or(1, |it| it.halved(self.halvings).buses);
            let below = self.assign(bridge.bus(), secondary);
            let end = secondary.saturating_add(reserved - 1).min(self.last_bus);
            let subordinate = match below {
                Ok(below) => below.max(end),
                Err(error) => {
                    result = result.and(Err(error));
                    self.last_bus
                }
            };
            let [primary, secondary, subordinate] = [own, secondary, subordinate].map(u32::from);
            let numbers = subordinate << 16 | secondary << 8 | primary;
            function.write_config(BUS_NUMBERS, 4, numbers);
            last = bridge.subordinate();
        }
        result.map(|()| last)
    }
}

/// Writes addresses to the registers of everything on `bus` and behind it.
fn program(bus: &Bus) {
    for (devfn, function) in bus.shown() {
        let placement = bus.placement().clone();
        program_function(&*function, |part| placement.range(devfn, part));
        if let Some(bridge) = function.config().bridge() {
            program(bridge.bus());
        }
    }
}

/// Writes a function's BARs and windows with decoding off, then turns it on: one change of the memory map. Bus mastering
/// is turned on for bridges and left to their drivers for others.
fn program_function(
    function: &dyn Function,
    range_of: impl Fn(Part) -> Option<std::ops::Range<u64>>,
) {
    let command = function.read_config(COMMAND, 2);
    let bars = function.config().bars();
    let decode = bars
        .iter()
        .fold(Command::MEMORY, |bits, bar| bits | bar.spec.kind.enable());
    function.write_config(COMMAND, 2, command & !u32::from(decode));
    for bar in &bars {
        let Some(range) = range_of(Part::Bar(bar.index)) else {
            continue;
        };
        function.write_config(bar_offset(bar.index), 4, range.start as u32);
        if bar.spec.kind.is_64bit() {
            function.write_config(bar_offset(bar.index + 1), 4, (range.start >> 32) as u32);
        }
    }
    let mut enabled = bars
        .iter()
        .fold(0, |bits, bar| bits | bar.spec.kind.enable());
    if function.config().bridge().is_some() {
        let (base, limit) = ends(range_of(Part::Memory));
        function.write_config(MEMORY_BASE, 4, window_bits(base, limit));
        let (base, limit) = ends(range_of(Part::Prefetchable));
        function.write_config(PREFETCHABLE_BASE, 4, window_bits(base, limit));
        function.write_config(PREFETCHABLE_BASE_UPPER, 4, (base >> 32) as u32);
        function.write_config(PREFETCHABLE_LIMIT_UPPER, 4, (limit >> 32) as u32);
        enabled |= Command::MEMORY | Command::MASTER;
    }
    if enabled != 0 {
        function.write_config(COMMAND, 2, command | u32::from(enabled));
    }
}

/// The first and the last address of a window; a closed one has them the wrong way round.
fn ends(window: Option<std::ops::Range<u64>>) -> (u64, u64) {
    match window {
        Some(window) => (window.start, window.end.saturating_sub(1)),
        None => (u64::from(CLOSED) << 16, 0),
    }
}

/// Base in the low half, limit in the high half: bits 31 to 20 of each address.
fn window_bits(base: u64, limit: u64) -> u32 {
    let bits = |address: u64| (address >> 16) as u32 & 0xfff0;
    bits(limit) << 16 | bits(base)
}

fn bridges(bus: &Bus) -> Vec<(Devfn, std::sync::Arc<dyn Function>)> {
    let mut functions = bus.shown();
    functions.retain(|(_, function)| function.config().bridge().is_some());
    functions
}
