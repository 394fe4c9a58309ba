// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The monitor commands people type, through `human-monitor-command`: what each does to the
//! machine. Reading a line and wording an answer is [`ebbtide_qmp::hmp`]'s.
//!
//! An error is an answer like any other here: text for a person.

use ebbtide_bus::pci::InjectedError;
use ebbtide_qmp::QmpError;
use ebbtide_qmp::hmp::{self, Command, Info, PcieError};
use ebbtide_qmp::types::monitor::VersionInfo;
use ebbtide_qmp::types::run_state::{ShutdownCause, StatusInfo};

use super::{backends, go, inventory, memory, qom, stop};
use crate::lifecycle::Request;
use crate::machine::Machine;

/// Runs one command line.
pub(super) async fn run(machine: &Machine, line: &str) -> String {
    match hmp::parse(line) {
        Ok(command) => carry_out(machine, command)
            .await
            .unwrap_or_else(|e| hmp::error(&e)),
        Err(answer) => answer,
    }
}

async fn carry_out(machine: &Machine, command: Command) -> Result<String, QmpError> {
    match command {
        Command::Text(answer) => return Ok(answer),
        Command::Info(about) => return Ok(info(machine, &about)),
        Command::QomList { path } => {
            let properties = qom::list(machine, path.as_deref().unwrap_or("/"))?;
            return Ok(hmp::properties(&properties));
        }
        Command::QomGet { path, property } => {
            return qom::get(machine, &path, &property).map(|value| format!("{value}\r\n"));
        }
        Command::QomSet {
            path,
            property,
            value,
        } => qom::set_typed(machine, &path, &property, &value).map(|_| ())?,
        Command::InjectError { id, error } => return inject_error(machine, &id, error),
        Command::Stop => stop(machine).await.map(|_| ())?,
        Command::Cont => go(machine).await.map(|_| ())?,
        Command::SystemReset => machine.requests().reset(ShutdownCause::HostQmpSystemReset),
        Command::SystemPowerdown => machine.requests().send(Request::PowerButton),
        Command::Quit => machine.requests().shutdown(ShutdownCause::HostQmpQuit),
    }
    Ok(String::new())
}

/// Has an error happen in a device and says where that was.
fn inject_error(machine: &Machine, id: &str, error: PcieError) -> Result<String, QmpError> {
    let (bus, at) = inventory::place_of(machine, id)?;
    let PcieError {
        correctable,
        bit,
        header,
    } = error;
    let injected = InjectedError::of_bit(correctable, bit, header)
        .ok_or_else(|| QmpError::generic(format!("error status bit {bit} can not be injected")))?;
    let bridge = machine.devices.bridge();
    let done = bridge.inject_error(bus, at, injected);
    done.map_err(|e| QmpError::generic(format!("Device '{id}': {e}")))?;
    let root = bridge.bus().name();
    Ok(format!(
        "OK id: {id} root bus: {root}, bus: {bus:x} devfn: {:x}.{:x}\r\n",
        at.slot(),
        at.function()
    ))
}

fn info(machine: &Machine, about: &Info) -> String {
    match about {
        Info::Mtree { flat } => machine.memory().mtree(*flat),
        Info::RamBlock => machine.memory().ram().dump(),
        Info::Block => hmp::block(&inventory::disks(machine)),
        Info::Pci => hmp::pci(&inventory::pci(machine)),
        Info::Qtree => inventory::qtree(machine),
        Info::Cpus => hmp::cpus(&inventory::cpus(machine)),
        Info::Iothreads => hmp::iothreads(&backends::iothreads(machine)),
        Info::Balloon => match backends::query(machine) {
            Ok(info) => hmp::balloon(&info),
            Err(e) => hmp::error(&e),
        },
        Info::MemoryDevices => hmp::memory_devices(&memory::devices(machine)),
        Info::MemorySizeSummary => hmp::memory_size_summary(&memory::summary(machine)),
        Info::Status => hmp::status(&StatusInfo::new(machine.state())),
        Info::Version => hmp::version(&VersionInfo::ebbtide()),
    }
}
