// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl unplug`, `ctl disk remove`, `ctl net remove`: the guest is asked to let go; when the device is gone, its backend
//! is closed too.

mod backend;
mod progress;
mod watch;

use std::time::{Duration, Instant};

use clap::Args;
use ebbtide_qmp::commands::{DEVICE_DEL, EBBTIDE_DEVICE_FORCE};
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::device::DeviceDel;
use ebbtide_qmp::types::ebbtide::DeviceId;
use ebbtide_qmp::{Error, ErrorClass, QmpError};
use serde::Serialize;

use super::backend::Backend;
use super::interrupt::Interrupt;
use super::{Failure, Outcome, Session};
use backend::Behind;
use progress::Progress;
use watch::{End, Ending, Watch};

/// The options of all commands that remove a device.
#[derive(Args)]
pub(super) struct RemoveArgs {
    /// The device's id
    #[arg(value_name = "ID")]
    id: String,
    /// Wait until it is gone and close its backend, or until the guest refuses
    #[arg(long)]
    wait: bool,
    /// Wait no longer than this many seconds; the removal goes on
    #[arg(long, value_name = "S", requires = "wait", value_parser = crate::seconds::above_zero)]
    timeout: Option<Duration>,
    /// Don't wait for the guest's consent, nor for requests that don't end
    #[arg(long)]
    force: bool,
}

/// The answer, `--json`. Milliseconds.
#[derive(Debug, PartialEq, Serialize)]
struct Report {
    id: String,
    /// Null when it was not waited for and is not over yet.
    result: Option<End>,
    /// How far the removal is, while it is not over.
    phase: Option<&'static str>,
    ms: u64,
    /// The backend that was closed.
    backend: Option<String>,
    reason: Option<String>,
}

/// `ctl unplug`
pub(super) fn device(session: &mut Session<'_>, args: &RemoveArgs) -> Result<Outcome, Failure> {
    let behind = backend::of_memory(session, &args.id)?;
    remove(session, args, &behind)
}

/// `ctl disk remove`
pub(super) fn disk(session: &mut Session<'_>, args: &RemoveArgs) -> Result<Outcome, Failure> {
    let behind = backend::of_disk(session, &args.id)?;
    remove(session, args, &behind)
}

/// `ctl net remove`
pub(super) fn net(session: &mut Session<'_>, args: &RemoveArgs) -> Result<Outcome, Failure> {
    let behind = backend::of_net(session, &args.id)?;
    remove(session, args, &behind)
}

fn remove(
    session: &mut Session<'_>,
    args: &RemoveArgs,
    behind: &Behind,
) -> Result<Outcome, Failure> {
    let interrupt = Interrupt::watch()?;
    let begun = Instant::now();
    let mut watch = Watch::new(&args.id);
    let ending = match request(session, args, &mut watch, behind)? {
        Some(closed) => return gone_before(session, args, begun, closed),
        None if args.wait => {
            // A time that can't be told is one nobody lives to see.
            let limit = args.timeout.and_then(|timeout| begun.checked_add(timeout));
            let mut progress = Progress::new(&args.id, session.json);
            Some(watch.follow(session, limit, &interrupt, &mut progress)?)
        }
        None => watch.glance(session)?,
    };
    let over = ending
        .as_ref()
        .is_some_and(|ending| ending.end == End::Deleted);
    let closed = match behind {
        Behind::Known(backend) if over => Some(close(session, &args.id, backend)?),
        _ => None,
    };
    let (result, reason) = match ending {
        Some(Ending { end, reason }) => (Some(end), reason),
        None => (None, None),
    };
    let report = Report {
        id: args.id.clone(),
        result,
        phase: watch.phase().filter(|_| !over).map(|phase| phase.as_str()),
        ms: milliseconds(begun),
        backend: closed.map(|backend| backend.name().to_owned()),
        reason,
    };
    print(session, &report, behind)?;
    Ok(match report.result {
        None | Some(End::Deleted) => Outcome::Done,
        Some(End::Refused | End::Withdrawn | End::Quarantined | End::Interrupted) => {
            Outcome::PartialOrStalled
        }
        Some(End::Timeout) => Outcome::TimedOut,
    })
}

/// Asks for the removal, unless it is under way. When the device is gone and only its backend was left, that is closed
/// and returned.
fn request<'b>(
    session: &mut Session<'_>,
    args: &RemoveArgs,
    watch: &mut Watch,
    behind: &'b Behind,
) -> Result<Option<&'b Backend>, Failure> {
    watch.look(session)?;
    if !watch.is_pending() {
        let id = args.id.clone();
        match session.client.call(&DEVICE_DEL, DeviceDel { id }) {
            Ok(Empty {}) => watch.requested(),
            Err(error) if is_not_found(&error) => {
                let backend = behind.backend();
                return match backend.close(&mut session.client) {
                    Ok(()) => Ok(Some(backend)),
                    Err(Error::Command { .. }) => Err(error.into()),
                    Err(other) => Err(other.into()),
                };
            }
            Err(error) => {
                // Somebody else may have asked before.
                watch.look(session)?;
                if !watch.is_pending() && !is_under_way(&error, &args.id) {
                    return Err(error.into());
                }
                watch.requested();
            }
        }
    }
    if args.force {
        let id = args.id.clone();
        match session.call_own(&EBBTIDE_DEVICE_FORCE, DeviceId { id }) {
            Ok(Empty {}) => {}
            // The guest was quick: there is nothing left to force.
            Err(Failure::Qmp(error)) if is_not_found(&error) => {}
            Err(failure) => return Err(failure),
        }
    }
    Ok(None)
}

fn is_not_found(error: &Error) -> bool {
    matches!(error, Error::Command { error, .. } if error.class == ErrorClass::DeviceNotFound)
}

/// What a server says that keeps no list of removals to look at.
fn is_under_way(error: &Error, id: &str) -> bool {
    matches!(error, Error::Command { error, .. } if *error == QmpError::unplug_pending(id))
}

/// The device was gone when this began, and its backend was left.
fn gone_before(
    session: &mut Session<'_>,
    args: &RemoveArgs,
    begun: Instant,
    closed: &Backend,
) -> Result<Outcome, Failure> {
    let report = Report {
        id: args.id.clone(),
        result: Some(End::Deleted),
        phase: None,
        ms: milliseconds(begun),
        backend: Some(closed.name().to_owned()),
        reason: Some("the device was gone already".to_owned()),
    };
    if session.json {
        session.print_json(&report)?;
    } else {
        writeln!(
            session.out,
            "{} was gone already; {closed} is closed",
            args.id
        )?;
    }
    Ok(Outcome::Done)
}

fn close<'b>(
    session: &mut Session<'_>,
    id: &str,
    backend: &'b Backend,
) -> Result<&'b Backend, Failure> {
    match backend.close(&mut session.client) {
        Ok(()) => Ok(backend),
        Err(error) => Err(Failure::Remove(format!(
            "{id} is gone, and {backend} stays: {error}"
        ))),
    }
}

fn print(session: &mut Session<'_>, report: &Report, behind: &Behind) -> Result<(), Failure> {
    if session.json {
        return session.print_json(report);
    }
    let (id, seconds) = (&report.id, report.ms as f64 / 1000.0);
    let reason = report
        .reason
        .as_ref()
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    match report.result {
        None => {
            let phase = match report.phase {
                None | Some("requested") => String::new(),
                Some(phase) => format!(", {phase}"),
            };
            let left = match behind {
                Behind::Known(backend) => {
                    format!("; {backend} stays until somebody waits for it (--wait)")
                }
                Behind::Guessed(_) => String::new(),
            };
            writeln!(session.out, "removal of {id} requested{phase}{left}")
        }
        Some(End::Deleted) => {
            let too = match (&report.backend, behind) {
                (Some(_), Behind::Known(backend)) => format!(", and {backend}"),
                _ => String::new(),
            };
            writeln!(session.out, "{id} is gone after {seconds:.2} s{too}")
        }
        Some(End::Refused) => writeln!(session.out, "{id} stays, the guest refuses{reason}"),
        Some(End::Withdrawn) => writeln!(session.out, "{id} stays{reason}"),
        Some(End::Quarantined) => {
            writeln!(session.out, "{id} is quarantined{reason}")
        }
        Some(End::Interrupted) => {
            writeln!(
                session.out,
                "interrupted after {seconds:.2} s, the removal of {id} goes on{reason}"
            )
        }
        Some(End::Timeout) => {
            writeln!(
                session.out,
                "timed out after {seconds:.2} s, the removal of {id} goes on{reason}"
            )
        }
    }?;
    Ok(())
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
