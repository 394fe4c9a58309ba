// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend with a name, and who has it.
//!
//! ```text
//!   free ──claim──▶ claimed ──the claim is dropped──▶ free ──remove──▶ removed
//! ```
//!
//! A device keeps its claim until the last of its tasks is gone, so a backend is never taken from under one.

use std::fmt;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::NetBackend;
use crate::error::NetError;
use crate::passt::{Launcher, Passt, PasstSpec};
use crate::stream::Stream;
use crate::tap::{Tap, TapSpec};

/// The host side of one network card. Dropping the last reference closes it, which may block: leave it to a thread that
/// may.
pub struct Netdev {
    id: String,
    backend: Box<dyn NetBackend>,
    state: Mutex<State>,
}

enum State {
    Free,
    Claimed(Arc<str>),
    Removed,
}

impl Netdev {
    /// A tap interface of the host: QEMU's `tap`.
    ///
    /// # Errors
    /// [`NetError::InterfaceName`], [`NetError::Tap`].
    pub fn tap(id: impl Into<String>, spec: &TapSpec) -> Result<Arc<Netdev>, NetError> {
        let id = id.into();
        let tap = Tap::open(&id, spec)?;
        Ok(Netdev::new(id, tap))
    }

    /// A tap interface somebody has opened: QEMU's `tap` with `fd`. Offloads are used if it has IFF_VNET_HDR.
    ///
    /// # Errors
    /// [`NetError::NotTap`], [`NetError::Tap`].
    pub fn tap_of(id: impl Into<String>, fd: OwnedFd) -> Result<Arc<Netdev>, NetError> {
        let id = id.into();
        let tap = Tap::adopt(&id, fd)?;
        Ok(Netdev::new(id, tap))
    }

    /// A connection to the Unix socket at `path`: QEMU's `stream` with `addr.type=unix` and `server=off`. May block for some
    /// seconds while the listener is busy.
    ///
    /// # Errors
    /// [`NetError::Socket`].
    pub fn stream(id: impl Into<String>, path: &Path) -> Result<Arc<Netdev>, NetError> {
        let id = id.into();
        let stream = Stream::connect(&id, path)?;
        Ok(Netdev::new(id, stream))
    }

    /// A connected stream socket: QEMU's `stream` with `addr.type=fd`.
    ///
    /// # Errors
    /// [`NetError::Socket`] for a descriptor that is none.
    pub fn stream_of(id: impl Into<String>, fd: OwnedFd) -> Result<Arc<Netdev>, NetError> {
        let id = id.into();
        let stream = Stream::adopt(&id, fd)?;
        Ok(Netdev::new(id, stream))
    }

    /// A process of passt of our own: QEMU's `passt`. Blocks until it works, as far as can be told: a second at most.
    ///
    /// # Errors
    /// [`NetError::Program`], [`NetError::ProgramEnded`], [`NetError::OtherProgram`], [`NetError::Argument`],
    /// [`NetError::Launcher`]. No process is left.
    pub fn passt(
        id: impl Into<String>,
        launcher: &Launcher,
        spec: &PasstSpec,
    ) -> Result<Arc<Netdev>, NetError> {
        let id = id.into();
        let passt = Passt::start(&id, launcher, spec)?;
        Ok(Netdev::new(id, passt))
    }

    /// Names a backend.
    pub fn new(id: impl Into<String>, backend: impl NetBackend + 'static) -> Arc<Netdev> {
        Arc::new(Netdev {
            id: id.into(),
            backend: Box::new(backend),
            state: Mutex::new(State::Free),
        })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How the peer that is gone has ended, as [`NetBackend::end_of_peer`]. May block.
    pub fn end_of_peer(&self) -> Option<String> {
        self.backend.end_of_peer()
    }

    /// The device that has it.
    pub fn user(&self) -> Option<Arc<str>> {
        match &*self.state() {
            State::Claimed(device) => Some(Arc::clone(device)),
            State::Free | State::Removed => None,
        }
    }

    /// The right to use it, for `device` alone.
    ///
    /// # Errors
    /// [`NetError::InUse`], [`NetError::Removed`].
    pub fn claim(self: &Arc<Self>, device: &str) -> Result<Claim, NetError> {
        let mut state = self.state();
        self.check_free(&state)?;
        *state = State::Claimed(device.into());
        Ok(Claim(Arc::clone(self)))
    }

    /// Takes it out of use: nobody can claim it any more.
    ///
    /// # Errors
    /// [`NetError::InUse`], [`NetError::Removed`]; then nothing has changed.
    pub fn remove(&self) -> Result<(), NetError> {
        let mut state = self.state();
        self.check_free(&state)?;
        *state = State::Removed;
        Ok(())
    }

    fn check_free(&self, state: &State) -> Result<(), NetError> {
        let id = self.id.clone();
        match state {
            State::Free => Ok(()),
            State::Claimed(device) => Err(NetError::InUse {
                id,
                device: device.to_string(),
            }),
            State::Removed => Err(NetError::Removed { id }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Netdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netdev")
            .field("id", &self.id)
            .field("user", &self.user())
            .finish_non_exhaustive()
    }
}

/// One device's right to a backend. The backend is in use while it exists.
#[derive(Debug)]
pub struct Claim(Arc<Netdev>);

impl Claim {
    /// The backend's name.
    pub fn id(&self) -> &str {
        &self.0.id
    }
}

impl Deref for Claim {
    type Target = dyn NetBackend;

    fn deref(&self) -> &Self::Target {
        &*self.0.backend
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        *self.0.state() = State::Free;
    }
}
