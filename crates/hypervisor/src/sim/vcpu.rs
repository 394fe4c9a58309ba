// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU whose guest is a script.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;
use super::map::Doorbells;
use crate::{BootState, Error, Exit, Kicker, SystemEventKind, Vcpu, VcpuState};

/// One thing a guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reads `size` bytes of memory no slot backs.
    Load {
        /// Address.
        gpa: u64,
        /// 1, 2, 4 or 8.
        size: u8,
    },
    /// Writes memory no slot backs.
    Store {
        /// Address.
        gpa: u64,
        /// 1, 2, 4 or 8 bytes.
        data: Vec<u8>,
    },
    /// Reads a port, `count` times in one instruction.
    In {
        /// Port.
        port: u16,
        /// Bytes per unit: 1, 2 or 4.
        size: u8,
        /// Units.
        count: usize,
    },
    /// Writes a port; more data than `size` is a string instruction.
    Out {
        /// Port.
        port: u16,
        /// Bytes per unit: 1, 2 or 4.
        size: u8,
        /// A whole number of units.
        data: Vec<u8>,
    },
    /// Halts with interrupts off.
    Halt,
    /// Triple-faults.
    Shutdown,
    /// Asks the hypervisor for something.
    SystemEvent(SystemEventKind),
    /// Touches an inaccessible page of a slot.
    MemoryFault {
        /// Address, if the hypervisor tells.
        gpa: Option<u64>,
    },
    /// Does what the hypervisor cannot.
    InternalError {
        /// What the report says.
        detail: String,
    },
}

impl Step {
    /// The bytes that the exit carries: room for the answer, or what the guest wrote.
    fn data(&self) -> Vec<u8> {
        match self {
            Self::Load { size, .. } => vec![0; (*size).into()],
            Self::In { size, count, .. } => vec![0; usize::from(*size) * count],
            Self::Store { data, .. } | Self::Out { data, .. } => data.clone(),
            _ => Vec::new(),
        }
    }

    fn exit<'a>(&'a self, bytes: &'a mut [u8]) -> Exit<'a> {
        match *self {
            Self::Load { gpa, .. } => Exit::MmioRead { gpa, data: bytes },
            Self::Store { gpa, .. } => Exit::MmioWrite { gpa, data: bytes },
            Self::In { port, size, .. } => Exit::PortIn {
                port,
                size,
                data: bytes,
            },
            Self::Out { port, size, .. } => Exit::PortOut {
                port,
                size,
                data: bytes,
            },
            Self::Halt => Exit::Halt,
            Self::Shutdown => Exit::Shutdown,
            Self::SystemEvent(kind) => Exit::SystemEvent { kind },
            Self::MemoryFault { gpa } => Exit::MemoryFault { gpa, rip: 0 },
            Self::InternalError { ref detail } => Exit::InternalError {
                suberror: 1,
                detail: detail.clone(),
            },
        }
    }
}

/// What a vCPU's guest does, and what came of it.
#[derive(Clone)]
pub struct Script(Arc<Inner>);

struct Inner {
    index: u8,
    memory: Arc<Doorbells>,
    ports: Arc<Doorbells>,
    state: Mutex<State>,
    /// A step was added or ended, or a kick came.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// A vCPU plays it.
    taken: bool,
    /// Steps ever added, and what is left of them.
    added: usize,
    steps: VecDeque<Step>,
    /// The answers to the steps that ended, in order; empty for those that have none.
    answers: Vec<Vec<u8>>,
    kicked: bool,
    boot: Option<BootState>,
    paused_marks: u32,
}

impl Script {
    pub(super) fn new(index: u8, memory: Arc<Doorbells>, ports: Arc<Doorbells>) -> Self {
        Self(Arc::new(Inner {
            index,
            memory,
            ports,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// The vCPU's index.
    pub fn index(&self) -> u8 {
        self.0.index
    }

    /// Adds a step.
    pub fn push(&self, step: Step) {
        let mut state = lock(&self.0.state);
        state.added += 1;
        state.steps.push_back(step);
        self.0.changed.notify_all();
    }

    /// Adds a step and waits until it has ended: until the vCPU has been run again after its exit. What the guest read;
    /// `None` if that took longer than `limit`.
    pub fn perform(&self, step: Step, limit: Duration) -> Option<Vec<u8>> {
        let mut state = lock(&self.0.state);
        let number = state.added;
        state.added += 1;
        state.steps.push_back(step);
        self.0.changed.notify_all();
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(state, limit, |state| state.answers.len() <= number)
            .unwrap_or_else(PoisonError::into_inner);
        state.answers.get(number).cloned()
    }

    /// The answers to the steps that ended, in order; those of stores and other steps are what the guest wrote.
    pub fn answers(&self) -> Vec<Vec<u8>> {
        lock(&self.0.state).answers.clone()
    }

    /// The boot state the vCPU was given last.
    pub fn boot_state(&self) -> Option<BootState> {
        lock(&self.0.state).boot.clone()
    }

    /// How often the guest was told that it was stopped.
    pub fn paused_marks(&self) -> u32 {
        lock(&self.0.state).paused_marks
    }

    pub(super) fn take_guest(&self) -> bool {
        !std::mem::replace(&mut lock(&self.0.state).taken, true)
    }

    /// A store that an ioeventfd waits for ends without an exit.
    fn rings(&self, step: &Step) -> bool {
        match step {
            Step::Store { gpa, data } => self.0.memory.ring(*gpa, data),
            Step::Out { port, size, data } if data.len() == usize::from(*size) => {
                self.0.ports.ring((*port).into(), data)
            }
            _ => false,
        }
    }

    fn end_step(&self, answer: Vec<u8>) {
        lock(&self.0.state).answers.push(answer);
        self.0.changed.notify_all();
    }

    /// The next step that exits; `None` when kicked.
    fn next(&self) -> Option<Step> {
        loop {
            let state = lock(&self.0.state);
            let mut state = self
                .0
                .changed
                .wait_while(state, |state| !state.kicked && state.steps.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            if state.kicked {
                state.kicked = false;
                return None;
            }
            let step = state.steps.pop_front()?;
            drop(state);
            if !self.rings(&step) {
                return Some(step);
            }
            self.end_step(step.data());
        }
    }
}

pub(super) struct SimVcpu {
    script: Script,
    /// The step whose exit is being served, and its data.
    current: Option<(Step, Vec<u8>)>,
}

impl SimVcpu {
    pub(super) fn new(script: Script) -> Self {
        Self {
            script,
            current: None,
        }
    }
}

/// All the guest can see of this processor.
struct SimState {
    boot: Option<BootState>,
}

impl Vcpu for SimVcpu {
    fn index(&self) -> u8 {
        self.script.index()
    }

    fn bind_thread(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, Error> {
        if let Some((_, answer)) = self.current.take() {
            self.script.end_step(answer);
        }
        let Some(step) = self.script.next() else {
            return Ok(Exit::Interrupted);
        };
        let data = step.data();
        let (step, data) = self.current.insert((step, data));
        Ok(step.exit(data))
    }

    fn kicker(&self) -> Kicker {
        let script = Arc::downgrade(&self.script.0);
        Kicker::new(move || {
            if let Some(script) = script.upgrade() {
                lock(&script.state).kicked = true;
                script.changed.notify_all();
            }
        })
    }

    fn set_boot_state(&mut self, boot: &BootState) -> Result<(), Error> {
        lock(&self.script.0.state).boot = Some(boot.clone());
        Ok(())
    }

    fn save(&self) -> Result<VcpuState, Error> {
        if self.current.is_some() {
            return Err(Error::AnswerDue { vcpu: self.index() });
        }
        let boot = lock(&self.script.0.state).boot.clone();
        Ok(VcpuState(Box::new(SimState { boot })))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let Some(SimState { boot }) = state.0.downcast_ref() else {
            return Err(Error::ForeignState {
                object: format!("vcpu {}", self.index()),
            });
        };
        if let Some((_, answer)) = self.current.take() {
            self.script.end_step(answer);
        }
        lock(&self.script.0.state).boot = boot.clone();
        Ok(())
    }

    fn mark_paused(&self) -> Result<(), Error> {
        lock(&self.script.0.state).paused_marks += 1;
        Ok(())
    }
}

impl Drop for SimVcpu {
    fn drop(&mut self) {
        lock(&self.script.0.state).taken = false;
    }
}
