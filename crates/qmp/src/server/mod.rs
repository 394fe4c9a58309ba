// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The server: listens, negotiates, hands commands to the [`Executor`] one after the other for each client, and
//! sends events in between.

mod events;
mod peer;
mod session;
mod signal;
mod socket;
mod throttle;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use ebbtide_iothread::{Local, Task};

pub use events::EventSink;
pub use socket::SocketSpec;

use crate::commands::{QMP_CAPABILITIES, QUERY_COMMANDS, QUERY_QMP_SCHEMA, QUERY_VERSION};
use crate::error::Error;
use crate::executor::{ClientId, Executor};
use crate::schema::Schema;
use crate::types::events::ALL as ALL_EVENTS;
use crate::types::monitor::VersionInfo;
use peer::{Ended, Peer};
use session::Session;
use signal::Signal;
use socket::Listening;

/// How long accepting rests when the process has no descriptor left for a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What clients may cost.
#[derive(Debug, Clone, Copy)]
pub struct ServerLimits {
    /// Clients at a time; more are told so and closed.
    pub clients: usize,
    /// Bytes a client may leave unread before it is dropped.
    pub output_bytes: usize,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            clients: 64,
            output_bytes: 16 << 20,
        }
    }
}

/// A QMP server on the control thread. Dropping it closes its sockets and connections and removes its files;
/// [`Server::close`] lets the last answers out first.
pub struct Server {
    shared: Rc<Shared>,
    listeners: RefCell<Vec<(Rc<Listening>, Task<()>)>>,
}

/// What listeners and sessions share.
struct Shared {
    local: Local,
    executor: Rc<dyn Executor>,
    schema: Schema,
    version: VersionInfo,
    events: EventSink,
    limits: ServerLimits,
    next_id: Cell<u64>,
    clients: RefCell<BTreeMap<ClientId, Connection>>,
    /// No command is begun any more.
    closing: Cell<bool>,
    /// A client has gone.
    left: Signal,
}

struct Connection {
    peer: Rc<Peer>,
    session: Task<()>,
}

impl Server {
    /// A server that listens nowhere yet. `events` is the sink its clients receive events from.
    pub fn new(local: &Local, executor: Rc<dyn Executor>, events: EventSink) -> Self {
        Self::with_limits(local, executor, events, ServerLimits::default())
    }

    /// [`Server::new`] with limits of one's own.
    pub fn with_limits(
        local: &Local,
        executor: Rc<dyn Executor>,
        events: EventSink,
        limits: ServerLimits,
    ) -> Self {
        let own = [
            QMP_CAPABILITIES.info(),
            QUERY_VERSION.info(),
            QUERY_COMMANDS.info(),
            QUERY_QMP_SCHEMA.info(),
        ];
        let schema = Schema::new(
            own.into_iter().chain(executor.commands()),
            ALL_EVENTS.iter().copied(),
        );
        let shared = Shared {
            local: local.clone(),
            executor,
            schema,
            version: VersionInfo::ebbtide(),
            events,
            limits,
            next_id: Cell::new(0),
            clients: RefCell::default(),
            closing: Cell::new(false),
            left: Signal::default(),
        };
        Self {
            shared: Rc::new(shared),
            listeners: RefCell::default(),
        }
    }

    /// Listens on one more socket.
    ///
    /// # Errors
    /// When another process listens there, something that is no socket has that name, or the system refuses. A
    /// socket nobody listens on is replaced.
    pub fn listen(&self, spec: &SocketSpec) -> Result<(), Error> {
        let listening = Rc::new(Listening::bind(spec)?);
        let task = self
            .shared
            .local
            .spawn(accept(Rc::clone(&self.shared), Rc::clone(&listening)));
        tracing::debug!(socket = %spec, "listening for QMP clients");
        self.listeners.borrow_mut().push((listening, task));
        Ok(())
    }

    /// The sockets listened on.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.listeners
            .borrow()
            .iter()
            .map(|(listening, _)| listening.path().to_owned())
            .collect()
    }

    /// Where the machine puts its events.
    pub fn events(&self) -> EventSink {
        self.shared.events.clone()
    }

    /// What is understood here.
    pub fn schema(&self) -> &Schema {
        &self.shared.schema
    }

    /// How many clients are connected.
    pub fn client_count(&self) -> usize {
        self.shared.connected()
    }

    /// Stops listening, removes the sockets, waits up to `grace` for commands that are being carried out and for
    /// answers and events to be sent, and closes all connections.
    ///
    /// No further command is begun; what was sent meanwhile stays unanswered.
    pub async fn close(self, grace: Duration) {
        self.shared.closing.set(true);
        self.stop_listening().await;
        let peers: Vec<Rc<Peer>> = self
            .shared
            .clients
            .borrow()
            .values()
            .map(|client| Rc::clone(&client.peer))
            .collect();
        let all_quiet = async {
            for peer in &peers {
                peer.quiet().await;
            }
        };
        if self.shared.local.timeout(grace, all_quiet).await.is_err() {
            tracing::warn!("closing QMP connections with answers unsent");
        }
        peers.iter().for_each(|peer| peer.end(Ended::Gone));
        let none_left = self
            .shared
            .left
            .until(|| self.shared.clients.borrow().is_empty());
        // Sessions see their end in their next turn, unless a command never ends; drop() cancels those.
        let _ = self.shared.local.timeout(grace, none_left).await;
    }

    async fn stop_listening(&self) {
        let listeners = std::mem::take(&mut *self.listeners.borrow_mut());
        for (listening, task) in listeners {
            // The task holds the other reference to the socket.
            task.cancel().await;
            drop(listening);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for (listening, _task) in self.listeners.borrow_mut().drain(..) {
            listening.remove_file();
        }
        let clients = std::mem::take(&mut *self.shared.clients.borrow_mut());
        for (id, client) in clients {
            client.peer.end(Ended::Gone);
            self.shared.events.remove(id);
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("paths", &self.paths())
            .field("clients", &self.client_count())
            .finish_non_exhaustive()
    }
}

async fn accept(shared: Rc<Shared>, listening: Rc<Listening>) {
    loop {
        match shared
            .local
            .when_readable(&*listening, || listening.accept())
            .await
        {
            Ok(socket) => shared.welcome(socket),
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => return,
            Err(error) => {
                tracing::warn!(socket = %listening.path().display(), %error, "cannot accept a QMP client");
                shared.local.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Shared {
    /// Clients without those that are gone and for whom something is still being done.
    fn connected(&self) -> usize {
        let clients = self.clients.borrow();
        let there = |client: &&Connection| client.peer.ended().is_none();
        clients.values().filter(there).count()
    }

    /// Begins a session with a client that has connected.
    fn welcome(self: &Rc<Self>, socket: std::os::unix::net::UnixStream) {
        let id = ClientId(self.next_id.get());
        self.next_id.set(id.0 + 1);
        if self.connected() >= self.limits.clients {
            tracing::warn!(
                limit = self.limits.clients,
                "too many QMP clients, closing another"
            );
            session::refuse(&socket, self.limits.clients);
            return;
        }
        let peer = Rc::new(Peer::new(id, socket, self.limits.output_bytes));
        let session = Session::new(Rc::clone(self), Rc::clone(&peer));
        let session = self.local.spawn(session.run());
        self.events.add(Rc::clone(&peer));
        self.clients
            .borrow_mut()
            .insert(id, Connection { peer, session });
    }

    /// Forgets a client whose session ends; called by the session itself.
    fn forget(&self, id: ClientId) {
        self.events.remove(id);
        if let Some(client) = self.clients.borrow_mut().remove(&id) {
            // It is the caller: dropping it would cancel it.
            client.session.detach();
        }
        self.left.notify();
    }
}
