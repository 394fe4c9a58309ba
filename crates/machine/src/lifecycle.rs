// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The run state of the machine, and the one task that changes it.
//!
//! ```text
//!                 stop                    reset (guest, monitor, triple fault)
//!   Running ◀────────────▶ Paused        park · drain devices · part memory · unplug it · power-on state
//!      │          cont                    └─▶ as before: Running or Paused
//!      │ watchdog: as what it does says, or as a stop into Watchdog
//!      │ memory fault, KVM error
//!      ▼
//!   InternalError ── reset ─▶ Running
//!
//!   any ── quit, power-off, signal, reset with --no-reboot ─▶ Shutdown (drains, then the VM ends)
//! ```
//!
//! Requests come through a channel from vCPUs, devices, monitors and signals, and are done one
//! after the other: a reset never meets half of a stop. What a guest asked for dies with it: Linux
//! pulls the reset line of the keyboard controller ten times, and the guest that comes after the
//! first pull must not be reset by the second. A reset that a monitor asks for is done, too, when
//! another has brought a new guest since.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ebbtide_iothread::{Sender, oneshot};
use ebbtide_qmp::types::run_state::{RunState, ShutdownCause, WatchdogAction};

use crate::cpus::CpuEvent;

/// Something that changes, or may change, the run state.
pub enum Request {
    /// Take the guest off the vCPUs.
    Stop(oneshot::Sender<()>),
    /// Let it go on.
    Continue(oneshot::Sender<Result<(), String>>),
    /// Put machine and guest back to power-on.
    Reset {
        /// Who asked.
        cause: ShutdownCause,
    },
    /// Press the power button.
    PowerButton,
    /// End the VM.
    Shutdown {
        /// Who asked.
        cause: ShutdownCause,
    },
    /// The guest has let a watchdog run out, which is to do this.
    Watchdog(WatchdogAction),
    /// A vCPU says something.
    Cpu(CpuEvent),
    /// Memory of the guest is lost, for this reason.
    MemoryLost(String),
}

impl Request {
    /// Whether the guest made it, by a register or a fault.
    fn is_of_guest(&self) -> bool {
        match self {
            Request::Reset { cause } | Request::Shutdown { cause } => matches!(
                cause,
                ShutdownCause::GuestReset | ShutdownCause::GuestShutdown
            ),
            Request::Cpu(_) | Request::Watchdog(_) => true,
            Request::Stop(_)
            | Request::Continue(_)
            | Request::PowerButton
            | Request::MemoryLost(_) => false,
        }
    }
}

/// A request on its way.
pub struct Posted {
    request: Request,
    /// Which guest was there when it was made, counted from power-on.
    guest: u64,
}

/// Sends requests to the lifecycle task; never blocks.
#[derive(Clone)]
pub struct Requests {
    channel: Sender<Posted>,
    guest: Arc<AtomicU64>,
    /// Who wants the VM to end, whatever the guest does.
    ending: Arc<OnceLock<ShutdownCause>>,
}

impl Requests {
    /// A sender on `channel`.
    pub fn new(channel: Sender<Posted>) -> Requests {
        Requests {
            channel,
            guest: Arc::default(),
            ending: Arc::default(),
        }
    }

    /// Posts `request`.
    pub fn send(&self, request: Request) {
        // A vCPU that is parked has sent what it had to send, and parking synchronises: no vCPU
        // reads the number of the next guest while it runs the old one.
        let guest = self.guest.load(Ordering::Relaxed);
        if let Request::Shutdown { cause } = request
            && !request.is_of_guest()
        {
            // Set already: that comes first.
            let _ = self.ending.set(cause);
        }
        self.channel.send(Posted { request, guest });
    }

    /// From now on another guest runs. All vCPUs must be parked.
    pub fn next_guest(&self) {
        self.guest.fetch_add(1, Ordering::Relaxed);
    }

    /// What is to be done about `posted`: nothing if it comes from a guest that is no more, or was to end that guest
    /// alone.
    pub fn receive(&self, posted: Posted) -> Option<Request> {
        let current = posted.guest == self.guest.load(Ordering::Relaxed);
        let reset = matches!(posted.request, Request::Reset { .. });
        (current || !reset && !posted.request.is_of_guest()).then_some(posted.request)
    }

    /// Who else than the guest has asked for the end of the VM, which will be done when its turn has come: whatever waits
    /// without a limit meanwhile has to give up.
    pub fn ending(&self) -> Option<ShutdownCause> {
        self.ending.get().copied()
    }

    /// Asks for a reset without waiting for it.
    pub fn reset(&self, cause: ShutdownCause) {
        self.send(Request::Reset { cause });
    }

    /// Asks for the end of the VM.
    pub fn shutdown(&self, cause: ShutdownCause) {
        self.send(Request::Shutdown { cause });
    }
}

/// How the VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Who ended it.
    pub cause: ShutdownCause,
    /// Devices whose requests did not end within the drain time-out.
    pub undrained: Vec<String>,
}

/// What a request leads to, decided without doing anything: tested alone.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do.
    Nothing,
    /// Park the vCPUs and be in this state.
    Halt(RunState),
    /// Let the vCPUs run.
    Go,
    /// Reset, then be as before.
    Reset {
        /// For the RESET event.
        cause: ShutdownCause,
        /// Whether the vCPUs run afterwards.
        then_run: bool,
    },
    /// Tell the guest that the power button was pressed.
    Button,
    /// End the VM.
    End(ShutdownCause),
}

/// What the lifecycle does on a stop.
pub fn on_stop(state: RunState) -> Step {
    match state {
        RunState::Running => Step::Halt(RunState::Paused),
        _ => Step::Nothing,
    }
}

/// Whether who halts in `state` has to tell it by a STOP event: a guest that stands still, be it
/// that another vCPU has failed before, is not stopped once more.
pub fn halt_is_news(state: RunState) -> bool {
    state == RunState::Running
}

/// What the lifecycle does on a continue.
///
/// # Errors
/// When the guest can't go on from `state`.
pub fn on_continue(state: RunState) -> Result<Step, String> {
    match state {
        RunState::Running => Ok(Step::Nothing),
        RunState::Paused | RunState::PreLaunch | RunState::Watchdog => Ok(Step::Go),
        _ => Err("Resetting the Virtual Machine is required".into()),
    }
}

/// What the lifecycle does when a reset is asked for.
pub fn on_reset(state: RunState, cause: ShutdownCause, no_reboot: bool) -> Step {
    match (state, no_reboot) {
        (_, true) => Step::End(cause),
        (RunState::Paused | RunState::PreLaunch | RunState::Watchdog, false) => Step::Reset {
            cause,
            then_run: false,
        },
        (_, false) => Step::Reset {
            cause,
            then_run: true,
        },
    }
}

/// What the lifecycle does when a watchdog has run out.
pub fn on_watchdog(state: RunState, action: WatchdogAction, no_reboot: bool) -> Step {
    match (action, state) {
        (WatchdogAction::Reset, _) => on_reset(state, ShutdownCause::GuestReset, no_reboot),
        (WatchdogAction::Shutdown, _) => Step::Button,
        (WatchdogAction::Poweroff, _) => Step::End(ShutdownCause::GuestShutdown),
        // One that was stopped meanwhile stands still for another reason.
        (WatchdogAction::Pause, RunState::Running) => Step::Halt(RunState::Watchdog),
        (WatchdogAction::Debug, _) => {
            tracing::warn!("the guest has let its watchdog run out");
            Step::Nothing
        }
        (WatchdogAction::Pause | WatchdogAction::None, _) => Step::Nothing,
        // No watchdog has this action: it is refused when it is set.
        (WatchdogAction::InjectNmi, _) => Step::Nothing,
    }
}

/// What the lifecycle does when memory of the guest is lost.
pub fn on_memory_lost(state: RunState) -> Step {
    match state {
        RunState::Running => Step::Halt(RunState::InternalError),
        // It must not go on with what it has now, and will be stopped when it does.
        _ => Step::Nothing,
    }
}

/// What the lifecycle does when a vCPU reports `event`.
pub fn on_cpu(state: RunState, event: &CpuEvent, no_reboot: bool) -> Step {
    match event {
        CpuEvent::TripleFault { .. } => on_reset(state, ShutdownCause::GuestReset, no_reboot),
        CpuEvent::System { reset: true } => on_reset(state, ShutdownCause::GuestReset, no_reboot),
        CpuEvent::System { reset: false } => Step::End(ShutdownCause::GuestShutdown),
        CpuEvent::MemoryFault { .. } | CpuEvent::Failed { .. } => {
            Step::Halt(RunState::InternalError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_and_continue() {
        assert_eq!(on_stop(RunState::Running), Step::Halt(RunState::Paused));
        assert_eq!(on_stop(RunState::Paused), Step::Nothing);
        assert_eq!(on_stop(RunState::InternalError), Step::Nothing);
        assert!(halt_is_news(RunState::Running));
        assert!(!halt_is_news(RunState::Paused));
        assert!(!halt_is_news(RunState::InternalError));
        assert_eq!(on_continue(RunState::Paused), Ok(Step::Go));
        assert_eq!(on_continue(RunState::Running), Ok(Step::Nothing));
        let lost = on_memory_lost(RunState::Running);
        assert_eq!(lost, Step::Halt(RunState::InternalError));
        assert_eq!(on_memory_lost(RunState::Paused), Step::Nothing);
        assert!(on_continue(RunState::InternalError).is_err());
    }

    #[test]
    fn reset_keeps_the_guest_as_it_was() {
        let cause = ShutdownCause::HostQmpSystemReset;
        let reset = |then_run| Step::Reset { cause, then_run };
        assert_eq!(on_reset(RunState::Running, cause, false), reset(true));
        assert_eq!(on_reset(RunState::Paused, cause, false), reset(false));
        assert_eq!(on_reset(RunState::InternalError, cause, false), reset(true));
        assert_eq!(on_reset(RunState::Running, cause, true), Step::End(cause));
    }

    #[test]
    fn what_a_guest_asked_for_dies_with_it() {
        let (sender, mut channel) = ebbtide_iothread::channel();
        let requests = Requests::new(sender);
        let mut next = || {
            let posted = channel.try_recv().expect("a request is there");
            requests.receive(posted)
        };
        let fault = CpuEvent::TripleFault { cpu: 1 };
        requests.reset(ShutdownCause::GuestReset);
        requests.reset(ShutdownCause::GuestReset);
        requests.send(Request::Cpu(fault.clone()));
        requests.shutdown(ShutdownCause::GuestShutdown);
        requests.reset(ShutdownCause::HostQmpSystemReset);
        assert_eq!(requests.ending(), None, "of a guest that may be no more");
        requests.send(Request::PowerButton);
        requests.shutdown(ShutdownCause::HostSignal);
        requests.shutdown(ShutdownCause::HostQmpQuit);
        assert_eq!(requests.ending(), Some(ShutdownCause::HostSignal));
        assert!(matches!(next(), Some(Request::Reset { .. })));
        requests.next_guest();
        requests.send(Request::Cpu(fault));
        requests.reset(ShutdownCause::HostQmpSystemReset);
        for _ in 0..4 {
            assert!(next().is_none(), "of the guest before");
        }
        assert!(matches!(next(), Some(Request::PowerButton)));
        assert!(matches!(next(), Some(Request::Shutdown { .. })));
        assert!(matches!(next(), Some(Request::Shutdown { .. })));
        assert!(matches!(next(), Some(Request::Cpu(_))), "of this guest");
        assert!(matches!(next(), Some(Request::Reset { .. })));
    }

    #[test]
    fn a_watchdog_does_what_its_action_says() {
        use WatchdogAction::{Debug, None, Pause, Poweroff, Reset, Shutdown};
        let step = |action| on_watchdog(RunState::Running, action, false);
        let cause = ShutdownCause::GuestReset;
        let then_run = true;
        assert_eq!(step(Reset), Step::Reset { cause, then_run });
        assert_eq!(
            on_watchdog(RunState::Running, Reset, true),
            Step::End(cause)
        );
        assert_eq!(step(Shutdown), Step::Button);
        assert_eq!(step(Poweroff), Step::End(ShutdownCause::GuestShutdown));
        assert_eq!(step(Debug), Step::Nothing);
        assert_eq!(step(None), Step::Nothing);
        assert_eq!(step(Pause), Step::Halt(RunState::Watchdog));
        assert_eq!(on_watchdog(RunState::Paused, Pause, false), Step::Nothing);
        assert_eq!(on_continue(RunState::Watchdog), Ok(Step::Go));
        let then_run = false;
        let reset = on_reset(RunState::Watchdog, cause, false);
        assert_eq!(reset, Step::Reset { cause, then_run });
    }

    #[test]
    fn triple_fault_reboots_and_faults_halt() {
        let fault = CpuEvent::TripleFault { cpu: 0 };
        assert!(matches!(
            on_cpu(RunState::Running, &fault, false),
            Step::Reset { then_run: true, .. }
        ));
        assert_eq!(
            on_cpu(RunState::Running, &fault, true),
            Step::End(ShutdownCause::GuestReset)
        );
        let fault = CpuEvent::MemoryFault {
            cpu: 1,
            gpa: None,
            rip: 0,
        };
        assert_eq!(
            on_cpu(RunState::Running, &fault, false),
            Step::Halt(RunState::InternalError)
        );
    }
}
