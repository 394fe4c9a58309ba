// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl resize`: shares the size out among the devices, requests it, and follows the guest until it has it.

pub(super) mod plan;
mod progress;

use std::time::{Duration, Instant};

use clap::Args;
use ebbtide_qmp::commands::{
    EBBTIDE_QUERY_RESIZE, QOM_SET, QUERY_MEMORY_DEVICES, QUERY_MEMORY_SIZE_SUMMARY,
};
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::sizes::Size;
use ebbtide_qmp::types::ebbtide::{QueryResize, Resize, ResizeState};
use ebbtide_qmp::types::memory::MemoryDeviceInfo;
use ebbtide_qmp::types::qom::QomSet;
use serde::Serialize;

use super::interrupt::Interrupt;
use super::{Failure, Outcome, Session, human};
use plan::{Elastic, Inventory};
use progress::Progress;

/// How often the guest's progress is looked at; the first second more often, for a grow takes about that long.
const POLL_FIRST: Duration = Duration::from_millis(10);
const POLL_LATER: Duration = Duration::from_millis(100);

/// The options of `ctl resize`.
#[derive(Args)]
pub(super) struct ResizeArgs {
    /// What the guest is to have in all, such as 512M, 8G
    #[arg(value_name = "SIZE")]
    size: Size,
    /// Wait until the guest has it, or stops following
    #[arg(long)]
    wait: bool,
    /// Wait no longer than this many seconds
    #[arg(long, value_name = "S", requires = "wait", value_parser = crate::seconds::above_zero)]
    timeout: Option<Duration>,
}

/// The answer, `--json`. Bytes and milliseconds.
#[derive(Debug, PartialEq, Serialize)]
struct Report {
    from: u64,
    target: u64,
    reached: u64,
    ms: u64,
    /// Null when the guest was not waited for and has not got there yet.
    result: Option<End>,
    reason: Option<String>,
}

/// How a resize ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum End {
    Reached,
    Partial,
    Stalled,
    Timeout,
}

/// What was requested of one device.
struct Target {
    id: String,
    bytes: u64,
}

/// How a resize ended, and why not better.
#[derive(Debug, PartialEq)]
struct Ending {
    end: End,
    reason: Option<String>,
}

/// How the devices are doing, together.
struct Standing {
    total: u64,
    /// None while a device still works.
    ending: Option<Ending>,
    /// What a device that still works waits for, where that is known: a stopped guest follows nobody.
    held_up: Option<String>,
}

impl Standing {
    /// The wait is given up before the guest has come to an end; `why`, if that is not clear from `end`.
    fn given_up(mut self, end: End, why: &str) -> Self {
        let guest = self.held_up.take();
        let guest = guest.as_deref().unwrap_or("the guest is still following");
        self.ending = Some(Ending {
            end,
            reason: Some(format!("{why}{guest}, the requested size stays set")),
        });
        self
    }
}

pub(super) fn resize(session: &mut Session<'_>, args: &ResizeArgs) -> Result<Outcome, Failure> {
    let target = args.size.0;
    let (inventory, from, sizes) = take_stock(session)?;
    let plan = plan::plan(&inventory, target)?;
    // From here on Ctrl-C must not cut a change that touches several devices in two.
    let interrupt = Interrupt::watch()?;
    let begun = Instant::now();
    let targets = request(session, plan, &sizes)?;
    let rest = inventory.boot.saturating_add(inventory.fixed);
    let standing = if args.wait {
        // A time that can't be told is one nobody lives to see.
        let limit = args.timeout.and_then(|timeout| begun.checked_add(timeout));
        let mut progress = Progress::new(from, target, session.json);
        follow(session, &targets, rest, limit, &interrupt, &mut progress)?
    } else {
        let mut standing = look(session, &targets, rest)?;
        // Nobody waits for the guest; only that it is there already is known for sure.
        standing.ending.take_if(|ending| ending.end != End::Reached);
        standing
    };
    let (result, reason) = match standing.ending {
        Some(Ending { end, reason }) => (Some(end), reason),
        None => (None, None),
    };
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let report = Report {
        from,
        target,
        reached: standing.total,
        ms,
        result,
        reason,
    };
    print(session, &report)?;
    Ok(match report.result {
        None | Some(End::Reached) => Outcome::Done,
        Some(End::Partial | End::Stalled) => Outcome::PartialOrStalled,
        Some(End::Timeout) => Outcome::TimedOut,
    })
}

/// What there is: the inventory, the guest's size now, and what is requested of each device now.
fn take_stock(session: &mut Session<'_>) -> Result<(Inventory, u64, Vec<Target>), Failure> {
    let summary = session.client.call(&QUERY_MEMORY_SIZE_SUMMARY, Empty {})?;
    let devices = session.client.call(&QUERY_MEMORY_DEVICES, Empty {})?;
    let mut inventory = Inventory {
        boot: summary.base_memory,
        fixed: 0,
        elastic: Vec::new(),
    };
    let mut requested = Vec::new();
    for device in devices {
        let info = match device {
            MemoryDeviceInfo::VirtioMem(info) => info,
            MemoryDeviceInfo::Dimm(dimm) => {
                let size = u64::try_from(dimm.size).unwrap_or(0);
                inventory.fixed = inventory.fixed.saturating_add(size);
                continue;
            }
        };
        match info.id {
            Some(id) => {
                requested.push(Target {
                    id: id.clone(),
                    bytes: info.requested_size,
                });
                inventory.elastic.push(Elastic {
                    id,
                    max: info.max_size,
                    block_size: info.block_size,
                });
            }
            // Without an id it cannot be addressed.
            None => inventory.fixed = inventory.fixed.saturating_add(info.size),
        }
    }
    let from = summary
        .base_memory
        .saturating_add(summary.plugged_memory.unwrap_or(0));
    Ok((inventory, from, requested))
}

/// Requests the sizes, first those that become less, so that a shift between devices never needs more than both.
fn request(
    session: &mut Session<'_>,
    plan: Vec<(String, u64)>,
    now: &[Target],
) -> Result<Vec<Target>, Failure> {
    let mut targets: Vec<Target> = plan
        .into_iter()
        .map(|(id, bytes)| Target { id, bytes })
        .collect();
    let grows = |target: &Target| {
        now.iter()
            .any(|now| now.id == target.id && now.bytes < target.bytes)
    };
    targets.sort_by_key(grows);
    let mut done = Vec::new();
    for target in &targets {
        let arguments = QomSet {
            path: format!("/machine/peripheral/{}", target.id),
            property: "requested-size".to_owned(),
            value: target.bytes.into(),
        };
        match session.client.call(&QOM_SET, arguments) {
            Ok(Empty {}) => done.push(target.id.as_str()),
            Err(error) if done.is_empty() => return Err(error.into()),
            Err(error) => {
                return Err(Failure::Resize(format!(
                    "{}: {error}; already changed: {}",
                    target.id,
                    done.join(", ")
                )));
            }
        }
    }
    Ok(targets)
}

/// Looks until the devices have come to an end, the time is over, or the user does not want to wait any more.
fn follow(
    session: &mut Session<'_>,
    targets: &[Target],
    rest: u64,
    limit: Option<Instant>,
    interrupt: &Interrupt,
    progress: &mut Progress,
) -> Result<Standing, Failure> {
    let begun = Instant::now();
    loop {
        let standing = look(session, targets, rest).map_err(ended)?;
        progress.show(standing.total);
        if standing.ending.is_some() {
            return Ok(standing);
        }
        if interrupt.is_seen() {
            return Ok(standing.given_up(End::Partial, "interrupted; "));
        }
        let now = Instant::now();
        if limit.is_some_and(|limit| now >= limit) {
            return Ok(standing.given_up(End::Timeout, ""));
        }
        let poll = if begun.elapsed() < Duration::from_secs(1) {
            POLL_FIRST
        } else {
            POLL_LATER
        };
        let poll = limit.map_or(poll, |limit| poll.min(limit.saturating_duration_since(now)));
        match session.client.next_event(poll) {
            Ok(Some(event)) if event.name == "SHUTDOWN" => {
                return Err(Failure::Resize(
                    "the machine shut down before the guest had the size".to_owned(),
                ));
            }
            Ok(_) => {}
            Err(error) => return Err(ended(error.into())),
        }
    }
}

/// A connection that ends says that the machine did.
fn ended(failure: Failure) -> Failure {
    match failure {
        Failure::Qmp(ebbtide_qmp::Error::Closed { .. }) => {
            Failure::Resize("the machine ended before the guest had the size".to_owned())
        }
        other => other,
    }
}

fn look(session: &mut Session<'_>, targets: &[Target], rest: u64) -> Result<Standing, Failure> {
    let mut states = Vec::new();
    for target in targets {
        let state = session.call_own(
            &EBBTIDE_QUERY_RESIZE,
            QueryResize {
                id: target.id.clone(),
            },
        )?;
        if state.target != target.bytes {
            return Err(Failure::Resize(format!(
                "{}: somebody else has requested {} instead of {}",
                target.id,
                human(state.target),
                human(target.bytes)
            )));
        }
        states.push(state);
    }
    Ok(judge(&states, rest))
}

/// The worst of the devices decides, once none of them works any more.
fn judge(states: &[Resize], rest: u64) -> Standing {
    let total = states
        .iter()
        .fold(rest, |sum, state| sum.saturating_add(state.plugged));
    let severity = |state: ResizeState| match state {
        ResizeState::Reached => 0,
        ResizeState::Partial => 1,
        ResizeState::Stalled => 2,
        ResizeState::Working => 3,
    };
    let worst = states.iter().max_by_key(|state| severity(state.state));
    let ended = |end, reason| Some(Ending { end, reason });
    let mut held_up = None;
    let ending = match worst.map(|state| state.state) {
        None | Some(ResizeState::Reached) => ended(End::Reached, None),
        Some(ResizeState::Partial) => ended(End::Partial, reasons(states)),
        Some(ResizeState::Stalled) => ended(End::Stalled, reasons(states)),
        Some(ResizeState::Working) => {
            held_up = worst.and_then(|state| state.reason.clone());
            None
        }
    };
    Standing {
        total,
        ending,
        held_up,
    }
}

fn reasons(states: &[Resize]) -> Option<String> {
    let short = states
        .iter()
        .filter(|state| state.state != ResizeState::Reached);
    let reasons: Vec<String> = short
        .filter_map(|state| {
            let reason = state.reason.as_ref()?;
            Some(if states.len() == 1 {
                reason.clone()
            } else {
                format!("{}: {reason}", state.id)
            })
        })
        .collect();
    Some(reasons.join("; ")).filter(|reasons| !reasons.is_empty())
}

fn print(session: &mut Session<'_>, report: &Report) -> Result<(), Failure> {
    if session.json {
        return session.print_json(report);
    }
    let (target, reached, seconds) = (
        human(report.target),
        human(report.reached),
        report.ms as f64 / 1000.0,
    );
    let reason = report
        .reason
        .as_ref()
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    match report.result {
        Some(End::Reached) => writeln!(session.out, "reached {target} in {seconds:.2} s"),
        Some(End::Partial) => writeln!(
            session.out,
            "partial: {reached} of {target} after {seconds:.2} s{reason}"
        ),
        Some(End::Stalled) => writeln!(
            session.out,
            "stalled at {reached} of {target} after {seconds:.2} s{reason}"
        ),
        Some(End::Timeout) => writeln!(
            session.out,
            "timed out at {reached} of {target} after {seconds:.2} s{reason}"
        ),
        None => writeln!(
            session.out,
            "requested {target}, the guest has {reached} now"
        ),
    }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, state: ResizeState, plugged: u64, reason: Option<&str>) -> Resize {
        Resize {
            id: id.into(),
            target: 100,
            plugged,
            state,
            reason: reason.map(str::to_owned),
            since_ms: 0,
        }
    }

    #[test]
    fn the_worst_device_decides_when_none_works() {
        use ResizeState::{Partial, Reached, Stalled, Working};
        let reached = device("a", Reached, 100, None);
        let partial = device("b", Partial, 50, Some("busy pages"));
        let stalled = device("c", Stalled, 0, Some("no driver"));
        let working = device("d", Working, 10, None);
        let end = |states: &[&Resize]| {
            let states: Vec<Resize> = states.iter().map(|&state| state.clone()).collect();
            judge(&states, 1000)
                .ending
                .map(|ending| (ending.end, ending.reason.unwrap_or_default()))
        };
        assert_eq!(end(&[&reached]), Some((End::Reached, String::new())));
        assert_eq!(end(&[&partial]), Some((End::Partial, "busy pages".into())));
        assert_eq!(
            end(&[&reached, &partial]),
            Some((End::Partial, "b: busy pages".into()))
        );
        assert_eq!(
            end(&[&stalled, &partial, &reached]),
            Some((End::Stalled, "c: no driver; b: busy pages".into()))
        );
        assert_eq!(end(&[&stalled, &working, &partial, &reached]), None);
        assert_eq!(judge(&[reached.clone(), reached], 1000).total, 1200);
    }

    #[test]
    fn a_wait_that_is_given_up_says_what_the_guest_does() {
        let reason = |why: Option<&str>| {
            let standing = judge(&[device("a", ResizeState::Working, 10, why)], 0);
            let ending = standing.given_up(End::Timeout, "").ending.unwrap();
            ending.reason.unwrap()
        };
        let end = ", the requested size stays set";
        assert_eq!(reason(None), format!("the guest is still following{end}"));
        assert_eq!(
            reason(Some("the guest is paused")),
            format!("the guest is paused{end}")
        );
    }

    #[test]
    fn the_report_has_every_key() {
        let report = Report {
            from: 1,
            target: 2,
            reached: 1,
            ms: 3,
            result: Some(End::Timeout),
            reason: None,
        };
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"from":1,"target":2,"reached":1,"ms":3,"result":"timeout","reason":null}"#
        );
    }
}
