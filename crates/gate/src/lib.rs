// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rundown protection for things that are used from many threads and removed while they are used.
//!
//! A [`Gate`] is entered, closed once and then drained:
//!
//! ```text
//!            enter / leave                  leave only                    nothing
//!   ┌──────┐  (many times)     close()   ┌────────┐   last lease left   ┌─────────┐
//!   │ open │ ──────────────────────────► │ closed │ ──────────────────► │ drained │
//!   └──────┘                             └────────┘                     └─────────┘
//! ```
//!
//! It never goes back. Whoever wants to use the guarded thing calls [`Gate::enter`] and keeps the [`Lease`] for
//! as long as the use lasts; after [`Gate::close`] nobody gets in any more, and [`Gate::drained`] resolves when
//! the last lease is gone. From then on the owner has the thing to itself.
//!
//! [`Owned`] and [`Handle`] put a value behind a gate: there is exactly one owner, any number of handles, and a
//! handle reaches the value only while it holds a lease ([`Live`]). A handle does not keep the value alive, so
//! the value is dropped where its owner drops it and never on a thread that merely used it last.
//!
//! ```
//! use ebbtide_gate::{Entry, Owned};
//! use std::time::{Duration, Instant};
//!
//! let owned = Owned::new("disk0", String::from("state"));
//! let handle = owned.handle();
//!
//! let user = std::thread::spawn(move || {
//!     // Closed already, or not: either way this never touches a value that is gone.
//!     handle.enter(Entry::Mmio).map(|disk| disk.len())
//! });
//!
//! owned.close();
//! owned.gate().drain_blocking(Instant::now() + Duration::from_secs(5))?;
//! let state = owned.try_into_inner().expect("drained");
//! assert_eq!(state, "state");
//! assert!(matches!(user.join(), Ok(None | Some(5))));
//! # Ok::<(), ebbtide_gate::Stalled>(())
//! ```
//!
//! The futures here are plain [`std::future::Future`]s and need no particular executor.

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

mod drain;
mod gate;
mod owned;
mod sync;
mod word;

pub use drain::{Drained, Stalled};
pub use gate::{Gate, Lease};
pub use owned::{Handle, Live, Owned};
pub use word::{Entry, Held};
