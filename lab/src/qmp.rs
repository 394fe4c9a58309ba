// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small blocking QMP client: what a test needs to drive a VMM.
//!
//! The lab has one of its own, so that a VMM is not tested with its own half
//! of the protocol.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::delay;

/// Answers come at once unless something is badly wrong.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection, negotiated.
#[derive(Debug)]
pub struct Qmp {
    writer: UnixStream,
    incoming: Receiver<(Value, Instant)>,
    greeting: Value,
    events: VecDeque<QmpEvent>,
    next_id: u64,
}

/// An event and the time it came in.
#[derive(Clone, Debug)]
pub struct QmpEvent {
    /// Its name.
    pub name: String,
    /// Its data, or null.
    pub data: Value,
    /// When it came in, whenever it was asked for.
    pub at: Instant,
}

/// An error a command was answered with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{command}: {class}: {desc}")]
pub struct QmpError {
    /// The command.
    pub command: String,
    /// The error class.
    pub class: String,
    /// The description.
    pub desc: String,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// The socket refuses, or what greets us is no QMP server.
    pub fn connect(path: &Path) -> Result<Qmp> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        Qmp::over(stream)
    }

    /// Negotiates over a stream.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn over(stream: UnixStream) -> Result<Qmp> {
        let reader = BufReader::new(stream.try_clone().context("QMP socket")?);
        let (sender, incoming) = mpsc::channel();
        std::thread::spawn(move || {
            for line in reader.lines().map_while(|line| line.ok()) {
                let value = serde_json::from_str(&line).unwrap_or_else(|_| Value::String(line));
                if sender.send((value, Instant::now())).is_err() {
                    break;
                }
            }
        });
        let mut qmp = Qmp {
            writer: stream,
            incoming,
            greeting: Value::Null,
            events: VecDeque::new(),
            next_id: 1,
        };
        (qmp.greeting, _) = qmp.receive(Instant::now() + ANSWER_TIMEOUT, "QMP greeting")?;
        if qmp.greeting.pointer("/QMP/version").is_none() {
            bail!("no QMP greeting: {}", qmp.greeting);
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// What the server greeted us with.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Executes a command; `arguments` may be null.
    ///
    /// # Errors
    /// [`QmpError`] when the server refuses; otherwise the connection is lost.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let line = request.to_string() + "\n";
        delay::pass();
        self.writer
            .write_all(line.as_bytes())
            .with_context(|| format!("send {command}"))?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let (mut answer, at) = self.receive(deadline, command)?;
            if let Some(error) = answer.get("error") {
                let text = |name: &str| {
                    error
                        .get(name)
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned()
                };
                return Err(QmpError {
                    command: command.to_owned(),
                    class: text("class"),
                    desc: text("desc"),
                }
                .into());
            }
            if answer.get("id") == Some(&json!(id))
                && let Some(result) = answer.get_mut("return")
            {
                return Ok(result.take());
            }
            self.keep_event(answer, at)?;
        }
    }

    /// Waits for an event of this name; others are kept for later calls.
    ///
    /// # Errors
    /// It doesn't come in time, or the connection is lost.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<QmpEvent> {
        delay::pass();
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(index) = self.events.iter().position(|event| event.name == name)
                && let Some(event) = self.events.remove(index)
            {
                return Ok(event);
            }
            let (message, at) = self.receive(deadline, &format!("event {name}"))?;
            self.keep_event(message, at)?;
        }
    }

    /// All events that have come and nobody has asked for.
    ///
    /// # Errors
    /// What came in is no event.
    pub fn take_events(&mut self) -> Result<Vec<QmpEvent>> {
        delay::pass();
        while let Ok((message, at)) = self.incoming.try_recv() {
            self.keep_event(message, at)?;
        }
        Ok(self.events.drain(..).collect())
    }

    fn receive(&mut self, deadline: Instant, what: &str) -> Result<(Value, Instant)> {
        match self
            .incoming
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(received) => Ok(received),
            Err(RecvTimeoutError::Timeout) => bail!("waited in vain for QMP: {what}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the QMP connection was closed: {what}"),
        }
    }

    fn keep_event(&mut self, message: Value, at: Instant) -> Result<()> {
        let name = message.get("event").and_then(Value::as_str);
        let name = name
            .ok_or_else(|| anyhow!("neither an answer nor an event: {message}"))?
            .to_owned();
        let data = message.get("data").cloned().unwrap_or(Value::Null);
        self.events.push_back(QmpEvent { name, data, at });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0},"package":""},"capabilities":[]}}"#;

    /// A server that answers each request with the next of `answers`; `ID`
    /// stands for the request's id.
    fn served(answers: &'static [&'static str]) -> Result<Qmp> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            theirs
                .write_all(format!("{GREETING}\n").as_bytes())
                .unwrap();
            let reader = BufReader::new(theirs.try_clone().unwrap());
            for (request, answer) in reader.lines().zip(answers) {
                let request: Value = serde_json::from_str(&request.unwrap()).unwrap();
                theirs
                    .write_all(answer.replace("ID", &request["id"].to_string()).as_bytes())
                    .unwrap();
            }
        });
        Qmp::over(ours)
    }

    #[test]
    fn events_before_an_answer_are_kept() {
        let mut qmp = served(&[
            "{\"return\":{},\"id\":ID}\n",
            "{\"event\":\"STOP\"}\n{\"event\":\"RESUME\",\"data\":{\"a\":1}}\n{\"return\":5,\"id\":ID}\n",
        ])
        .unwrap();
        assert_eq!(qmp.execute("query", json!({"x": 1})).unwrap(), json!(5));
        assert_eq!(
            qmp.wait_event("RESUME", Duration::ZERO).unwrap().data,
            json!({"a": 1})
        );
        let rest = qmp.take_events().unwrap();
        assert_eq!((rest.len(), rest[0].name.as_str()), (1, "STOP"));
        assert!(qmp.wait_event("RESET", Duration::from_millis(10)).is_err());
    }

    #[test]
    fn refusals_are_typed_and_other_ends_are_errors() {
        const ANSWERS: [&str; 2] = [
            "{\"return\":{},\"id\":ID}\n",
            "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"no\"},\"id\":ID}\n",
        ];
        let mut qmp = served(&ANSWERS).unwrap();
        let error = qmp.execute("fly", Value::Null).unwrap_err();
        assert_eq!(
            error.downcast_ref::<QmpError>().unwrap().class,
            "CommandNotFound"
        );
        let error = qmp.execute("fly", Value::Null).unwrap_err().to_string();
        assert!(
            error.contains("closed") || error.contains("send"),
            "{error}"
        );
    }

    #[test]
    fn a_server_that_is_no_qmp_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap();
        assert!(
            Qmp::over(ours)
                .unwrap_err()
                .to_string()
                .contains("no QMP greeting")
        );
    }
}
