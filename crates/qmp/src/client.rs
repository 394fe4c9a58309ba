// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A blocking client, for `ebbtide ctl` and for tests. It speaks to QEMU as well.
//!
//! ```no_run
//! use ebbtide_qmp::{client::Client, commands, schema::Empty};
//! let mut client = Client::connect("/run/vm.qmp".as_ref())?;
//! println!("{}", client.call(&commands::QUERY_STATUS, Empty {})?.status);
//! # Ok::<(), ebbtide_qmp::Error>(())
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::commands::QMP_CAPABILITIES;
use crate::error::{Error, QmpError};
use crate::json::{Limits, Stream};
use crate::message;
use crate::schema::{Command, Qapi};
use crate::types::monitor::{QmpCapabilities, VersionInfo};

/// How long the connection, the greeting and each answer may take.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long connecting and the greeting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Events kept for [`Client::next_event`]; of more the oldest are forgotten.
const EVENTS_KEPT: usize = 4096;

/// An event as it was received.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ReceivedEvent {
    /// Its name.
    #[serde(rename = "event")]
    pub name: String,
    /// Its data; empty when it carries none.
    #[serde(default)]
    pub data: Map<String, Value>,
    /// When it happened.
    pub timestamp: Timestamp,
}

/// Since 1970, by the server's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Timestamp {
    /// Seconds; negative when the server does not know.
    pub seconds: i64,
    /// Microseconds.
    pub microseconds: i64,
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: VersionInfo,
}

/// A connection to a QMP server.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    path: PathBuf,
    stream: Stream,
    received: VecDeque<u8>,
    events: VecDeque<ReceivedEvent>,
    version: VersionInfo,
    next_id: u64,
    answer_timeout: Duration,
}

impl Client {
    /// Connects, reads the greeting and negotiates.
    ///
    /// # Errors
    /// When there is no such socket, nobody listens, or what answers is not QMP.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let mut client = Self::greeted(path)?;
        client.call(&QMP_CAPABILITIES, QmpCapabilities { enable: None })?;
        Ok(client)
    }

    /// Connects and reads the greeting, without the negotiation.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn greeted(path: &Path) -> Result<Self, Error> {
        let socket = open(path).map_err(|errno| Error::Connect {
            path: path.to_owned(),
            source: errno.into(),
        })?;
        let version = VersionInfo {
            package: String::new(),
            ..VersionInfo::ebbtide()
        };
        let mut client = Self {
            socket,
            path: path.to_owned(),
            stream: Stream::new(Limits::ANSWER),
            received: VecDeque::new(),
            events: VecDeque::new(),
            version,
            next_id: 0,
            answer_timeout: ANSWER_TIMEOUT,
        };
        client.read_greeting()?;
        Ok(client)
    }

    /// Who the server says it is.
    pub fn version(&self) -> &VersionInfo {
        &self.version
    }

    /// How long each answer may take, 30 s unless changed.
    pub fn set_answer_timeout(&mut self, limit: Duration) {
        self.answer_timeout = limit;
    }

    /// Carries out a command and waits for its answer. Events that come meanwhile are kept.
    ///
    /// # Errors
    /// [`Error::Command`] with the server's own error, or what went wrong with the connection.
    pub fn call<A: Qapi, R: Qapi>(
        &mut self,
        command: &Command<A, R>,
        arguments: A,
    ) -> Result<R, Error> {
        let unreadable = |reason: serde_json::Error| Error::Answer {
            command: command.name().to_owned(),
            reason: reason.to_string(),
        };
        let arguments = serde_json::to_value(arguments).map_err(unreadable)?;
        let answer = self.execute(command.name(), arguments)?;
        serde_json::from_value(answer).map_err(unreadable)
    }

    /// [`Client::call`] for a command by name; `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let mut request = Map::new();
        request.insert("execute".to_owned(), command.into());
        if !arguments.is_null()
            && arguments
                .as_object()
                .is_none_or(|members| !members.is_empty())
        {
            request.insert("arguments".to_owned(), arguments);
        }
        self.execute_request(request)
    }

    /// Sends a request as it stands and returns what the server returns. An `id` in it is replaced.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn execute_request(&mut self, mut request: Map<String, Value>) -> Result<Value, Error> {
        let command = request
            .get("execute")
            .and_then(Value::as_str)
            .unwrap_or("request")
            .to_owned();
        let id = Value::from(format!("ebbtide-{}", self.next_id));
        self.next_id += 1;
        request.insert("id".to_owned(), id.clone());
        let deadline = Instant::now() + self.answer_timeout;
        self.send(&message::line(&Value::Object(request)), &command, deadline)?;
        loop {
            let Some(message) = self.receive(deadline)? else {
                return Err(self.timed_out(&command, self.answer_timeout));
            };
            let Some(mut answer) = self.keep_event(message) else {
                continue;
            };
            // A server that could not read the request answers without its id.
            if answer.get("id").is_some_and(|found| *found != id) {
                continue;
            }
            if let Some(value) = answer.remove("return") {
                return Ok(value);
            }
            let error = answer.remove("error").unwrap_or_default();
            return match serde_json::from_value::<QmpError>(error) {
                Ok(error) => Err(Error::Command { command, error }),
                Err(_) => Err(Error::Answer {
                    command,
                    reason: "neither 'return' nor 'error'".to_owned(),
                }),
            };
        }
    }

    /// The next event, in the order of their arrival; `None` when none comes within `timeout`.
    ///
    /// # Errors
    /// When the connection ends; events that came before are returned first.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<ReceivedEvent>, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let Some(message) = self.receive(deadline)? else {
                return Ok(None);
            };
            // An answer here belongs to a request that timed out.
            let _ = self.keep_event(message);
        }
    }

    /// The next event of this name; others that come before it are forgotten.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when it does not come, or as [`Client::next_event`].
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<ReceivedEvent, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.next_event(deadline.saturating_duration_since(Instant::now()))? {
                Some(event) if event.name == name => return Ok(event),
                Some(_) => {}
                None => return Err(self.timed_out(&format!("the wait for {name}"), timeout)),
            }
        }
    }

    fn read_greeting(&mut self) -> Result<(), Error> {
        let not_qmp = |path: &Path, reason: String| Error::NotQmp {
            path: path.to_owned(),
            reason,
        };
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let message = match self.receive(deadline) {
            Ok(Some(message)) => message,
            Ok(None) => {
                let reason = format!(
                    "no greeting within {} s (a QEMU monitor serves only one client at a time)",
                    CONNECT_TIMEOUT.as_secs()
                );
                return Err(not_qmp(&self.path, reason));
            }
            Err(Error::Closed { .. }) => {
                return Err(not_qmp(&self.path, "it closed the connection".to_owned()));
            }
            Err(Error::Answer { reason, .. }) => return Err(not_qmp(&self.path, reason)),
            Err(error) => return Err(error),
        };
        if let Some(error) = message.get("error").cloned()
            && let Ok(error) = serde_json::from_value(error)
        {
            return Err(Error::Command {
                command: "connect".to_owned(),
                error,
            });
        }
        let greeting: Greeting =
            serde_json::from_value(Value::Object(message)).map_err(|error| {
                not_qmp(
                    &self.path,
                    format!("its first message is no greeting: {error}"),
                )
            })?;
        self.version = greeting.qmp.version;
        Ok(())
    }

    /// Keeps an event for later and gives everything else back.
    fn keep_event(&mut self, message: Map<String, Value>) -> Option<Map<String, Value>> {
        if !message.contains_key("event") {
            return Some(message);
        }
        match serde_json::from_value(Value::Object(message)) {
            Ok(event) => {
                if self.events.len() >= EVENTS_KEPT {
                    self.events.pop_front();
                }
                self.events.push_back(event);
            }
            Err(error) => tracing::debug!(%error, "an event that cannot be read"),
        }
        None
    }

    /// The next message; `None` at the deadline.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Map<String, Value>>, Error> {
        loop {
            if let Some(message) = self.parse_received()? {
                return Ok(Some(message));
            }
            if !self.wait(PollFlags::IN, deadline)? {
                return Ok(None);
            }
            let mut buffer = [0; 16 << 10];
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => {
                    return Err(Error::Closed {
                        path: self.path.clone(),
                    });
                }
                Ok((length, _)) => self.received.extend(buffer.iter().take(length)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(self.failed(errno)),
            }
        }
    }

    fn parse_received(&mut self) -> Result<Option<Map<String, Value>>, Error> {
        let bytes = self.received.make_contiguous();
        let mut rest: &[u8] = bytes;
        let item = self.stream.next(&mut rest);
        let taken = bytes.len() - rest.len();
        self.received.drain(..taken);
        let unreadable = |reason: String| Error::Answer {
            command: "QMP".to_owned(),
            reason,
        };
        match item {
            None => Ok(None),
            Some(Ok(Value::Object(message))) => Ok(Some(message)),
            Some(Ok(other)) => Err(unreadable(format!(
                "not a JSON object: {}",
                crate::json::excerpt(&other.to_string())
            ))),
            Some(Err(error)) => Err(unreadable(error.to_string())),
        }
    }

    fn send(&self, mut bytes: &[u8], what: &str, deadline: Instant) -> Result<(), Error> {
        while !bytes.is_empty() {
            match rustix::net::send(
                &self.socket,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, deadline)? {
                        return Err(self.timed_out(what, self.answer_timeout));
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    return Err(Error::Closed {
                        path: self.path.clone(),
                    });
                }
                Err(errno) => return Err(self.failed(errno)),
            }
        }
        Ok(())
    }

    /// False at the deadline.
    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<bool, Error> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(
                &mut [PollFd::from_borrowed_fd(self.socket.as_fd(), events)],
                Some(&limit),
            ) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                // A signal: whoever set its handler looks at it when the wait is over.
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed(errno)),
            }
        }
    }

    fn timed_out(&self, what: &str, limit: Duration) -> Error {
        Error::TimedOut {
            path: self.path.clone(),
            what: what.to_owned(),
            limit,
        }
    }

    fn failed(&self, errno: Errno) -> Error {
        Error::Io {
            path: self.path.clone(),
            source: io::Error::from(errno),
        }
    }
}

/// Connects, waiting a bounded time for a server whose backlog is full.
fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(CONNECT_TIMEOUT))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
