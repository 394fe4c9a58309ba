// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Discarding of RAM: who needs it, who cannot bear it, and who must hear of it.
//!
//! Memory of a guest is *discarded* when its pages go back to the host while the guest runs:
//! unplugged blocks of virtio-mem, pages of a balloon. Whoever keeps a second way to the pages (a
//! device's IOMMU with pinned pages, another process) would go on using pages that are nobody's
//! any more, and pin more than what is plugged.
//!
//! * [`DiscardRules`]: a discard is *coordinated* when it is told beforehand, *uncoordinated* when
//!   it is not. Devices require the one or the other; others disable all discards, or those they
//!   would not hear of. What excludes each other is refused, naming who is in the way.
//! * [`DiscardListener`]: hears which parts of a sparse RAM block are populated and discarded, and
//!   can veto the first.
//!
//! ```text
//!   plug:    accessible ─► populate of each listener ─► bitmap
//!                               └─ veto: discard of those told before, backwards; inaccessible
//!   unplug:  seal ─► drained ─► inaccessible ─► discard of each listener ─► pages freed
//!                                                    └─ not freed and undone: restore of each
//! ```

mod rules;
mod source;

pub use rules::{DiscardCounts, DiscardRules, DiscardToken};
pub use source::{DiscardListener, DiscardSubscription};
pub(crate) use source::{Source, Veto};
