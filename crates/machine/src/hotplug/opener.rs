// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening what management names: on a thread that may block, and where the command line allows it.

use std::path::PathBuf;
use std::sync::Arc;

use ebbtide_iothread::Blocking;
use ebbtide_qmp::QmpError;

use crate::confine::Confinement;

/// See the module.
#[derive(Clone, Copy)]
pub(crate) struct Opener<'a> {
    pub(crate) blocking: &'a Blocking,
    pub(crate) confinement: &'a Arc<Confinement>,
}

impl Opener<'_> {
    /// Runs `open`, which opens `path` if there is one.
    ///
    /// # Errors
    /// Those of `open`; a path out of reach, with the option that allows it.
    pub(crate) async fn open<T, E>(
        &self,
        path: Option<PathBuf>,
        open: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, QmpError>
    where
        T: Send + 'static,
        E: std::fmt::Display,
    {
        let confinement = Arc::clone(self.confinement);
        let job = move || {
            path.map_or(Ok(()), |path| confinement.check(&path))?;
            open().map_err(|e| e.to_string())
        };
        self.blocking.run(job).await.map_err(QmpError::generic)
    }
}
