// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The watchdog, and what becomes of the machine when it barks.

use std::sync::Arc;

use ebbtide_devices::i6300esb::{Action, I6300Esb, SharedAction};
use ebbtide_qmp::types::run_state::WatchdogAction;
use ebbtide_qmp::{Properties, QmpError};

use super::{Driver, Made, Make};
use crate::hotplug::Devices;
use crate::lifecycle::Request;

/// The thread that keeps the time of all watchdogs.
const THREAD: &str = "io-timers";

pub(super) const DRIVER: Driver = Driver {
    name: "i6300esb",
    aliases: &[],
    hotpluggable: true,
    properties: &[("action", "WatchdogAction")],
    make: Make::Pci(make),
};

/// One with a property `action` does that; all others do what `watchdog-set-action` says.
fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let action = match properties.take_enum::<WatchdogAction>("action")? {
        Some(own) => Arc::new(SharedAction::new(to_device(own)?)),
        None => Arc::clone(devices.watchdog_action()),
    };
    let thread = devices.thread(THREAD)?;
    let requests = devices.requests().clone();
    let bark = move |action| requests.send(Request::Watchdog(to_qmp(action)));
    let function = I6300Esb::new(name, &thread, &action, Box::new(bark))
        .map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Made::new(function))
}

impl Devices {
    /// Changes what all watchdogs without an action of their own do.
    ///
    /// # Errors
    /// The machine cannot do that.
    pub(crate) fn set_watchdog_action(&self, action: WatchdogAction) -> Result<(), QmpError> {
        self.watchdog_action().set(to_device(action)?);
        Ok(())
    }
}

fn to_device(action: WatchdogAction) -> Result<Action, QmpError> {
    let name = action.to_string();
    name.parse()
        .map_err(|e: ebbtide_devices::Error| QmpError::generic(e.to_string()))
}

fn to_qmp(action: Action) -> WatchdogAction {
    match action {
        Action::Reset => WatchdogAction::Reset,
        Action::Shutdown => WatchdogAction::Shutdown,
        Action::Poweroff => WatchdogAction::Poweroff,
        Action::Pause => WatchdogAction::Pause,
        Action::Debug => WatchdogAction::Debug,
        Action::None => WatchdogAction::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_have_the_same_names_on_both_sides() {
        for action in Action::ALL {
            assert_eq!(to_qmp(action).to_string(), action.name());
            assert_eq!(to_device(to_qmp(action)), Ok(action));
        }
        let refused = to_device(WatchdogAction::InjectNmi).unwrap_err();
        assert!(
            refused.desc.contains("inject-nmi is not supported"),
            "{refused}"
        );
    }
}
