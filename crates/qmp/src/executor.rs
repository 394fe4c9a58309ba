// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who carries commands out.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::schema::{Command, CommandInfo, Qapi};

/// One connection to the server; never used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u64);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An answer that is being worked on, on the control thread.
pub type Answer = Pin<Box<dyn Future<Output = Result<Value, QmpError>>>>;

/// Carries commands out, on the control thread.
pub trait Executor {
    /// Starts a command of [`Executor::commands`] with arguments that fit its declaration.
    ///
    /// The next command of the same client starts when the future is ready; other clients go on. The future
    /// is run to its end when the client goes away, unless the command [only waits](Executor::only_waits), and is dropped
    /// when the server is.
    fn execute(&self, client: ClientId, command: &str, arguments: Map<String, Value>) -> Answer;

    /// Whether a command changes nothing and may take for ever, so that it is of no use to anybody but its client.
    fn only_waits(&self, command: &str) -> bool {
        let _ = command;
        false
    }

    /// The commands there are, besides those the server answers itself.
    fn commands(&self) -> Vec<CommandInfo>;
}

type Run<S> = Box<dyn Fn(Rc<S>, ClientId, Map<String, Value>) -> Answer>;

/// An [`Executor`] made of typed functions on a shared state `S`: what is declared is what is there.
///
/// ```
/// use ebbtide_qmp::{CommandTable, Executor, QmpError, commands, schema::Empty, types::run_state::{RunState, StatusInfo}};
/// struct Machine { state: RunState }
/// let table = CommandTable::new(std::rc::Rc::new(Machine { state: RunState::Running }))
///     .on(commands::QUERY_STATUS, async |machine, _client, Empty {}| Ok(StatusInfo::new(machine.state)))
///     .on(commands::STOP, async |_machine, _client, Empty {}| Err(QmpError::generic("not now")));
/// assert_eq!(table.commands().len(), 2);
/// ```
pub struct CommandTable<S> {
    state: Rc<S>,
    entries: HashMap<&'static str, (CommandInfo, Run<S>)>,
    waits: HashSet<&'static str>,
}

impl<S: 'static> CommandTable<S> {
    /// A table without commands.
    pub fn new(state: Rc<S>) -> Self {
        Self {
            state,
            entries: HashMap::new(),
            waits: HashSet::new(),
        }
    }

    /// Adds a command, or replaces the one of the same name.
    #[must_use]
    pub fn on<A, R, F, Fut>(mut self, command: Command<A, R>, run: F) -> Self
    where
        A: Qapi + 'static,
        R: Qapi + 'static,
        F: Fn(Rc<S>, ClientId, A) -> Fut + 'static,
        Fut: Future<Output = Result<R, QmpError>> + 'static,
    {
        let run: Run<S> = Box::new(move |state, client, arguments| {
            match serde_json::from_value(Value::Object(arguments)) {
                Ok(arguments) => {
                    let work = run(state, client, arguments);
                    Box::pin(async move {
                        serde_json::to_value(work.await?).map_err(|error| {
                            QmpError::generic(format!("cannot write the answer: {error}"))
                        })
                    })
                }
                // Arguments were checked against their shape; what is left is a number out of range.
                Err(error) => Box::pin(std::future::ready(Err(QmpError::generic(format!(
                    "Invalid parameter: {error}"
                ))))),
            }
        });
        self.entries.insert(command.name(), (command.info(), run));
        self
    }
}

impl<S: 'static> CommandTable<S> {
    /// Declares that a command of the table [only waits](Executor::only_waits).
    #[must_use]
    pub fn waits<A: Qapi, R: Qapi>(mut self, command: Command<A, R>) -> Self {
        self.waits.insert(command.name());
        self
    }
}

impl<S: 'static> Executor for CommandTable<S> {
    fn only_waits(&self, command: &str) -> bool {
        self.waits.contains(command)
    }

    fn execute(&self, client: ClientId, command: &str, arguments: Map<String, Value>) -> Answer {
        match self.entries.get(command) {
            Some((_, run)) => run(Rc::clone(&self.state), client, arguments),
            None => Box::pin(std::future::ready(Err(QmpError::command_not_found(
                command,
            )))),
        }
    }

    fn commands(&self) -> Vec<CommandInfo> {
        self.entries.values().map(|(info, _)| *info).collect()
    }
}
