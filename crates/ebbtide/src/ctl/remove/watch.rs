// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A removal from outside: what the server tells of it, and how it ends.

use std::time::{Duration, Instant};

use ebbtide_qmp::Error;
use ebbtide_qmp::client::ReceivedEvent;
use ebbtide_qmp::commands::{EBBTIDE_QUERY_REMOVALS, QOM_LIST};
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::acpi::{AcpiDeviceOst, ejection_status};
use ebbtide_qmp::types::device::DevicePath;
use ebbtide_qmp::types::ebbtide::{Removal, RemovalHolder, RemovalPhase};
use ebbtide_qmp::types::qom::QomList;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::super::interrupt::Interrupt;
use super::super::{Failure, Session};
use super::progress::Progress;

/// How often the removal is looked at. Events make it sooner.
const POLL: Duration = Duration::from_millis(100);
/// How long a removal may be off the list before the device itself is looked for: the event that says what has become of
/// it may be on its way.
const MISSING: Duration = Duration::from_millis(500);
/// How many holders are named.
const HOLDERS: usize = 3;

/// `_OST` codes of a request to eject and of the ejection (ACPI 6.5 section 6.3.5), and of success and work under way.
const OST_EJECTION: [i64; 2] = [3, 0x103];
const OST_SUCCESS: i64 = 0;
const OST_IN_PROGRESS: i64 = 0x84;

/// How a wait for a removal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum End {
    /// Nothing of the device is left.
    Deleted,
    /// The guest keeps it.
    Refused,
    /// Somebody else has withdrawn the request.
    Withdrawn,
    /// It was forced and does not drain all the same.
    Quarantined,
    /// The user does not want to wait.
    Interrupted,
    /// It takes longer than the user wants to wait.
    Timeout,
}

/// How it ended, and what is to be said about that.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ending {
    pub(super) end: End,
    pub(super) reason: Option<String>,
}

impl Ending {
    fn new(end: End, reason: impl Into<Option<String>>) -> Self {
        Self {
            end,
            reason: reason.into(),
        }
    }

    fn withdrawn() -> Self {
        Self::new(End::Withdrawn, "the removal was withdrawn".to_owned())
    }
}

/// One device's removal.
pub(super) struct Watch {
    id: String,
    path: String,
    removal: Option<Removal>,
    /// Whether the server has a list of removals; QEMU has none.
    listed: bool,
    /// Whether the removal was asked for, by whomever.
    asked: bool,
    missing_since: Option<Instant>,
}

impl Watch {
    /// Of the device with this id or path.
    pub(super) fn new(id: &str) -> Self {
        let path = match id.starts_with('/') {
            true => id.to_owned(),
            false => format!("/machine/peripheral/{id}"),
        };
        Self {
            id: id.to_owned(),
            path,
            removal: None,
            listed: true,
            asked: false,
            missing_since: None,
        }
    }

    /// Asks the server how far it is.
    pub(super) fn look(&mut self, session: &mut Session<'_>) -> Result<(), Failure> {
        if !self.listed {
            return Ok(());
        }
        match session.call_own(&EBBTIDE_QUERY_REMOVALS, Empty {}) {
            Ok(removals) => {
                self.removal = removals
                    .into_iter()
                    .find(|removal| self.is_it(removal.id.as_deref(), &removal.path));
            }
            Err(Failure::NotEbbtide(_)) => self.listed = false,
            Err(failure) => return Err(failure),
        }
        self.asked |= self.is_pending();
        Ok(())
    }

    /// Notes that the removal was asked for.
    pub(super) fn requested(&mut self) {
        self.asked = true;
    }

    /// Whether the device is on its way out, as far as the server tells.
    pub(super) fn is_pending(&self) -> bool {
        self.phase()
            .is_some_and(|phase| phase != RemovalPhase::Plugged)
    }

    /// How far it is, as far as the server tells.
    pub(super) fn phase(&self) -> Option<RemovalPhase> {
        self.removal.as_ref().map(|removal| removal.phase)
    }

    /// What is known at once, without a wait: only that it is over.
    pub(super) fn glance(&mut self, session: &mut Session<'_>) -> Result<Option<Ending>, Failure> {
        self.look(session)?;
        while let Some(event) = session.client.next_event(Duration::ZERO)? {
            if let Some(ending) = self.judge_event(&event)? {
                return Ok(Some(ending));
            }
        }
        Ok(None)
    }

    /// Follows it until it is over, the time is, or the user does not want to wait any more.
    pub(super) fn follow(
        &mut self,
        session: &mut Session<'_>,
        limit: Option<Instant>,
        interrupt: &Interrupt,
        progress: &mut Progress,
    ) -> Result<Ending, Failure> {
        loop {
            // Events first: they came before the answer to the next question.
            let now = Instant::now();
            let poll = limit.map_or(POLL, |limit| POLL.min(limit.saturating_duration_since(now)));
            if let Some(ending) = self.wait(session, poll)? {
                return Ok(ending);
            }
            self.look(session).map_err(ended)?;
            if let Some(ending) = self.judge(session)? {
                return Ok(ending);
            }
            progress.show(self.removal.as_ref());
            if interrupt.is_seen() {
                return Ok(Ending::new(End::Interrupted, self.standing()));
            }
            if limit.is_some_and(|limit| Instant::now() >= limit) {
                return Ok(Ending::new(End::Timeout, self.standing()));
            }
        }
    }

    /// Takes the events there are, waiting a while for the first.
    fn wait(
        &mut self,
        session: &mut Session<'_>,
        mut poll: Duration,
    ) -> Result<Option<Ending>, Failure> {
        loop {
            let event = session
                .client
                .next_event(poll)
                .map_err(|error| ended(error.into()))?;
            let Some(event) = event else { return Ok(None) };
            if let Some(ending) = self.judge_event(&event)? {
                return Ok(Some(ending));
            }
            poll = Duration::ZERO;
        }
    }

    fn judge_event(&self, event: &ReceivedEvent) -> Result<Option<Ending>, Failure> {
        match event.name.as_str() {
            "DEVICE_DELETED" if self.is_about(&event.data) => {
                Ok(Some(Ending::new(End::Deleted, None)))
            }
            // A server that lists removals has told the guest's reason before, so this is no refusal.
            "DEVICE_UNPLUG_GUEST_ERROR" if self.is_about(&event.data) => {
                Ok(Some(match self.listed {
                    true => Ending::withdrawn(),
                    false => Ending::new(End::Refused, None),
                }))
            }
            // QEMU tells of a DIMM's refusal by this alone.
            "ACPI_DEVICE_OST" => Ok(self.refusal(&event.data)),
            "SHUTDOWN" => Err(Failure::Remove(
                "the machine shut down before the device was gone".to_owned(),
            )),
            _ => Ok(None),
        }
    }

    fn refusal(&self, data: &Map<String, Value>) -> Option<Ending> {
        let AcpiDeviceOst { info } = read(data)?;
        let ours = info.device.as_deref() == Some(self.id.as_str());
        let over = !matches!(info.status, OST_SUCCESS | OST_IN_PROGRESS);
        let refused = ours && OST_EJECTION.contains(&info.source) && over;
        refused.then(|| {
            let text = format!("{} (_OST {:#x})", ejection_status(info.status), info.status);
            Ending::new(End::Refused, text)
        })
    }

    /// What the list of removals says.
    fn judge(&mut self, session: &mut Session<'_>) -> Result<Option<Ending>, Failure> {
        match self.phase() {
            Some(RemovalPhase::Quarantined) => {
                return Ok(Some(Ending::new(End::Quarantined, self.standing())));
            }
            Some(phase) if phase != RemovalPhase::Plugged => {
                self.missing_since = None;
                return Ok(None);
            }
            _ if !self.listed || !self.asked => return Ok(None),
            _ => {}
        }
        // Off the list: over, one way or the other.
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        if since.elapsed() < MISSING {
            return Ok(None);
        }
        Ok(Some(match self.is_there(session)? {
            true => Ending::withdrawn(),
            false => Ending::new(End::Deleted, None),
        }))
    }

    /// Whether the machine has the device.
    fn is_there(&self, session: &mut Session<'_>) -> Result<bool, Failure> {
        let path = self.path.clone();
        match session.client.call(&QOM_LIST, QomList { path }) {
            Ok(_) => Ok(true),
            Err(Error::Command { .. }) => Ok(false),
            Err(error) => Err(ended(error.into())),
        }
    }

    fn is_about(&self, data: &Map<String, Value>) -> bool {
        read(data).is_some_and(|DevicePath { device, path }| self.is_it(device.as_deref(), &path))
    }

    fn is_it(&self, id: Option<&str>, path: &str) -> bool {
        id == Some(self.id.as_str()) || path == self.path
    }

    /// What goes on, for one who stops waiting.
    fn standing(&self) -> Option<String> {
        self.removal.as_ref().map(standing)
    }
}

/// An event's data; a server that sends something else says nothing.
fn read<T: DeserializeOwned>(data: &Map<String, Value>) -> Option<T> {
    serde_json::from_value(Value::Object(data.clone())).ok()
}

/// How far a removal is and what it waits for, for people.
pub(super) fn standing(removal: &Removal) -> String {
    let age = removal.age_ms as f64 / 1000.0;
    let waits = match (removal.phase, holders(&removal.holders)) {
        (RemovalPhase::Requested, None) => "the guest has not answered",
        (RemovalPhase::GuestOfflining, None) => "the guest is working on it",
        (_, None) => return format!("{} for {age:.1} s", removal.phase),
        (_, Some(holders)) => {
            return format!("{} for {age:.1} s, held by {holders}", removal.phase);
        }
    };
    format!("{} for {age:.1} s, {waits}", removal.phase)
}

fn holders(holders: &[RemovalHolder]) -> Option<String> {
    let mut named: Vec<String> = holders
        .iter()
        .take(HOLDERS)
        .map(|holder| match holder.age_ms {
            Some(ms) => format!("{} ({:.1} s)", holder.what, ms as f64 / 1000.0),
            None => holder.what.clone(),
        })
        .collect();
    if holders.len() > HOLDERS {
        named.push(format!("{} more", holders.len() - HOLDERS));
    }
    (!named.is_empty()).then(|| named.join(", "))
}

/// A connection that ends says that the machine did.
fn ended(failure: Failure) -> Failure {
    match failure {
        Failure::Qmp(Error::Closed { .. }) => {
            Failure::Remove("the machine ended before the device was gone".to_owned())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(name: &str, data: Value) -> ReceivedEvent {
        serde_json::from_value(json!({
            "event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}
        }))
        .unwrap()
    }

    fn ost(device: &str, source: i64, status: i64) -> ReceivedEvent {
        event(
            "ACPI_DEVICE_OST",
            json!({"info": {"device": device, "slot": "0", "slot-type": "DIMM", "source": source, "status": status}}),
        )
    }

    #[test]
    fn only_what_is_about_this_device_counts() {
        let watch = Watch::new("d0");
        let end = |name: &str, data| {
            let ending = watch.judge_event(&event(name, data)).unwrap();
            ending.map(|ending| ending.end)
        };
        let path = |path: &str| json!({ "path": path });
        assert_eq!(
            end(
                "DEVICE_DELETED",
                path("/machine/peripheral/d0/virtio-backend")
            ),
            None,
            "a part of it"
        );
        assert_eq!(
            end(
                "DEVICE_DELETED",
                json!({"device": "d1", "path": "/machine/peripheral/d1"})
            ),
            None
        );
        assert_eq!(
            end("DEVICE_DELETED", path("/machine/peripheral/d0")),
            Some(End::Deleted)
        );
        assert_eq!(
            end(
                "DEVICE_UNPLUG_GUEST_ERROR",
                json!({"device": "d0", "path": "x"})
            ),
            Some(End::Withdrawn)
        );
        assert_eq!(
            end("DEVICE_DELETED", json!({"path": 7})),
            None,
            "a server that lies does no harm"
        );
        let named_by_path = Watch::new("/machine/peripheral/d0");
        assert!(named_by_path.is_it(None, "/machine/peripheral/d0"));
    }

    #[test]
    fn the_guests_reason_is_told() {
        let watch = Watch::new("dimm0");
        let judge = |event| watch.judge_event(&event).unwrap();
        assert_eq!(
            judge(ost("dimm0", 3, 0x82)),
            Some(Ending::new(
                End::Refused,
                "the device is busy (_OST 0x82)".to_owned()
            ))
        );
        assert!(judge(ost("dimm0", 0x103, 1)).is_some());
        for other in [
            ost("dimm0", 3, 0),
            ost("dimm0", 3, 0x84),
            ost("dimm0", 1, 1),
            ost("dimm1", 3, 1),
        ] {
            assert_eq!(judge(other), None);
        }
    }

    #[test]
    fn holders_are_named_up_to_a_number() {
        let removal = |phase, count: usize| Removal {
            id: None,
            path: String::new(),
            phase,
            age_ms: 1500,
            holders: (0..count)
                .map(|index| RemovalHolder {
                    what: format!("read {index}"),
                    age_ms: (index == 0).then_some(1000),
                })
                .collect(),
            history: Vec::new(),
        };
        assert_eq!(
            standing(&removal(RemovalPhase::Requested, 0)),
            "requested for 1.5 s, the guest has not answered"
        );
        assert_eq!(
            standing(&removal(RemovalPhase::Draining, 5)),
            "draining for 1.5 s, held by read 0 (1.0 s), read 1, read 2, 2 more"
        );
        assert_eq!(
            standing(&removal(RemovalPhase::Detached, 0)),
            "detached for 1.5 s"
        );
    }
}
