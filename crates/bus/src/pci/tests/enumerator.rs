// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An operating system's view of the hierarchy, made as Linux makes it: depth-first scan that keeps the bus numbers it
//! finds and gives out those it lacks, then a check that every BAR is where all bridges above it lead.

use std::ops::Range;

use super::*;

/// A function found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) at: At,
    pub(super) ids: u32,
    /// Address ranges of its BARs.
    pub(super) bars: Vec<Range<u64>>,
    /// What of a bridge is behind it.
    pub(super) behind: Option<Behind>,
}

/// What a bridge leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Behind {
    pub(super) buses: (u8, u8),
    pub(super) windows: [Option<Range<u64>>; 2],
    pub(super) functions: Vec<Found>,
}

/// Scans bus `bus` and what is behind it; `limit` is the last bus number it may use.
pub(super) fn scan(machine: &Machine, bus: u8, limit: u8) -> Vec<Found> {
    let mut found = Vec::new();
    for slot in 0..32 {
        let first = At(bus, slot << 3);
        if first.read(machine, 0, 4) == u32::MAX {
            continue;
        }
        let several = first.read(machine, 0x0e, 1) & 0x80 != 0;
        for function in 0..if several { 8 } else { 1 } {
            let at = At(bus, slot << 3 | function);
            let ids = at.read(machine, 0, 4);
            if ids != u32::MAX {
                found.push(Found {
                    at,
                    ids,
                    bars: bars(machine, at),
                    behind: None,
                });
            }
        }
    }
    // Bridges that have numbers first: what is free is known only then.
    let mut last = bus;
    for with_numbers in [true, false] {
        for function in &mut found {
            let at = function.at;
            if at.read(machine, 0x0e, 1) & 0x7f != 1 {
                continue;
            }
            let numbers = at.read(machine, 0x18, 4);
            if (numbers >> 8 & 0xff != 0) != with_numbers {
                continue;
            }
            if !with_numbers {
                let next = last + 1;
                assert!(next <= limit, "no bus number for {at:?}");
                let numbers = u32::from(limit) << 16 | u32::from(next) << 8 | u32::from(bus);
                at.write(machine, 0x18, 4, numbers);
            }
            let numbers = at.read(machine, 0x18, 4);
            let (secondary, mut subordinate) = ((numbers >> 8) as u8, (numbers >> 16) as u8);
            assert_eq!(numbers as u8, bus, "primary bus of {at:?}");
            assert!(
                bus < secondary && secondary <= subordinate && subordinate <= limit,
                "{at:?}: {numbers:#x}"
            );
            let functions = scan(machine, secondary, subordinate);
            if !with_numbers {
                let used = functions
                    .iter()
                    .filter_map(|it| Some(it.behind.as_ref()?.buses.1));
                subordinate = used.max().unwrap_or(secondary);
                at.write(machine, 0x1a, 1, subordinate.into());
            }
            last = last.max(subordinate);
            function.behind = Some(Behind {
                buses: (secondary, subordinate),
                windows: windows(machine, at),
                functions,
            });
        }
    }
    check_numbers(&found);
    found
}

fn check_numbers(found: &[Found]) {
    let mut ranges: Vec<_> = found
        .iter()
        .filter_map(|it| Some(it.behind.as_ref()?.buses))
        .collect();
    ranges.sort_unstable();
    assert!(
        ranges.windows(2).all(|pair| pair[0].1 < pair[1].0),
        "{ranges:?}"
    );
}

/// Sizes the BARs with decoding off, as Linux does.
fn bars(machine: &Machine, at: At) -> Vec<Range<u64>> {
    let command = at.read(machine, 4, 2);
    at.write(machine, 4, 2, command & !2);
    let count = if at.read(machine, 0x0e, 1) & 0x7f == 1 {
        2
    } else {
        6
    };
    let (mut found, mut index) = (Vec::new(), 0);
    while index < count {
        let (size, wide) = size(machine, at, index);
        if size != 0 {
            let address = address(machine, at, index);
            found.push(address..address + size);
        }
        index += 1 + u64::from(wide);
    }
    at.write(machine, 4, 2, command);
    found
}

/// A BAR's size and whether it has 64 bits.
pub(super) fn size(machine: &Machine, at: At, index: u64) -> (u64, bool) {
    let register = 0x10 + 4 * index;
    let sized = |register| {
        let was = at.read(machine, register, 4);
        at.write(machine, register, 4, u32::MAX);
        let ones = at.read(machine, register, 4);
        at.write(machine, register, 4, was);
        ones
    };
    let low = sized(register);
    let wide = low & 6 == 4;
    let high = if wide { sized(register + 4) } else { u32::MAX };
    let ones = u64::from(high) << 32 | u64::from(low & !15);
    (if low == 0 { 0 } else { ones.wrapping_neg() }, wide)
}

/// What a BAR says.
pub(super) fn address(machine: &Machine, at: At, index: u64) -> u64 {
    let low = u64::from(at.read(machine, 0x10 + 4 * index, 4));
    let high = if low & 6 == 4 {
        u64::from(at.read(machine, 0x14 + 4 * index, 4))
    } else {
        0
    };
    high << 32 | low & !15
}

/// A bridge's windows.
pub(super) fn windows(machine: &Machine, at: At) -> [Option<Range<u64>>; 2] {
    let pair = |register: u64, upper: [u64; 2]| {
        let both = u64::from(at.read(machine, register, 4));
        let base = upper[0] << 32 | (both & 0xfff0) << 16;
        let limit = upper[1] << 32 | both & 0xfff0_0000 | 0xf_ffff;
        (base <= limit).then(|| base..limit + 1)
    };
    let upper = [0x28, 0x2c].map(|register| u64::from(at.read(machine, register, 4)));
    assert_eq!(
        at.read(machine, 0x24, 4) & 0x000f_000f,
        0x0001_0001,
        "64 bits"
    );
    assert_eq!(at.read(machine, 0x1c, 2), 0, "no I/O window");
    [pair(0x20, [0, 0]), pair(0x24, upper)]
}

/// Everything on a bus lies in `windows` and apart, and so for the buses behind it.
pub(super) fn check_resources(found: &[Found], windows: &[Range<u64>]) {
    let mut taken: Vec<Range<u64>> = Vec::new();
    for function in found {
        taken.extend(function.bars.iter().cloned());
        let behind = function.behind.iter();
        taken.extend(behind.flat_map(|it| it.windows.iter().flatten().cloned()));
    }
    for range in &taken {
        assert!(
            windows
                .iter()
                .any(|it| it.start <= range.start && range.end <= it.end),
            "{range:#x?} is in none of {windows:#x?}"
        );
    }
    taken.sort_by_key(|range| range.start);
    assert!(
        taken.windows(2).all(|pair| pair[0].end <= pair[1].start),
        "{taken:#x?}"
    );
    for behind in found.iter().filter_map(|it| it.behind.as_ref()) {
        let windows: Vec<_> = behind.windows.iter().flatten().cloned().collect();
        check_resources(&behind.functions, &windows);
    }
}

/// All functions of a tree, flat.
pub(super) fn flat(found: &[Found]) -> Vec<&Found> {
    found
        .iter()
        .flat_map(|it| {
            let behind = it.behind.as_ref().map_or(&[][..], |it| &it.functions);
            std::iter::once(it).chain(flat(behind))
        })
        .collect()
}

/// Gives the BARs of a function addresses from its port's windows and turns decoding on, as Linux does after a hot-plug.
/// Returns where a BAR is.
pub(super) fn place(machine: &Machine, at: At, windows: &[Option<Range<u64>>; 2]) -> Vec<u64> {
    let mut next = windows.clone().map(|it| it.map_or(0, |it| it.start));
    let (mut placed, mut index) = (Vec::new(), 0);
    while index < 6 {
        let (size, wide) = size(machine, at, index);
        if size != 0 {
            let kind = at.read(machine, 0x10 + 4 * index, 4) >> 3 & 1;
            let address = next[kind as usize].next_multiple_of(size);
            next[kind as usize] = address + size;
            at.write(machine, 0x10 + 4 * index, 4, address as u32);
            if wide {
                at.write(machine, 0x14 + 4 * index, 4, (address >> 32) as u32);
            }
            placed.push(address);
        }
        index += 1 + u64::from(wide);
    }
    at.write(machine, 4, 2, 6);
    placed
}
