// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a request deserves, before anything is done about it: a pure function (virtio 1.3, 5.15.6.1 to 5.15.6.5).
//!
//! | request | ERROR | NACK |
//! |---|---|---|
//! | plug | range empty, not aligned, not usable; a block of it plugged already | plugged + range > requested |
//! | unplug | range empty, not aligned, not usable; a block of it not plugged | |
//! | unplug all | | |
//! | state | range empty, not aligned, not usable | |
//!
//! ERROR comes first: the specification demands it, while NACK and BUSY are allowed. BUSY is not decided here; it is what
//! remains when the host cannot do what was judged right.

use std::ops::Range;

use ebbtide_memory::Plugged;

use super::request::{Answer, BlockState, Request};
use super::size::{Region, Sizes};

/// What to do about a request. Ranges are offsets in the region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing but answering.
    Answer(Answer),
    Plug(Range<u64>),
    Unplug(Range<u64>),
    UnplugAll,
}

/// Judges `request`; `plugged` tells the state of a range of the region.
pub(crate) fn judge(
    request: Request,
    region: &Region,
    sizes: &Sizes,
    plugged: impl Fn(Range<u64>) -> Plugged,
) -> Verdict {
    const ERROR: Verdict = Verdict::Answer(Answer::Error);
    match request {
        Request::Plug(blocks) => {
            let Some(range) = region.usable_range(sizes, blocks) else {
                return ERROR;
            };
            if plugged(range.clone()) != Plugged::None {
                return ERROR;
            }
            if exceeds(&range, sizes) {
                return Verdict::Answer(Answer::Nack);
            }
            Verdict::Plug(range)
        }
        Request::Unplug(blocks) => {
            let Some(range) = region.usable_range(sizes, blocks) else {
                return ERROR;
            };
            if plugged(range.clone()) != Plugged::All {
                return ERROR;
            }
            Verdict::Unplug(range)
        }
        Request::UnplugAll => Verdict::UnplugAll,
        Request::State(blocks) => {
            let Some(range) = region.usable_range(sizes, blocks) else {
                return ERROR;
            };
            Verdict::Answer(Answer::State(match plugged(range) {
                Plugged::All => BlockState::Plugged,
                Plugged::None => BlockState::Unplugged,
                Plugged::Mixed => BlockState::Mixed,
            }))
        }
    }
}

/// Whether plugging `range` would take the device over its requested size. Asked again before a failed plug is retried,
/// for the operator may have changed his mind.
pub(crate) fn exceeds(range: &Range<u64>, sizes: &Sizes) -> bool {
    let len = range.end.saturating_sub(range.start);
    sizes
        .plugged
        .checked_add(len)
        .is_none_or(|after| after > sizes.requested)
}

#[cfg(test)]
mod tests {
    use super::super::request::Blocks;
    use super::*;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 2 * MIB;
    const BASE: u64 = 1 << 32;
    const REGION: Region = Region {
        addr: BASE,
        bytes: 64 * BLOCK,
        block_bytes: BLOCK,
        node: None,
    };

    /// Blocks 0 to 7 are plugged, the rest is not.
    fn plugged(range: Range<u64>) -> Plugged {
        if range.end <= 8 * BLOCK {
            Plugged::All
        } else if range.start >= 8 * BLOCK {
            Plugged::None
        } else {
            Plugged::Mixed
        }
    }

    fn verdict(request: Request, requested_blocks: u64, usable_blocks: u64) -> Verdict {
        let sizes = Sizes {
            requested: requested_blocks * BLOCK,
            usable: usable_blocks * BLOCK,
            plugged: 8 * BLOCK,
        };
        judge(request, &REGION, &sizes, plugged)
    }

    fn blocks(first: u64, count: u16) -> Blocks {
        Blocks {
            addr: BASE + first * BLOCK,
            count,
        }
    }

    const ERROR: Verdict = Verdict::Answer(Answer::Error);

    #[test]
    fn bad_ranges_are_errors_for_all_that_have_one() {
        let bad = [
            blocks(8, 0),
            Blocks {
                addr: BASE + 8 * BLOCK + 4096,
                count: 1,
            },
            Blocks {
                addr: BASE - BLOCK,
                count: 1,
            },
            blocks(32, 1),
            blocks(31, 2),
            blocks(8, u16::MAX),
            Blocks {
                addr: u64::MAX - BLOCK + 1,
                count: u16::MAX,
            },
        ];
        for range in bad {
            for request in [
                Request::Plug(range),
                Request::Unplug(range),
                Request::State(range),
            ] {
                assert_eq!(verdict(request, 64, 32), ERROR, "{request:?}");
            }
        }
    }

    #[test]
    fn wrong_states_are_errors() {
        for range in [blocks(0, 1), blocks(7, 1), blocks(7, 2)] {
            assert_eq!(verdict(Request::Plug(range), 64, 64), ERROR);
        }
        for range in [blocks(8, 1), blocks(7, 2), blocks(0, 9)] {
            assert_eq!(verdict(Request::Unplug(range), 64, 64), ERROR);
        }
        // ERROR goes before NACK.
        assert_eq!(verdict(Request::Plug(blocks(7, 2)), 0, 64), ERROR);
    }

    #[test]
    fn over_target_is_a_nack() {
        let nack = Verdict::Answer(Answer::Nack);
        assert_eq!(verdict(Request::Plug(blocks(8, 3)), 10, 64), nack);
        assert_eq!(verdict(Request::Plug(blocks(8, 1)), 8, 64), nack);
        assert_eq!(verdict(Request::Plug(blocks(8, 1)), 0, 64), nack);
        let plug = Verdict::Plug(8 * BLOCK..10 * BLOCK);
        assert_eq!(verdict(Request::Plug(blocks(8, 2)), 10, 64), plug);
    }

    #[test]
    fn unplugging_does_not_ask_for_the_target() {
        let unplug = Verdict::Unplug(2 * BLOCK..8 * BLOCK);
        for requested in [0, 4, 8, 64] {
            assert_eq!(
                verdict(Request::Unplug(blocks(2, 6)), requested, 64),
                unplug
            );
            assert_eq!(
                verdict(Request::UnplugAll, requested, 64),
                Verdict::UnplugAll
            );
        }
    }

    #[test]
    fn states() {
        let state = |state| Verdict::Answer(Answer::State(state));
        assert_eq!(
            verdict(Request::State(blocks(0, 8)), 0, 64),
            state(BlockState::Plugged)
        );
        assert_eq!(
            verdict(Request::State(blocks(8, 8)), 0, 64),
            state(BlockState::Unplugged)
        );
        assert_eq!(
            verdict(Request::State(blocks(7, 2)), 0, 64),
            state(BlockState::Mixed)
        );
    }

    #[test]
    fn nothing_usable_is_an_error() {
        assert_eq!(verdict(Request::Plug(blocks(8, 1)), 0, 0), ERROR);
        assert_eq!(verdict(Request::State(blocks(0, 1)), 0, 0), ERROR);
    }
}
