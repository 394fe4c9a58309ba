// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QMP, QEMU's monitor protocol: what goes over the wire, a server on the control thread, a blocking client.
//!
//! - [`schema`] declares commands, events and their data once; [`commands`] and [`types`] are those declarations.
//! - [`Server`] listens on Unix sockets, checks what clients send, and hands commands to an [`Executor`], of which
//!   [`CommandTable`] is the ready-made one. [`EventSink`] is where the machine puts its events.
//! - [`Properties`] are what only the consumer of a command knows: those of devices, objects, block drivers.
//! - [`hmp`] reads and answers commands as people type them; [`sizes`] reads and prints sizes.
//! - [`client`] is for `ebbtide ctl` and for tests.
//!
//! ```
//! use std::{rc::Rc, thread, time::Duration};
//! use ebbtide_qmp::{client::Client, commands, schema::Empty, types::{events, run_state::{RunState, StatusInfo}}};
//! use ebbtide_qmp::{CommandTable, EventSink, Server, SocketSpec};
//!
//! struct Machine { events: EventSink }
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("qmp");
//! let client = thread::spawn({
//!     let path = path.clone();
//!     move || {
//!         while !path.exists() { thread::sleep(Duration::from_millis(1)); }
//!         let mut client = Client::connect(&path)?;
//!         client.call(&commands::STOP, Empty {})?;
//!         client.wait_event("STOP", Duration::from_secs(5))?;
//!         client.call(&commands::QUERY_STATUS, Empty {})
//!     }
//! });
//! ebbtide_iothread::run("control", |local| async move {
//!     let events = EventSink::new(&local);
//!     let table = CommandTable::new(Rc::new(Machine { events: events.clone() }))
//!         .on(commands::QUERY_STATUS, async |_machine, _client, Empty {}| Ok(StatusInfo::new(RunState::Paused)))
//!         .on(commands::STOP, async |machine, _client, Empty {}| {
//!             machine.events.emit(events::STOP.with(Empty {}));
//!             Ok(Empty {})
//!         });
//!     let server = Server::new(&local, Rc::new(table), events);
//!     server.listen(&SocketSpec::unix(path))?;
//!     while !client.is_finished() { local.sleep(Duration::from_millis(1)).await; }
//!     server.close(Duration::from_secs(1)).await;
//!     assert_eq!(client.join().unwrap()?.status, RunState::Paused);
//!     Ok::<(), ebbtide_qmp::Error>(())
//! })??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
#![forbid(unsafe_code)]

pub mod client;
pub mod commands;
mod error;
mod executor;
pub mod hmp;
pub mod json;
mod message;
mod properties;
pub mod schema;
mod server;
pub mod sizes;
pub mod types;

pub use error::{Error, ErrorClass, QmpError};
pub use executor::{Answer, ClientId, CommandTable, Executor};
pub use properties::{Bound, PciAddress, Properties, Reference};
pub use schema::{Event, Schema};
pub use server::{EventSink, Server, ServerLimits, SocketSpec};
