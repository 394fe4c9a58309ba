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

mod backend;
mod error;
mod mac;
mod netdev;
mod passt;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod tun;

pub use backend::{
    FRAME_BYTES_MAX, HEADER_BYTES, NetBackend, Offloads, PACKET_BYTES_MAX, is_of_peer,
};
pub use error::NetError;
pub use mac::{MacAddress, MacError};
pub use netdev::{Claim, Netdev};
pub use passt::{Launcher, PasstSpec, serve as serve_launcher};
pub use tap::TapSpec;
