// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Executors on threads: on this one ([`run`]), on one of their own ([`IoThread`]), and the way to them from
//! elsewhere ([`Remote`]).

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use crate::config::Config;
use crate::error::{Error, Stopped};
use crate::executor::{Core, ShutDown};
use crate::inbox::Shared;
use crate::local::Local;
use crate::oneshot;

/// Runs an executor on this thread until the future that `main` makes is ready, and returns its result.
///
/// Before it returns it stops: all tasks are dropped, all operations cancelled, and the kernel is through with
/// all memory (or that memory is leaked, see [`Config::stop_limit`]).
///
/// # Errors
/// [`Error::Refused`] and the like when there is no ring to be had.
///
/// # Panics
/// With the panic of `main` or of any task, after the same orderly stop.
pub fn run<F, Fut, T>(name: &str, main: F) -> Result<T, Error>
where
    F: FnOnce(Local) -> Fut,
    Fut: Future<Output = T>,
{
    run_with(name, Config::default(), main)
}

/// [`run`] with other settings.
///
/// # Errors
/// As [`run`].
pub fn run_with<F, Fut, T>(name: &str, config: Config, main: F) -> Result<T, Error>
where
    F: FnOnce(Local) -> Fut,
    Fut: Future<Output = T>,
{
    run_core(Core::new(name, &config)?, main)
}

fn run_core<F, Fut, T>(core: Rc<Core>, main: F) -> Result<T, Error>
where
    F: FnOnce(Local) -> Fut,
    Fut: Future<Output = T>,
{
    // Declared first, so dropped last: the main future is gone when the rest is shut down.
    let _shut_down = ShutDown(Rc::clone(&core));
    let main = pin!(main(Local::new(Rc::clone(&core))));
    core.drive(main)
}

/// A thread with an executor. Dropping it stops the executor (see [`run`]) and joins the thread.
///
/// A panic in one of its tasks ends the process: a guest must not go on with a device whose thread is gone.
pub struct IoThread {
    remote: Remote,
    /// Dropping it tells the thread to stop.
    stop: Option<oneshot::Sender<()>>,
    /// Disconnected when the executor is shut down. In a mutex only to be Sync.
    finished: Mutex<mpsc::Receiver<()>>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread called `name`.
    ///
    /// # Errors
    /// When there is no thread or no ring to be had.
    pub fn spawn(name: &str) -> Result<IoThread, Error> {
        IoThread::spawn_with(name, Config::default())
    }

    /// [`spawn`](Self::spawn) with other settings.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn spawn_with(name: &str, config: Config) -> Result<IoThread, Error> {
        let (stop, stopped) = oneshot::channel();
        let (started, start) = mpsc::channel();
        let (finish, finished) = mpsc::channel();
        let thread_name = name.to_owned();
        let body = move || {
            let _finish: mpsc::Sender<()> = finish;
            serve(&thread_name, &config, stopped, &started);
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        match start.recv() {
            Ok(Ok(remote)) => Ok(IoThread {
                remote,
                stop: Some(stop),
                finished: Mutex::new(finished),
                thread: Some(thread),
            }),
            Ok(Err(error)) => {
                let _ = thread.join();
                Err(error)
            }
            Err(mpsc::RecvError) => unreachable!("the thread reports before it ends"),
        }
    }

    /// The way to its executor.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }
}

/// The body of an iothread.
fn serve(
    name: &str,
    config: &Config,
    stopped: oneshot::Receiver<()>,
    started: &mpsc::Sender<Result<Remote, Error>>,
) {
    let core = match Core::new(name, config) {
        Ok(core) => core,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(Remote::new(Arc::clone(core.shared()))));
    let served = catch_unwind(AssertUnwindSafe(|| run_core(core, |_| stopped)));
    let why = match served {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("a task of iothread `{name}` panicked"),
    };
    tracing::error!("{why}: aborting");
    eprintln!("{why}: aborting, for the machine cannot go on without this thread");
    std::process::abort();
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.take();
        let Some(thread) = self.thread.take() else {
            return;
        };
        if thread.thread().id() == std::thread::current().id() {
            // Dropped by one of its own tasks: it stops after this turn and cannot be waited for here.
            return;
        }
        let _ = self
            .finished
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let abandoned = self.remote.shared.abandoned();
        if abandoned > 0 {
            // The kernel holds a thread back at its exit until such operations end, which may be never.
            tracing::error!(
                name = self.remote.shared.name(),
                operations = abandoned,
                "an iothread is left behind with operations that never ended"
            );
        } else if thread.join().is_err() {
            unreachable!("an iothread catches its panics");
        }
    }
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoThread")
            .field("name", &self.remote.shared.name())
            .finish_non_exhaustive()
    }
}

/// The way to an executor from any thread.
#[derive(Clone, Debug)]
pub struct Remote {
    shared: Arc<Shared>,
}

impl Remote {
    pub(crate) fn new(shared: Arc<Shared>) -> Remote {
        Remote { shared }
    }

    /// The name of the executor's thread.
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// Has the executor make a future, with `make`, and run it as a task of its own. Never blocks.
    ///
    /// # Errors
    /// [`Stopped`] when the executor is stopping. A job that was accepted just before may still be dropped
    /// without having run.
    pub fn spawn<F, Fut>(&self, make: F) -> Result<(), Stopped>
    where
        F: FnOnce(Local) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        self.shared.start(Box::new(move |local| {
            local.spawn(make(local.clone())).detach()
        }))
    }
}
