// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The toy behind a server on a thread of its own.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ebbtide_iothread::{Config, oneshot};
use ebbtide_qmp::{Error, EventSink, Server, ServerLimits, SocketSpec};
use tempfile::TempDir;

use super::{Toy, ToyConfig, commands};

/// Settings of one server under test.
#[derive(Default)]
pub struct Setup {
    pub toy: ToyConfig,
    pub executor: Config,
    pub limits: ServerLimits,
    /// How many sockets to listen on.
    pub more_sockets: usize,
}

/// A running server; dropping it stops it and checks that nothing is left.
pub struct ToyServer {
    directory: TempDir,
    clients: Arc<AtomicUsize>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ToyServer {
    pub fn start(setup: Setup) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = mpsc::channel();
        let clients = Arc::new(AtomicUsize::new(0));
        let thread = std::thread::spawn({
            let (root, clients) = (directory.path().to_owned(), Arc::clone(&clients));
            move || serve(root, setup, clients, ready, stopped)
        });
        listening.recv().expect("the server did not come up");
        Self {
            directory,
            clients,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// The path of the socket of this number, from 0.
    pub fn path_of(&self, socket: usize) -> PathBuf {
        socket_path(self.directory.path(), socket)
    }

    pub fn path(&self) -> PathBuf {
        self.path_of(0)
    }

    /// Waits until this many clients are connected.
    pub fn wait_clients(&self, expected: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.clients.load(Ordering::Relaxed) != expected {
            assert!(
                Instant::now() < deadline,
                "{} clients, expected {expected}",
                self.clients.load(Ordering::Relaxed)
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the server has ended by itself.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for ToyServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Gone already when it ended by itself.
            let _ = stop.send(());
        }
        let result = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(!matches!(result, Some(Err(_))), "the server panicked");
            let left: Vec<_> = std::fs::read_dir(self.directory.path()).unwrap().collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

fn socket_path(root: &Path, socket: usize) -> PathBuf {
    root.join(format!("qmp{socket}"))
}

fn serve(
    root: PathBuf,
    setup: Setup,
    clients: Arc<AtomicUsize>,
    ready: mpsc::Sender<()>,
    stopped: oneshot::Receiver<()>,
) {
    ebbtide_iothread::run_with("control", setup.executor, |local| async move {
        let events = EventSink::new(&local);
        let toy = Toy::start(&local, events.clone(), setup.toy);
        let server = Server::with_limits(
            &local,
            Rc::new(commands(Rc::clone(&toy))),
            events,
            setup.limits,
        );
        for socket in 0..=setup.more_sockets {
            server.listen(&SocketSpec::unix(socket_path(&root, socket)))?;
        }
        ready.send(()).unwrap();
        let ended = async {
            while toy.quit.borrow().is_none() {
                clients.store(server.client_count(), Ordering::Relaxed);
                local.yield_now().await;
                // Real time: the executor's clock may stand still.
                std::thread::sleep(Duration::from_micros(100));
            }
        };
        ebbtide_iothread::race(ended, stopped).await;
        server.close(Duration::from_secs(2)).await;
        Ok::<(), Error>(())
    })
    .unwrap()
    .unwrap();
}
