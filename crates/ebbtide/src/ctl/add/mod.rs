// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl plug-dimm`, `ctl disk add`, `ctl net add`: a backend, then the device on it; both or neither.

mod dimm;
mod disk;
mod net;

use ebbtide_qmp::commands::{DEVICE_ADD, QOM_LIST};
use ebbtide_qmp::schema::{Command, Empty, Qapi};
use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::qom::QomList;
use ebbtide_qmp::{Error, ErrorClass, Properties, QmpError};
use serde::Serialize;

use super::backend::Backend;
use super::interrupt::Interrupt;
use super::{Failure, Outcome, Session};

pub(super) use dimm::{PlugDimmArgs, plug as plug_dimm};
pub(super) use disk::{DiskAddArgs, add as disk};
pub(super) use net::{NetAddArgs, add as net};

/// The answer, `--json`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    id: &'a str,
    driver: &'a str,
    backend: &'a str,
}

/// A device that is to be.
struct Plan<A> {
    /// What makes its backend, with its arguments.
    make: Command<A, Empty>,
    arguments: A,
    backend: Backend,
    driver: &'static str,
    id: String,
    /// The device's own properties.
    properties: Properties,
}

/// Carries out the plan for the id that was asked for, or for the first one of `prefix` with a number that neither a device
/// has nor a backend that was left when its device went. `what` is what there is then, for people.
fn add<A: Qapi>(
    session: &mut Session<'_>,
    (asked, prefix): (Option<&str>, &str),
    what: &str,
    plan: impl Fn(&str) -> Plan<A>,
) -> Result<Outcome, Failure> {
    if let Some(id) = asked {
        return carry_out(session, plan(id), what);
    }
    for id in free_ids(session, prefix)? {
        let plan = plan(&id);
        let taken = [
            QmpError::duplicate_device_id(&id),
            plan.backend.is_there_already(),
        ];
        match carry_out(session, plan, what) {
            // Somebody else may have been quicker.
            Err(Failure::Qmp(Error::Command { error, .. })) if taken.contains(&error) => {}
            done => return done,
        }
    }
    // A server cannot have so many.
    Err(Failure::Add(format!("no id {prefix}N is free; use --id")))
}

fn carry_out<A: Qapi>(
    session: &mut Session<'_>,
    plan: Plan<A>,
    what: &str,
) -> Result<Outcome, Failure> {
    let Plan {
        make,
        arguments,
        backend,
        driver,
        id,
        properties,
    } = plan;
    // From here on Ctrl-C must not leave a backend without its device.
    let _interrupt = Interrupt::watch()?;
    session.client.call(&make, arguments)?;
    let device = DeviceAdd {
        driver: driver.to_owned(),
        bus: None,
        id: Some(id.clone()),
        properties,
    };
    if let Err(error) = session.client.call(&DEVICE_ADD, device) {
        return Err(undo(session, &backend, error));
    }
    if session.json {
        session.print_json(&Report {
            id: &id,
            driver,
            backend: backend.name(),
        })?;
    } else {
        writeln!(session.out, "{id}: {what}")?;
    }
    Ok(Outcome::Done)
}

/// There is a backend and no device: takes the backend back.
fn undo(session: &mut Session<'_>, backend: &Backend, error: Error) -> Failure {
    // Only a refusal says that the device isn't there and won't come.
    if !matches!(error, Error::Command { .. }) {
        return Failure::Add(format!("{error}; {backend} was made and may be in use"));
    }
    match backend.close(&mut session.client) {
        Ok(()) => error.into(),
        Err(left) => Failure::Add(format!("{error}; {backend} was made and stays: {left}")),
    }
}

/// The ids of `prefix` with a number that no device has now.
fn free_ids(
    session: &mut Session<'_>,
    prefix: &str,
) -> Result<impl Iterator<Item = String> + use<>, Failure> {
    let path = "/machine/peripheral".to_owned();
    let taken = match session.client.call(&QOM_LIST, QomList { path }) {
        Ok(taken) => taken,
        // A machine without a device that has an id.
        Err(Error::Command { error, .. }) if error.class == ErrorClass::DeviceNotFound => {
            Vec::new()
        }
        Err(error) => return Err(error.into()),
    };
    let prefix = prefix.to_owned();
    Ok((0..=u32::MAX)
        .map(move |number| format!("{prefix}{number}"))
        .filter(move |id| !taken.iter().any(|property| property.name == *id)))
}
