// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One io_uring, local tasks and timers per thread.
//!
//! An executor belongs to one thread. Its tasks need not be `Send`; they share the thread's ring through
//! [`Local`]. Other threads reach it through [`Remote`], channels, eventfds ([`Event`]) and wakers, which cost a
//! system call only when the executor sleeps.
//!
//! What the kernel may still write to belongs to the ring, not to a future: dropping a future, a task or the whole
//! executor cancels operations and never frees their memory before the kernel is through with it.
//!
//! ```
//! use ebbtide_iothread::{Event, IoThread, channel, run};
//! use std::time::Duration;
//!
//! let disk = IoThread::spawn("disk")?;
//! let mut kick = Event::new()?;
//! let kicker = kick.notifier();
//! let (results, mut done) = channel();
//!
//! disk.remote().spawn(move |local| async move {
//!     let kicks = kick.wait(&local).await.unwrap_or(0);
//!     results.send(kicks);
//! })?;
//!
//! let kicks = run("control", |local| async move {
//!     kicker.notify();
//!     local.timeout(Duration::from_secs(10), done.recv()).await
//! })?;
//! assert_eq!(kicks, Ok(Some(1)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What keeps one task from starving the rest: a turn polls a bounded number of tasks before it looks at the ring,
//! the timers and other threads' wake-ups again.

mod blocking;
mod channel;
mod clock;
mod config;
#[doc(hidden)] // for the models only
pub mod doorbell;
mod error;
mod event;
mod executor;
mod file;
mod inbox;
mod later;
mod local;
pub mod oneshot;
mod op;
mod poll;
mod race;
mod ring;
mod setup;
mod signal;
mod signals;
mod slots;
mod sync;
mod task;
mod thread;
mod timers;

pub use blocking::{Blocking, Finished};
pub use channel::{Receiver, Sender, channel};
pub use clock::{Clock, ManualClock};
pub use config::{Config, Kernel, Operations};
pub use error::{Elapsed, Error, Stopped};
pub use event::{Event, Notifier};
pub use later::{LaterEvent, LaterNotifier};
pub use local::Local;
pub use op::Op;
pub use race::{Either, race};
pub use signal::{Changed, Signal};
pub use signals::Signals;
pub use task::Task;
pub use thread::{IoThread, Remote, run, run_with};
pub use timers::Sleep;
