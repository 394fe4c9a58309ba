// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Base address registers (PCI 3.0, 6.2.5) and where they show up in the memory map.

use std::ops::Range;
use std::sync::Arc;

use ebbtide_memory::{Error, Memory, Region, Transaction};

use super::Command;
use super::bridge::Upstream;
use super::registers::{BAR0, Registers};

/// How many BARs a type 0 header has, and a type 1 header.
pub(super) const BAR_COUNT: u8 = 6;
pub(super) const BRIDGE_BAR_COUNT: u8 = 2;
/// The smallest memory BAR: a page, so that no two devices share one.
const MIN_SIZE_BYTES: u64 = 4096;
/// I/O BARs: what their two low bits leave, and what a PC's device may take at most (PCI 3.0, 6.2.5.1).
const IO_SIZES_BYTES: std::ops::RangeInclusive<u64> = 4..=256;
/// All BARs and windows have the same place in the map's order: where two overlap, either may win.
pub(super) const BAR_PRIORITY: i32 = 0;

/// The address ranges a host bridge forwards to its bus. A BAR outside of them is not decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB, for 32-bit BARs.
    pub mmio32: Range<u64>,
    /// Above all RAM, for 64-bit prefetchable BARs.
    pub mmio64: Range<u64>,
    /// I/O ports, for I/O BARs; below 64 KiB, empty when there are none.
    pub io: Range<u64>,
}

impl Windows {
    fn contain(&self, start: u64, spec: &BarSpec) -> bool {
        let Some(end) = start.checked_add(spec.size_bytes) else {
            return false;
        };
        let windows = match spec.kind {
            BarKind::Io => [&self.io, &self.io],
            BarKind::Mem32 | BarKind::Mem64 { .. } => [&self.mmio32, &self.mmio64],
        };
        windows
            .into_iter()
            .any(|window| window.start <= start && end <= window.end)
    }
}

/// Width and attributes of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32 bits, not prefetchable.
    Mem32,
    /// 64 bits; takes the next BAR's dword too.
    Mem64 {
        /// Reading has no side effects; such a BAR is placed above 4 GiB.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

impl BarKind {
    /// The read-only low bits of the register.
    fn type_bits(self) -> u32 {
        match self {
            Self::Mem32 => 0,
            Self::Io => 1,
            Self::Mem64 {
                prefetchable: false,
            } => 4,
            Self::Mem64 { prefetchable: true } => 12,
        }
    }

    /// Whether it belongs into a prefetchable window.
    pub(super) fn is_prefetchable(self) -> bool {
        matches!(self, Self::Mem64 { prefetchable: true })
    }

    /// The bit of COMMAND that has it decoded.
    pub fn enable(self) -> u16 {
        match self {
            Self::Io => Command::IO,
            Self::Mem32 | Self::Mem64 { .. } => Command::MEMORY,
        }
    }

    /// Whether it takes two dwords.
    pub fn is_64bit(self) -> bool {
        matches!(self, Self::Mem64 { .. })
    }
}

/// What a BAR asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// A power of two. Memory: at least 4096; at most 2 GiB in 32 bits. I/O: 4 to 256.
    pub size_bytes: u64,
    /// Width and attributes.
    pub kind: BarKind,
}

impl BarSpec {
    /// What is wrong with a BAR of this kind as number `index` of `count`.
    pub(super) fn fault(&self, index: u8, count: u8) -> Option<&'static str> {
        if index >= count - u8::from(self.kind.is_64bit()) {
            Some("there is no such bar")
        } else if self.kind == BarKind::Io {
            (!self.size_bytes.is_power_of_two() || !IO_SIZES_BYTES.contains(&self.size_bytes))
                .then_some("the size of an i/o bar must be a power of two from 4 to 256")
        } else if !self.size_bytes.is_power_of_two() || self.size_bytes < MIN_SIZE_BYTES {
            Some("the size must be a power of two of at least 4096")
        } else if !self.kind.is_64bit() && self.size_bytes > 1 << 31 {
            Some("the size must fit a 32-bit bar")
        } else {
            None
        }
    }

    /// Defines the registers: writable address bits, which is all the sizing protocol needs, and read-only type bits.
    pub(super) fn define(&self, index: u8, registers: &mut Registers) {
        let writable = !(self.size_bytes.wrapping_sub(1));
        let (low, high) = (writable as u32, (writable >> 32) as u32);
        registers.define(
            bar_offset(index),
            &self.kind.type_bits().to_le_bytes(),
            &low.to_le_bytes(),
        );
        if self.kind.is_64bit() {
            registers.define(bar_offset(index + 1), &[0; 4], &high.to_le_bytes());
        }
    }
}

/// Offset of BAR `index` in configuration space.
pub(super) fn bar_offset(index: u8) -> u16 {
    BAR0 + 4 * u16::from(index)
}

/// A BAR as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Its number, 0 to 5.
    pub index: u8,
    /// What it asks for.
    pub spec: BarSpec,
    /// What the guest wrote, type bits off.
    pub address: u64,
    /// Whether it is in the map of memory or ports, at `address`.
    pub mapped: bool,
}

/// One BAR of a function.
pub(super) struct Bar {
    pub(super) index: u8,
    pub(super) spec: BarSpec,
    pub(super) region: Arc<Region>,
    /// Where it is in the map.
    pub(super) mapped: Option<u64>,
    /// Where it was when it was taken out of the map for good.
    pub(super) left: Option<u64>,
}

impl Bar {
    /// What the registers say, type bits off.
    pub(super) fn address(&self, registers: &Registers) -> u64 {
        let offset = bar_offset(self.index);
        let low = u64::from(registers.read(offset, 4));
        let high = if self.spec.kind.is_64bit() {
            u64::from(registers.read(offset + 4, 4))
        } else {
            0
        };
        (high << 32 | low) & !(self.spec.size_bytes.wrapping_sub(1))
    }

    /// Where it should be in the map. The all-ones pattern of the sizing protocol and everything else that no window
    /// holds is nowhere.
    fn wanted(&self, registers: &Registers, windows: &Windows) -> Option<u64> {
        let address = self.address(registers);
        windows.contain(address, &self.spec).then_some(address)
    }
}

/// Where the BARs of a bus are put.
#[derive(Clone)]
pub(super) struct BarSpace {
    pub(super) memory: Arc<Memory>,
    /// Guest-physical address 0 is at its offset 0.
    pub(super) container: Arc<Region>,
    /// The container of the root bus.
    pub(super) root: Arc<Region>,
    /// Port 0 is at its offset 0. Only the root bus has I/O BARs in it: bridges forward no ports.
    pub(super) io_container: Arc<Region>,
    /// What the host bridge forwards; bridges on the way may forward less, and forward no ports.
    pub(super) windows: Windows,
    /// The way of requests to memory.
    pub(super) upstream: Arc<Upstream>,
}

/// A BAR that has to move.
#[derive(Clone, Copy)]
struct Move {
    at: usize,
    to: Option<u64>,
}

impl BarSpace {
    /// Puts the BARs' regions into the container, hidden.
    pub(super) fn adopt(&self, bars: &mut [Bar]) -> Result<(), Error> {
        self.memory.update(|change| {
            for bar in bars.iter() {
                change.set_enabled(&bar.region, false)?;
                let container = match bar.spec.kind {
                    BarKind::Io => &self.io_container,
                    BarKind::Mem32 | BarKind::Mem64 { .. } => &self.container,
                };
                change.add(container, &bar.region, 0, BAR_PRIORITY)?;
            }
            Ok(())
        })?;
        for bar in bars {
            (bar.mapped, bar.left) = (None, None);
        }
        Ok(())
    }

    /// Takes the BARs' regions out of the container.
    pub(super) fn release(&self, bars: &mut [Bar]) -> Result<(), Error> {
        self.memory
            .update(|change| bars.iter().try_for_each(|bar| change.remove(&bar.region)))?;
        bars.iter_mut().for_each(|bar| bar.left = bar.mapped.take());
        Ok(())
    }

    /// Makes the map show what the registers say, in one change. When the map refuses that, the BARs it refuses stay
    /// unmapped, the others are mapped, and the last refusal is returned.
    pub(super) fn follow(
        &self,
        bars: &mut [Bar],
        registers: &Registers,
        command: Command,
    ) -> Result<(), Error> {
        let moves: Vec<Move> = bars
            .iter()
            .enumerate()
            .map(|(at, bar)| Move {
                at,
                to: bar
                    .wanted(registers, &self.windows)
                    .filter(|_| command.0 & bar.spec.kind.enable() != 0),
            })
            .filter(|step| bars.get(step.at).is_some_and(|bar| bar.mapped != step.to))
            .collect();
        if moves.is_empty() || self.apply(bars, &moves).is_ok() {
            return Ok(());
        }
        let hides: Vec<Move> = moves
            .iter()
            .map(|step| Move {
                at: step.at,
                to: None,
            })
            .collect();
        let mut result = self.apply(bars, &hides);
        for step in moves.iter().filter(|step| step.to.is_some()) {
            let applied = self.apply(bars, &[*step]);
            result = result.and(applied);
        }
        result
    }

    fn apply(&self, bars: &mut [Bar], moves: &[Move]) -> Result<(), Error> {
        self.memory.update(|change| {
            for step in moves {
                if let Some(bar) = bars.get(step.at) {
                    place(change, bar, step.to)?;
                }
            }
            Ok(())
        })?;
        for step in moves {
            if let Some(bar) = bars.get_mut(step.at) {
                bar.mapped = step.to;
            }
        }
        Ok(())
    }
}

fn place(change: &mut Transaction<'_>, bar: &Bar, to: Option<u64>) -> Result<(), Error> {
    match to {
        Some(address) => {
            change.set_offset(&bar.region, address)?;
            change.set_enabled(&bar.region, true)
        }
        None => change.set_enabled(&bar.region, false),
    }
}
