// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What becomes of a machine whose watchdog has barked (QMP: `WatchdogAction`, `watchdog-set-action`).

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::Error;

/// What to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Action {
    /// Reset the machine.
    #[default]
    Reset = 0,
    /// Ask the guest to power off.
    Shutdown = 1,
    /// Power the machine off.
    Poweroff = 2,
    /// Stop the vCPUs.
    Pause = 3,
    /// Say so in the log.
    Debug = 4,
    /// Nothing, but for the event.
    None = 5,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 6] = [
        Self::Reset,
        Self::Shutdown,
        Self::Poweroff,
        Self::Pause,
        Self::Debug,
        Self::None,
    ];

    /// Its name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Shutdown => "shutdown",
            Self::Poweroff => "poweroff",
            Self::Pause => "pause",
            Self::Debug => "debug",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Action {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "inject-nmi" {
            return Err(Error::WatchdogNmi);
        }
        let action = Self::ALL.into_iter().find(|action| action.name() == text);
        action.ok_or_else(|| Error::WatchdogAction(text.to_owned()))
    }
}

/// The action of all watchdogs of a machine. It may be changed at any time.
#[derive(Debug, Default)]
pub struct SharedAction(AtomicU8);

impl SharedAction {
    /// Set to `action`.
    pub fn new(action: Action) -> Self {
        Self(AtomicU8::new(action as u8))
    }

    /// What it is now.
    pub fn get(&self) -> Action {
        let value = self.0.load(Ordering::Relaxed);
        Action::ALL
            .into_iter()
            .find(|action| *action as u8 == value)
            .unwrap_or_default()
    }

    /// Changes it.
    pub fn set(&self, action: Action) {
        self.0.store(action as u8, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_actions_and_back() {
        let shared = SharedAction::default();
        assert_eq!(shared.get(), Action::Reset);
        for action in Action::ALL {
            assert_eq!(action.to_string().parse::<Action>().unwrap(), action);
            shared.set(action);
            assert_eq!(shared.get(), action);
        }
        let error = "explode".parse::<Action>().unwrap_err().to_string();
        assert!(
            error.contains("\"explode\"") && error.contains("poweroff"),
            "{error}"
        );
        let error = "inject-nmi".parse::<Action>().unwrap_err().to_string();
        assert!(error.contains("inject-nmi is not supported"), "{error}");
    }
}
