// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One client's conversation: greeting, negotiation, commands in order.

use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::rc::Rc;

use ebbtide_iothread::{Either, race};
use rustix::net::SendFlags;
use serde_json::Value;

use super::Shared;
use super::peer::{Ended, Peer};
use crate::commands::{QMP_CAPABILITIES, QUERY_COMMANDS, QUERY_QMP_SCHEMA, QUERY_VERSION};
use crate::error::{ErrorClass, QmpError};
use crate::json::{Limits, ParseError, Stream};
use crate::message::{self, Request};

/// How much is read at once: little enough that parsing it does not hold up the control thread.
const READ_BYTES: usize = 16 << 10;

/// After so many requests of one client the others get a turn, even when nothing ever waits.
const REQUESTS_A_TURN: usize = 16;

pub(super) struct Session {
    shared: Rc<Shared>,
    peer: Rc<Peer>,
}

/// Tells a client that there are too many.
pub(super) fn refuse(socket: &UnixStream, limit: usize) {
    let error = QmpError::generic(format!("too many connections, the limit is {limit}"));
    let text = message::answer(None, Err(error));
    // A new socket takes a short message; when it does not, the close says it too.
    let _ = rustix::net::send(socket, &text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

impl Session {
    pub(super) fn new(shared: Rc<Shared>, peer: Rc<Peer>) -> Self {
        Self { shared, peer }
    }

    pub(super) async fn run(self) {
        tracing::debug!(client = %self.peer.id, "QMP client connected");
        let writer = self.shared.local.spawn({
            let (local, peer) = (self.shared.local.clone(), Rc::clone(&self.peer));
            async move { peer.write(&local).await }
        });
        self.peer.send(&message::greeting(&self.shared.version));
        self.converse().await;
        self.peer.linger(&self.shared.local).await;
        drop(writer);
        let slow = self.peer.ended() == Some(Ended::TooSlow);
        tracing::debug!(client = %self.peer.id, slow, "QMP client disconnected");
        self.shared.forget(self.peer.id);
    }

    /// Reads and answers until the input ends or the client is dropped.
    async fn converse(&self) {
        let mut stream = Stream::new(Limits::REQUEST);
        let mut buffer = vec![0; READ_BYTES];
        let mut served = 0;
        loop {
            let length = self.peer.read(&self.shared.local, &mut buffer).await;
            let mut rest = buffer.get(..length).unwrap_or_default();
            loop {
                let input = if length == 0 {
                    stream.end()
                } else {
                    stream.next(&mut rest)
                };
                let Some(input) = input else { break };
                if !self.answer(input).await {
                    return;
                }
                served += 1;
                if served % REQUESTS_A_TURN == 0 {
                    self.shared.local.yield_now().await;
                }
            }
            if length == 0 {
                return;
            }
            // Input that never completes a request must not starve the others either.
            self.shared.local.yield_now().await;
        }
    }

    /// Answers one input; false when the client is no longer there.
    async fn answer(&self, input: Result<Value, ParseError>) -> bool {
        if !self.peer.room().await || self.shared.closing.get() {
            return false;
        }
        let text = match input.map(Request::from_value) {
            Err(error) => message::answer(None, Err(QmpError::generic(error.to_string()))),
            Ok(Err(refused)) => message::answer(refused.id, Err(refused.error)),
            Ok(Ok(request)) => {
                self.peer.set_busy(true);
                let id = request.id.clone();
                if let Some(result) = self.carry_out_for_somebody(request).await {
                    self.peer.send(&message::answer(id, result));
                }
                self.peer.set_busy(false);
                return true;
            }
        };
        self.peer.send(&text);
        true
    }

    /// Carries a request out. When its client goes meanwhile, that makes room for others at once; what the request does
    /// is done to its end, unless that is only to wait.
    async fn carry_out_for_somebody(&self, request: Request) -> Option<Result<Value, QmpError>> {
        let only_waits = self.shared.executor.only_waits(&request.command);
        let mut work = pin!(self.carry_out(request));
        let gone = self.peer.gone(&self.shared.local);
        match race(work.as_mut(), gone).await {
            Either::Left(result) => Some(result),
            Either::Right(()) => {
                self.peer.end(Ended::Gone);
                if !only_waits {
                    // Nobody is told.
                    let _ = work.await;
                }
                None
            }
        }
    }

    async fn carry_out(&self, request: Request) -> Result<Value, QmpError> {
        let name = request.command.as_str();
        let negotiates = name == QMP_CAPABILITIES.name();
        match (self.peer.is_negotiated(), negotiates) {
            (false, false) => {
                let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
            }
            (true, true) => {
                let desc = "Capabilities negotiation is already complete, command ignored";
                return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
            }
            _ => {}
        }
        let command = self
            .shared
            .schema
            .command(name)
            .ok_or_else(|| QmpError::command_not_found(name))?;
        command.check_arguments(&request.arguments)?;
        tracing::debug!(client = %self.peer.id, command = name, "QMP command");
        let answer = match name {
            _ if negotiates => self.negotiate(&request),
            _ if name == QUERY_VERSION.name() => to_answer(&self.shared.version),
            _ if name == QUERY_COMMANDS.name() => Ok(self
                .shared
                .schema
                .commands()
                .map(|command| serde_json::json!({"name": command.name}))
                .collect()),
            _ if name == QUERY_QMP_SCHEMA.name() => Ok(self.shared.schema.introspect()),
            _ => {
                self.shared
                    .executor
                    .execute(self.peer.id, name, request.arguments)
                    .await
            }
        };
        if cfg!(debug_assertions)
            && let Ok(answer) = &answer
            && let Err(error) = command.check_answer(answer)
        {
            tracing::error!(command = name, %error, "an answer differs from its declaration");
        }
        answer
    }

    fn negotiate(&self, request: &Request) -> Result<Value, QmpError> {
        let wanted = request.arguments.get("enable").and_then(Value::as_array);
        if let Some(capability) = wanted
            .and_then(|wanted| wanted.first())
            .and_then(Value::as_str)
        {
            return Err(QmpError::generic(format!(
                "QMP capability '{capability}' not available"
            )));
        }
        self.peer.set_negotiated();
        Ok(Value::Object(serde_json::Map::new()))
    }
}

fn to_answer(answer: &impl serde::Serialize) -> Result<Value, QmpError> {
    serde_json::to_value(answer).map_err(|error| QmpError::generic(error.to_string()))
}
