// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! This process's standard input and output.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ebbtide_iothread::{Either, Local, race};

use super::Wire;
use super::file::{CURRENT_POSITION, write_output};
use super::terminal::RawTerminal;
use crate::Error;

/// How often to look whether the process is in the foreground again.
const BACKGROUND: Duration = Duration::from_millis(500);

/// Duplicates of the standard descriptors.
pub(super) struct Stdio {
    input: Arc<OwnedFd>,
    output: Arc<OwnedFd>,
    terminal: Option<RawTerminal>,
}

impl Stdio {
    /// Puts the terminal, if standard input is one, into raw mode.
    pub(super) fn open() -> Result<Self, Error> {
        let open = || -> io::Result<Self> {
            let input = rustix::io::dup(rustix::stdio::stdin())?;
            let output = rustix::io::dup(rustix::stdio::stdout())?;
            let terminal = RawTerminal::enter(input.try_clone()?)?;
            Ok(Self {
                input: Arc::new(input),
                output: Arc::new(output),
                terminal,
            })
        };
        open().map_err(Error::Stdio)
    }

    pub(super) async fn serve(&self, local: &Local, wire: &Wire) {
        let input = async {
            if let Err(error) = self.read_input(local, wire).await {
                tracing::warn!(%error, "standard input can't be read");
            }
            // The end of the input is not the end of the device.
            std::future::pending::<()>().await;
        };
        match race(write_output(local, wire, &self.output), input).await {
            Either::Left(()) | Either::Right(()) => {}
        }
    }

    /// Hands input to the guest, until its end or the wire's.
    async fn read_input(&self, local: &Local, wire: &Wire) -> io::Result<()> {
        loop {
            let room = wire.input_room().await;
            if room == 0 {
                return Ok(());
            }
            local.readable(self.input.as_fd()).await?;
            // Reading in the background would stop the process, and the guest with it.
            if self
                .terminal
                .as_ref()
                .is_some_and(|terminal| !terminal.in_foreground())
            {
                local.sleep(BACKGROUND).await;
                continue;
            }
            let (result, buffer) = local
                .read_at(&self.input, vec![0; room], CURRENT_POSITION)
                .await;
            match result {
                Ok(0) => return Ok(()),
                Ok(count) => wire.receive(buffer.get(..count).unwrap_or_default()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
