// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device side of a split virtqueue (virtio 1.3, 2.7).
//!
//! A [`Queue`] is three [cached translations](ebbtide_memory::CachedMap) of its rings plus two indices. It holds no pin:
//! memory that carries a ring can be unplugged, and the queue's next access then fails.
//!
//! Whatever the driver writes is read once, validated and copied into an owned [`Chain`]; nothing of it is looked at a
//! second time. A queue that has seen an invalid ring stays broken until the device is reset: the device that gets a
//! [`QueueError`] marks itself with [`needs_reset`](crate::TransportControl::needs_reset).
//!
//! The loop of a device:
//!
//! ```text
//! wait for a kick
//! loop {
//!     disable_kick
//!     while let Some(chain) = pop { handle it; push_used }
//!     if needs_interrupt { interrupt }
//!     if !enable_kick { break }        // true: more arrived before the driver could see that kicks are on again
//! }
//! ```

mod chain;
mod descriptor;
mod error;
mod heads;
mod layout;
mod queue;
mod walk;

pub use chain::{Buffers, Chain};
pub use descriptor::Descriptor;
pub use error::{QueueError, Ring};
pub use layout::{MAX_SIZE, QueueConfig};
pub use queue::{Queue, QueueState};
pub use walk::MAX_INDIRECT_CHAIN;
pub(crate) use walk::segments_max;

#[cfg(test)]
mod tests;
