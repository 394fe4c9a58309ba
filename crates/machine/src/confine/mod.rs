// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is left to a thread that a guest has taken over.
//!
//! Each kind of thread has a seccomp filter of the system calls it needs ([`calls`]); iothreads have rings that take
//! only operations on open files, as filters do not see what a ring does; and no thread opens files other than where
//! the command line named some ([`paths`]).
//!
//! ```text
//!   Confinement::new     filters are compiled, landlock's rules made: every file named is still to be opened
//!     vCPU, iothread, grace worker          under their filters from their first step on
//!     blocking pool                         under its filter
//!   Confinement::seal    the machine is built: pool and control thread lose the rest, and so do threads to come
//! ```
//!
//! Programs of backends are started by a process that was there before all this, and that starts no others
//! ([`Launcher`](crate::Launcher)).
//!
//! A forbidden call ends the process ([`violation`]). Only vCPU threads are answered EPERM where they would free
//! memory or close a descriptor: that leaks until the end of the process, which is better than that a guest could end it.
//! A descriptor is told of on standard error, for it is a mistake.
//! They hand their vCPU back when they end, so nothing of it is freed there. What they allocate is a new view when the
//! guest moves a BAR or window, and what a driver that gets ready needs; ejects, hot-plug registers and configuration
//! space allocate nothing (tests in `platform` and `hotplug/ejector.rs`). They end by returning when they are asked to,
//! and not with the process by exit_group: a reset parks them, the control thread joins them before it drops what they
//! use, and a thread that returns needs no call beyond those that all have.

mod calls;
mod filter;
mod launcher;
mod paths;
mod settle;
mod violation;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, mpsc};

use ebbtide_iothread::{Blocking, Config, IoThread, Operations};

use crate::Error;
use crate::config::MachineConfig;
use filter::Filters;
pub use launcher::confine_launcher;
use paths::Paths;

/// What to do about system calls that a thread has no need for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// They end the process.
    On,
    /// The kernel's audit log tells of them, and they are carried out.
    Log,
    /// Nothing.
    #[default]
    Off,
}

/// How a machine is confined. Not at all by default: a program may have more threads than the machine's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfinementConfig {
    /// System calls.
    pub seccomp: Seccomp,
    /// Files: only where the configuration names some, and where `allow` says.
    pub landlock: bool,
    /// Directories and files that may be opened beyond those.
    pub allow: Vec<PathBuf>,
}

/// Kinds of threads, by what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs the guest and what its register accesses do.
    Vcpu,
    /// Serves queues.
    Iothread,
    /// The memory core's worker, and who drops what might block it.
    Grace,
    /// Opens, closes, allocates: for devices and for the reaper.
    Blocking,
    /// The control thread.
    Control,
}

/// What confines the threads of one machine.
pub(crate) struct Confinement {
    seccomp: Seccomp,
    vcpu: Filters,
    iothread: Filters,
    grace: Filters,
    blocking: Filters,
    control: Filters,
    paths: Option<Paths>,
    sealed: AtomicBool,
}

impl Confinement {
    /// Prepares it; no thread is confined yet.
    ///
    /// # Errors
    /// Filters that can't be compiled, `allow` that names what does not exist.
    pub(crate) fn new(config: &MachineConfig) -> Result<Arc<Confinement>, Error> {
        let ConfinementConfig {
            seccomp,
            landlock,
            allow,
        } = &config.confinement;
        let compile = |kind| Filters::new(kind, *seccomp).map_err(|e| Error::part("seccomp", e));
        if *seccomp != Seccomp::Off {
            settle::all();
        }
        if *seccomp == Seccomp::On {
            violation::receive().map_err(|e| Error::part("seccomp", e))?;
        }
        let paths = match (landlock, paths::version()) {
            (false, _) => None,
            (true, Some(_)) => Some(Paths::new(config, allow)?),
            (true, None) => {
                tracing::warn!(
                    "this kernel has no landlock (Linux 5.13 and newer have it, where it is switched on): any file may be opened"
                );
                None
            }
        };
        Ok(Arc::new(Confinement {
            seccomp: *seccomp,
            vcpu: compile(Kind::Vcpu)?,
            iothread: compile(Kind::Iothread)?,
            grace: compile(Kind::Grace)?,
            blocking: compile(Kind::Blocking)?,
            control: compile(Kind::Control)?,
            paths,
            sealed: AtomicBool::new(false),
        }))
    }

    /// Confines the calling thread, and those it starts, to what `kind` needs, for good.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn enter(&self, kind: Kind) -> io::Result<()> {
        let (filters, paths) = match kind {
            Kind::Vcpu => (&self.vcpu, true),
            Kind::Iothread => (&self.iothread, true),
            // What it drops may have names to remove.
            Kind::Grace => (&self.grace, true),
            // It opens first what the command line names, by any way to name it.
            Kind::Blocking => (&self.blocking, false),
            Kind::Control => (&self.control, true),
        };
        if paths {
            self.limit_paths()?;
        }
        filters.install()
    }

    fn limit_paths(&self) -> io::Result<()> {
        self.paths.as_ref().map_or(Ok(()), Paths::install)
    }

    /// Starts an iothread under its filter, with a restricted ring.
    ///
    /// # Errors
    /// The kernel gives no thread or no ring, or refuses the filter.
    pub(crate) fn iothread(self: &Arc<Self>, name: &str) -> Result<IoThread, Error> {
        let operations = match self.seccomp {
            Seccomp::On => Operations::OpenFiles,
            Seccomp::Log | Seccomp::Off => Operations::All,
        };
        let config = Config {
            operations,
            ..Config::default()
        };
        let thread = IoThread::spawn_with(name, config).map_err(|e| Error::part(name, e))?;
        let (tell, told) = mpsc::channel();
        let this = Arc::clone(self);
        let begun = thread.remote().spawn(move |_| {
            // Whoever asked waits for it.
            let _ = tell.send(this.enter(Kind::Iothread));
            std::future::ready(())
        });
        begun.map_err(|e| Error::part(name, e))?;
        match told.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(e)) => Err(Error::part(format!("{name}: confinement"), e)),
            Err(e) => Err(Error::part(name, e)),
        }
    }

    /// Runs `make` on a thread of `kind` that ends with it: the threads that it starts are confined as that one.
    ///
    /// # Errors
    /// Those of `make`; the kernel gives no thread or refuses.
    pub(crate) fn within<T: Send>(
        &self,
        kind: Kind,
        make: impl FnOnce() -> Result<T, Error> + Send,
    ) -> Result<T, Error> {
        let failed = |e: io::Error| Error::part(format!("{kind:?} threads: confinement"), e);
        std::thread::scope(|scope| {
            let confined = || {
                self.enter(kind).map_err(failed)?;
                make()
            };
            let builder = std::thread::Builder::new().name("confined".to_owned());
            let thread = builder.spawn_scoped(scope, confined).map_err(failed)?;
            match thread.join() {
                Ok(made) => made,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Confines the calling thread, which is the control thread, and the `threads` threads of `pool` for good: the
    /// machine is built, and what it opens from here on is named by management.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn seal(
        self: &Arc<Self>,
        pool: &Blocking,
        threads: usize,
    ) -> Result<(), Error> {
        // Each thread gets one: none goes on before all have theirs.
        let together = Arc::new(Barrier::new(threads));
        let jobs: Vec<_> = (0..threads)
            .map(|_| {
                let (this, together) = (Arc::clone(self), Arc::clone(&together));
                pool.run(move || {
                    together.wait();
                    this.limit_paths()
                })
            })
            .collect();
        let failed = |e| Error::part("confinement", e);
        for job in jobs {
            job.await.map_err(failed)?;
        }
        self.enter(Kind::Control).map_err(failed)?;
        self.sealed.store(true, Ordering::Release);
        Ok(())
    }

    /// Says what is wrong with opening `path`, if the kernel would refuse it. May block.
    ///
    /// # Errors
    /// The path, and what allows it.
    pub(crate) fn check(&self, path: &Path) -> Result<(), String> {
        match &self.paths {
            Some(paths) if self.is_sealed() && !paths.reach(path) => Err(format!(
                "{}: no file there may be opened, as the command line named none: start with --allow {}",
                path.display(),
                path.parent().unwrap_or(path).display()
            )),
            _ => Ok(()),
        }
    }

    /// Whether [`seal`](Self::seal) is done.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }
}

/// What this kernel offers to confine threads with.
pub(crate) fn offered() -> (bool, Option<u32>) {
    (filter::available(), paths::version())
}
