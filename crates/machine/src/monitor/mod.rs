// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QMP: what each command does to this machine.

mod backends;
mod blocks;
mod chardevs;
mod devices;
mod hmp;
mod inventory;
mod memory;
mod qom;

use std::rc::Rc;
use std::time::Duration;

use ebbtide_iothread::oneshot;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::ebbtide::{Holdings, Status, VcpuStay};
use ebbtide_qmp::types::run_state::{ShutdownCause, StatusInfo};
use ebbtide_qmp::{CommandTable, QmpError, commands};

use crate::cpus::Stay;
use crate::lifecycle::Request;
use crate::machine::Machine;

/// The commands of `machine`.
pub fn table(machine: &Rc<Machine>) -> CommandTable<Machine> {
    let table = CommandTable::new(Rc::clone(machine))
        .on(commands::QUERY_STATUS, async |m, _, Empty {}| {
            Ok(StatusInfo::new(m.state()))
        })
        .on(commands::STOP, async |m, _, Empty {}| stop(&m).await)
        .on(commands::CONT, async |m, _, Empty {}| go(&m).await)
        .on(commands::SYSTEM_RESET, async |m, _, Empty {}| {
            m.requests().reset(ShutdownCause::HostQmpSystemReset);
            Ok(Empty {})
        })
        .on(commands::SYSTEM_POWERDOWN, async |m, _, Empty {}| {
            m.requests().send(Request::PowerButton);
            Ok(Empty {})
        })
        .on(commands::QUIT, async |m, _, Empty {}| {
            m.requests().shutdown(ShutdownCause::HostQmpQuit);
            Ok(Empty {})
        })
        .on(commands::HUMAN_MONITOR_COMMAND, async |m, _, args| {
            check_cpu_index(&m, args.cpu_index)?;
            Ok(hmp::run(&m, &args.command_line).await)
        })
        .on(commands::EBBTIDE_QUERY_STATUS, async |m, _, Empty {}| {
            Ok(Status {
                status: m.state(),
                reset: m.resetting.told(m.local.now()),
                vcpus: m.vcpus(),
                pid: u64::from(std::process::id()),
                version: env!("CARGO_PKG_VERSION").into(),
            })
        })
        .on(commands::EBBTIDE_QUERY_KVM, async |m, _, Empty {}| {
            Ok(holdings(m.vm.holdings()))
        })
        .on(commands::EBBTIDE_QUERY_VCPUS, async |m, _, Empty {}| {
            Ok(vcpu_stays(m.take_longest_stays()))
        });
    let table = devices::add(qom::add(memory::add(table)));
    inventory::add(backends::add(chardevs::add(blocks::add(table))))
}

fn holdings(of: ebbtide_hypervisor::Holdings) -> Holdings {
    let ebbtide_hypervisor::Holdings {
        slots,
        ioeventfds,
        irqfds,
        messages,
    } = of;
    Holdings {
        slots: slots as u64,
        ioeventfds: ioeventfds as u64,
        irqfds: irqfds as u64,
        messages: messages as u64,
    }
}

fn vcpu_stays(stays: Vec<Stay>) -> Vec<VcpuStay> {
    // Rounded up: only a vCPU that has not left the guest has stayed out for no time.
    let us = |time: Duration| u64::try_from(time.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
    let stay = |(index, stay): (u64, Stay)| VcpuStay {
        index,
        longest_exit_us: us(stay.longest),
        longest_exit_cpu_us: us(stay.processor),
    };
    (0..).zip(stays).map(stay).collect()
}

/// `cpu-index` of a monitor command. No command here is about one vCPU, but a wrong index is an
/// error all the same.
fn check_cpu_index(machine: &Machine, index: Option<i64>) -> Result<(), QmpError> {
    match index {
        Some(index) if u64::try_from(index).is_ok_and(|i| i < machine.vcpus()) => Ok(()),
        Some(index) => Err(QmpError::generic(format!(
            "Parameter 'cpu-index' does not accept value '{index}': there are {} vCPUs",
            machine.vcpus()
        ))),
        None => Ok(()),
    }
}

/// Stops the guest; ready when all vCPUs are out of it.
pub(crate) async fn stop(machine: &Machine) -> Result<Empty, QmpError> {
    let (done, stopped) = oneshot::channel();
    machine.requests().send(Request::Stop(done));
    stopped.await;
    Ok(Empty {})
}

/// Lets the guest go on.
pub(crate) async fn go(machine: &Machine) -> Result<Empty, QmpError> {
    let (done, gone_on) = oneshot::channel();
    machine.requests().send(Request::Continue(done));
    match gone_on.await {
        Some(Err(reason)) => Err(QmpError::generic(reason)),
        // None: the machine is ending, and so is this connection.
        Some(Ok(())) | None => Ok(Empty {}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_are_in_microseconds_and_never_less_than_they_were() {
        let stays = [0, 1, 1000, 1001].map(|ns| Stay {
            longest: Duration::from_nanos(ns),
            processor: Duration::from_nanos(ns / 2),
        });
        let told: Vec<(u64, u64, u64)> = vcpu_stays(stays.to_vec())
            .into_iter()
            .map(|stay| (stay.index, stay.longest_exit_us, stay.longest_exit_cpu_us))
            .collect();
        assert_eq!(told, [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 2, 1)]);
    }
}
