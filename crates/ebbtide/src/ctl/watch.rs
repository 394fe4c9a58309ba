// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl watch`: on a terminal a picture that is drawn anew, else a line for each change.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use ebbtide_qmp::commands::EBBTIDE_QUERY_MEMORY;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::ebbtide::Memory;

use super::interrupt::Interrupt;
use super::{Failure, Outcome, Session, human, memory};

/// How often the machine is asked. Events make it sooner.
const INTERVAL: Duration = Duration::from_millis(500);

/// How long Ctrl-C may go unnoticed.
const STEP: Duration = Duration::from_millis(50);

pub(super) fn watch(session: &mut Session<'_>) -> Result<Outcome, Failure> {
    let interrupt = Interrupt::watch()?;
    let screen = !session.json && io::stdout().is_terminal();
    if !screen {
        return follow(session, &interrupt, false);
    }
    // The alternate screen: what stood on the terminal before is there again afterwards.
    write!(session.out, "\x1b[?1049h\x1b[?25l")?;
    let result = follow(session, &interrupt, true);
    write!(session.out, "\x1b[?25h\x1b[?1049l")?;
    session.out.flush()?;
    result
}

fn follow(
    session: &mut Session<'_>,
    interrupt: &Interrupt,
    screen: bool,
) -> Result<Outcome, Failure> {
    let begun = Instant::now();
    let mut last: Option<Memory> = None;
    while !interrupt.is_seen() {
        let memory = match session.call_own(&EBBTIDE_QUERY_MEMORY, Empty {}) {
            Err(Failure::Qmp(ebbtide_qmp::Error::Closed { .. })) if last.is_some() => break,
            other => other?,
        };
        if screen {
            let text = memory::text(&memory).replace('\n', "\x1b[K\n");
            write!(session.out, "\x1b[H{text}\x1b[K\n(Ctrl-C ends this)\x1b[J")?;
        } else if last.as_ref().is_none_or(|last| differs(last, &memory)) {
            line(session, &memory, begun.elapsed())?;
        }
        session.out.flush()?;
        last = Some(memory);
        if pause(session, interrupt)? == Pause::Ended {
            break;
        }
    }
    Ok(Outcome::Done)
}

#[derive(PartialEq)]
enum Pause {
    Over,
    Ended,
}

/// Until the next picture is due or something happens.
fn pause(session: &mut Session<'_>, interrupt: &Interrupt) -> Result<Pause, Failure> {
    let due = Instant::now() + INTERVAL;
    while !interrupt.is_seen() && Instant::now() < due {
        match session.client.next_event(STEP) {
            Ok(None) => {}
            Ok(Some(event)) if event.name == "SHUTDOWN" => return Ok(Pause::Ended),
            Ok(Some(_)) => return Ok(Pause::Over),
            Err(ebbtide_qmp::Error::Closed { .. }) => return Ok(Pause::Ended),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Pause::Over)
}

/// Whether there is something to say: resident memory moves all the time and is no news by itself.
fn differs(last: &Memory, now: &Memory) -> bool {
    let quiet = Memory {
        rss: last.rss,
        ..now.clone()
    };
    *last != quiet
}

fn line(session: &mut Session<'_>, memory: &Memory, elapsed: Duration) -> Result<(), Failure> {
    if session.json {
        return session.print_json(memory);
    }
    let requested: u64 = memory.devices.iter().map(|device| device.requested).sum();
    writeln!(
        session.out,
        "{:8.1} s  total {}  plugged {}  requested {}  host RSS {}",
        elapsed.as_secs_f64(),
        human(memory.total),
        human(memory.plugged),
        human(requested),
        human(memory.rss)
    )?;
    Ok(())
}
