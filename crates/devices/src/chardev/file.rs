// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Output to a descriptor that is written through the ring: nothing here blocks the iothread, whatever it is.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use ebbtide_iothread::Local;
use rustix::fs::OFlags;

use super::{Wire, next_output};
use crate::Error;

/// "At the file's own position", for io_uring; what can't be positioned ignores it.
pub(super) const CURRENT_POSITION: u64 = u64::MAX;

/// A file that gets a device's output.
pub(super) struct OutputFile {
    file: Arc<File>,
}

impl OutputFile {
    /// Creates or truncates the file. A pipe nobody reads from is refused, not waited for.
    pub(super) fn create(path: &Path) -> Result<Self, Error> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(|source| Error::File {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            file: Arc::new(file),
        })
    }

    pub(super) async fn serve(&self, local: &Local, wire: &Wire) {
        write_output(local, wire, &self.file).await;
    }
}

/// Writes output to `fd` until the wire is closed. When writing fails, output is dropped from then on.
pub(super) async fn write_output<F: AsFd + 'static>(local: &Local, wire: &Wire, fd: &Arc<F>) {
    while let Some(bytes) = next_output(local, wire).await {
        if let Err(error) = write_all(local, fd, bytes).await {
            tracing::warn!(%error, "serial output can't be written and is dropped from now on");
            wire.listen(false);
            while wire.output_ready().await {
                wire.take();
            }
            return;
        }
    }
}

async fn write_all<F: AsFd + 'static>(
    local: &Local,
    fd: &Arc<F>,
    mut bytes: Vec<u8>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let (result, buffer) = local.write_at(fd, bytes, CURRENT_POSITION).await;
        bytes = buffer;
        match result {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => drop(bytes.drain(..written.min(bytes.len()))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A descriptor somebody else made non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                local.writable(fd.as_fd()).await?
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
