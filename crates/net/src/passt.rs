// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process of passt, which connects a guest to the host's network without privileges.

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::backend::{NetBackend, Offloads};
use crate::error::NetError;
use crate::stream::Stream;

/// Which program. The names in quotes are those of QEMU's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PasstSpec {
    /// `path`: the program.
    pub program: PathBuf,
    /// `param`: what to pass to it besides what makes it use our socket, as passt(1) has it.
    pub arguments: Vec<OsString>,
}

impl Default for PasstSpec {
    /// `passt` from the search path.
    fn default() -> PasstSpec {
        PasstSpec {
            program: "passt".into(),
            arguments: Vec::new(),
        }
    }
}

/// The running program. It ends with its socket; dropping this makes sure of it, and waits.
pub(crate) struct Passt {
    stream: Stream,
    child: Child,
}

impl Passt {
    pub(crate) fn start(id: &str, spec: &PasstSpec) -> Result<Passt, NetError> {
        let failed = |source| NetError::Program {
            id: id.to_owned(),
            program: spec.program.clone(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let stream = Stream::adopt(id, ours.into())?;
        // Standard input is the one descriptor that can be given to a process without others getting it, too.
        let child = Command::new(&spec.program)
            .args(["--foreground", "--fd", "0"])
            .args(&spec.arguments)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        Ok(Passt { stream, child })
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It fails only when the process is gone already.
        let _ = self.child.kill();
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "cannot wait for passt to end");
        }
    }
}

impl NetBackend for Passt {
    fn has_offloads(&self) -> bool {
        self.stream.has_offloads()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.stream.set_offloads(offloads)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.fd()
    }

    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.stream.receive(packet)
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.stream.send(packet)
    }

    fn flush(&self) -> io::Result<()> {
        self.stream.flush()
    }
}
