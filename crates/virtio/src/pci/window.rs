// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration access window (4.1.4.9): the BAR's structures by way of configuration space, for firmware that
//! has not mapped the BAR.

use super::layout::{self, field};

/// The window's capability in configuration space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    /// Where the capability begins.
    at: u16,
}

/// What a driver asked the window for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) offset: u64,
    pub(super) size: u8,
}

impl Window {
    /// Bytes of the window's capability that the driver may write, from the third on: BAR, offset, length, data.
    pub(super) const WRITABLE: [u8; 18] = {
        const ALL: u8 = 0xff;
        [
            0, 0, ALL, 0, 0, 0, ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL,
        ]
    };

    pub(super) fn new(at: u16) -> Self {
        Self { at }
    }

    /// Where the data are in configuration space.
    pub(super) fn data(&self) -> u16 {
        self.at.wrapping_add(field::DATA as u16)
    }

    /// Whether an access to configuration space touches the data, which is what sets the window to work.
    pub(super) fn is_hit(&self, offset: u16, size: u8) -> bool {
        let data = u32::from(self.data());
        let (start, end) = (u32::from(offset), u32::from(offset) + u32::from(size));
        start < data + 4 && data < end
    }

    /// Where the window points, according to configuration space read by `read(offset, size)`; `None` unless that is an
    /// aligned access of 1, 2 or 4 bytes inside the BAR of the structures (4.1.4.9.2).
    pub(super) fn target(&self, read: impl Fn(u16, u8) -> u32) -> Option<Target> {
        let at = |part: usize| self.at.wrapping_add(part as u16);
        let bar = read(at(field::BAR), 1);
        let offset = read(at(field::OFFSET), 4);
        let length = read(at(field::LENGTH), 4);
        let size = u8::try_from(length)
            .ok()
            .filter(|size| matches!(size, 1 | 2 | 4))?;
        let inside = u64::from(offset) + u64::from(length) <= layout::BAR_BYTES;
        (bar == u32::from(layout::BAR) && offset.is_multiple_of(length) && inside).then_some(
            Target {
                offset: u64::from(offset),
                size,
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(bar: u32, offset: u32, length: u32) -> impl Fn(u16, u8) -> u32 {
        move |at, _| match at {
            0x54 => bar,
            0x58 => offset,
            0x5c => length,
            _ => unreachable!("{at:#x}"),
        }
    }

    #[test]
    fn points_to_aligned_accesses_inside_the_bar_only() {
        let window = Window::new(0x50);
        assert_eq!(
            window.target(config(0, 0x14, 1)),
            Some(Target {
                offset: 0x14,
                size: 1
            })
        );
        assert_eq!(
            window.target(config(0, 0x3ffc, 4)),
            Some(Target {
                offset: 0x3ffc,
                size: 4
            })
        );
        for (bar, offset, length) in [
            (1, 0, 4),
            (0, 2, 4),
            (0, 0, 0),
            (0, 0, 3),
            (0, 0, 8),
            (0, 0x4000, 1),
            (0, u32::MAX - 3, 4),
            (0, 0, 0x101),
        ] {
            assert_eq!(
                window.target(config(bar, offset, length)),
                None,
                "{bar} {offset:#x} {length}"
            );
        }
    }

    #[test]
    fn is_hit_by_any_access_that_overlaps_the_data() {
        let window = Window::new(0x50);
        assert_eq!(window.data(), 0x60);
        assert!(window.is_hit(0x60, 4) && window.is_hit(0x63, 1) && window.is_hit(0x62, 2));
        assert!(!window.is_hit(0x5c, 4) && !window.is_hit(0x64, 4));
    }
}
