// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where random bytes come from.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use ebbtide_iothread::Local;
use rustix::fs::OFlags;
use rustix::rand::{GetRandomFlags, getrandom};

use super::RngError;

/// A read under way.
pub type Reading<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<u8>>> + 'a>>;

/// Gives random bytes, some time.
pub trait EntropySource: Send + Sync {
    /// Reads at least one and at most `max` bytes; no bytes: there are none for now. It may take for ever. Dropping the
    /// future cancels it, and whatever then still comes must go into memory of the read's own.
    ///
    /// # Errors
    /// The source is broken for now; it is asked again later.
    fn read<'a>(&'a self, local: &'a Local, max: usize) -> Reading<'a>;
}

/// "At the file's own position", for io_uring; what cannot be positioned ignores it.
const CURRENT_POSITION: u64 = u64::MAX;

/// A file, in QEMU's words `rng-random`: a character device, a pipe, or a plain file, which is read once.
pub struct File {
    file: Arc<std::fs::File>,
}

impl File {
    /// What QEMU's `filename` is by default.
    pub const DEFAULT_PATH: &str = "/dev/urandom";

    /// Opens a file. May block for a file system, but not for a pipe that has no writer.
    ///
    /// # Errors
    /// [`RngError::Open`].
    pub fn open(path: &Path) -> Result<File, RngError> {
        let open = || {
            let file = std::fs::File::options()
                .read(true)
                .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                .open(path)?;
            if file.metadata()?.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            Ok(Arc::new(file))
        };
        match open() {
            Ok(file) => Ok(File { file }),
            Err(source) => Err(RngError::Open {
                path: path.to_owned(),
                source,
            }),
        }
    }
}

impl EntropySource for File {
    fn read<'a>(&'a self, local: &'a Local, max: usize) -> Reading<'a> {
        Box::pin(async move {
            loop {
                // The ring owns the vector until the kernel is through with it, whatever becomes of this future.
                let read = local.read_at(&self.file, vec![0; max], CURRENT_POSITION);
                let (result, mut bytes) = read.await;
                match result {
                    Ok(count) => {
                        bytes.truncate(count);
                        return Ok(bytes);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        local.readable(self.file.as_fd()).await?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        })
    }
}

/// The host kernel's generator, in QEMU's words `rng-builtin`. Never waits.
pub struct Builtin;

impl EntropySource for Builtin {
    fn read<'a>(&'a self, _local: &'a Local, max: usize) -> Reading<'a> {
        Box::pin(async move {
            let mut bytes = vec![0; max];
            let count = getrandom(&mut bytes, GetRandomFlags::NONBLOCK)?;
            bytes.truncate(count);
            Ok(bytes)
        })
    }
}

/// A source with a name, which any number of devices may use and which goes only when none does.
pub struct RngBackend {
    id: String,
    source: Box<dyn EntropySource>,
    users: Mutex<Users>,
}

#[derive(Default)]
struct Users {
    count: usize,
    removed: bool,
}

impl RngBackend {
    /// Names a source.
    pub fn new(id: impl Into<String>, source: impl EntropySource + 'static) -> Arc<RngBackend> {
        Arc::new(RngBackend {
            id: id.into(),
            source: Box::new(source),
            users: Mutex::default(),
        })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How many devices have it.
    pub fn users(&self) -> usize {
        self.lock().count
    }

    /// Takes it out of use: nobody can claim it any more.
    ///
    /// # Errors
    /// [`RngError::InUse`]; then nothing has changed.
    pub fn remove(&self) -> Result<(), RngError> {
        let mut users = self.lock();
        if users.count > 0 {
            return Err(RngError::InUse {
                id: self.id.clone(),
                users: users.count,
            });
        }
        users.removed = true;
        Ok(())
    }

    /// The right to use it, for one device.
    pub(super) fn claim(self: &Arc<Self>) -> Result<RngClaim, RngError> {
        let mut users = self.lock();
        if users.removed {
            return Err(RngError::Removed {
                id: self.id.clone(),
            });
        }
        users.count += 1;
        Ok(RngClaim(Arc::clone(self)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Users> {
        self.users
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// One device's right to a backend; the backend is in use while it exists.
pub struct RngClaim(Arc<RngBackend>);

impl RngClaim {
    pub(super) fn source(&self) -> &dyn EntropySource {
        &*self.0.source
    }
}

impl Drop for RngClaim {
    fn drop(&mut self) {
        let mut users = self.0.lock();
        users.count = users.count.saturating_sub(1);
    }
}
