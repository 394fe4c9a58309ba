// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented,
        clippy::indexing_slicing
    )
)]

mod eject;
mod model;
mod removal;
mod subtree;
mod sync;
mod tree;

pub use eject::{Answer, Eject, GuestEject};
pub use model::{Draining, Holder, Model};
pub use removal::{Pending, Surroundings, remove};
pub use subtree::{
    Bus, Detached, Drain, Drained, Gone, GuestNotice, Identity, Isolated, Plugged, Subtree,
};
pub use tree::{Leaving, Node, NodeId, Phase, PlugError, RemoveError, Taken, Tree, Watcher};
