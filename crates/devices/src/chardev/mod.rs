// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host side of serial ports and consoles: where their output goes and their input comes from.
//!
//! ```text
//! device ── Wire ──▶ serve (a task of an iothread) ──▶ terminal, file, socket
//!        ◀─────────                                ◀──
//! ```

mod file;
mod socket;
mod stdio;
mod terminal;
mod wire;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_iothread::Local;

pub use wire::{InputKey, Wire};

use crate::Error;
use file::OutputFile;
use socket::Listener;
use stdio::Stdio;

/// How long output is gathered before it is written. A byte costs a guest an exit, and a wake-up and a write for each
/// would cost the host several times that; nobody at a terminal notices a millisecond.
const GATHER: Duration = Duration::from_millis(1);

/// Where a character device leads. As text: `stdio`, `file:PATH`, `unix:PATH`, `off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChardevSpec {
    /// This process's standard input and output. A terminal is put into raw mode; Ctrl-C still interrupts the process.
    Stdio,
    /// Output to a file, truncated at first. No input.
    File(PathBuf),
    /// A listening Unix socket, for one client at a time. A path somebody listens at is refused, a dead one replaced; it
    /// is removed at the end. Output is dropped while no client is there.
    Unix(PathBuf),
    /// Nowhere.
    Off,
}

impl FromStr for ChardevSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "off" => Ok(Self::Off),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(Error::Spec(text.to_owned())),
        }
    }
}

/// An open character device. Dropping it puts the terminal back and removes the socket.
pub struct Chardev(Kind);

enum Kind {
    Stdio(Stdio),
    File(OutputFile),
    Unix(Listener),
    Off,
}

impl Chardev {
    /// Opens what `spec` names. May block for a file system.
    ///
    /// # Errors
    /// What can't be opened, and why.
    pub fn open(spec: &ChardevSpec) -> Result<Self, Error> {
        Ok(Self(match spec {
            ChardevSpec::Stdio => Kind::Stdio(Stdio::open()?),
            ChardevSpec::File(path) => Kind::File(OutputFile::create(path)?),
            ChardevSpec::Unix(path) => Kind::Unix(Listener::bind(path)?),
            ChardevSpec::Off => Kind::Off,
        }))
    }

    /// Starts to listen on `wire`, before a task serves it: nothing a device sends from now on is lost. (A socket
    /// listens only while a client is there.)
    pub fn attach(self, wire: &Arc<Wire>) -> Attached {
        if matches!(self.0, Kind::Stdio(_) | Kind::File(_)) {
            wire.listen(true);
        }
        Attached {
            chardev: self,
            wire: Arc::clone(wire),
        }
    }
}

/// A character device on its wire.
pub struct Attached {
    chardev: Chardev,
    wire: Arc<Wire>,
}

impl Attached {
    /// Carries bytes both ways until the wire is closed and what was sent before is written. Dropping the future ends it
    /// at once.
    pub async fn serve(mut self, local: Local) {
        let wire = &*self.wire;
        match &mut self.chardev.0 {
            Kind::Stdio(stdio) => stdio.serve(&local, wire).await,
            Kind::File(file) => file.serve(&local, wire).await,
            Kind::Unix(listener) => listener.serve(&local, wire).await,
            Kind::Off => while wire.output_ready().await {},
        }
        if wire.dropped_bytes() > 0 {
            tracing::warn!(
                bytes = wire.dropped_bytes(),
                "serial output was dropped: its reader was too slow"
            );
        }
    }
}

/// The next piece of output, gathered; `None` when the wire is closed and everything was taken.
async fn next_output(local: &Local, wire: &Wire) -> Option<Vec<u8>> {
    if !wire.output_ready().await {
        return None;
    }
    if !wire.is_closed() {
        local.sleep(GATHER).await;
    }
    Some(wire.take())
}
