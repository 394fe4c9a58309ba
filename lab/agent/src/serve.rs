// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes requests and answers them, each on a thread of its own.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::system::RebootCommand;
use serde::Serialize;
use serde_json::Value;

use crate::disk::Work;
use crate::pattern::Area;
use crate::pipes::Pipes;
use crate::placed::Pinned;
use crate::protocol::{
    Command, Done, Event, Filled, Freed, Message, PinnedMemory, PipesHeld, REQUEST_LIMIT_BYTES,
    Request,
};
use crate::tty::{Line, Lines, Messages};
use crate::{disk, exec, kernel_log, load, placed, ports, report};

/// What lasts from one request to the next.
#[derive(Debug, Default)]
struct State {
    area: Mutex<Option<Area>>,
    disks: Mutex<HashMap<String, Work>>,
    pipes: Mutex<Pipes>,
    pins: Mutex<Vec<Pinned>>,
}

/// Answers requests for ever.
pub fn serve(input: impl std::io::Read, messages: &Messages) -> ! {
    let state = Arc::new(State::default());
    let mut lines = Lines::new(input);
    loop {
        match lines.next_line() {
            Line::Text(line) => take(&line, &state, messages),
            Line::TooLong => {
                let error = format!("request is longer than {REQUEST_LIMIT_BYTES} bytes");
                messages.send(&Message::Failure { id: 0, error });
            }
        }
    }
}

fn take(line: &str, state: &Arc<State>, messages: &Messages) {
    let request: Request = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(error) => {
            let id = serde_json::from_str::<Value>(line)
                .ok()
                .and_then(|all| all.get("id")?.as_u64())
                .unwrap_or(0);
            messages.send(&Message::Failure {
                id,
                error: format!("request can't be understood: {error}"),
            });
            return;
        }
    };
    let (id, state, answers) = (request.id, state.clone(), messages.clone());
    let spawned = std::thread::Builder::new().spawn(move || answer(request, &state, &answers));
    if let Err(error) = spawned {
        messages.send(&Message::Failure {
            id,
            error: format!("can't start a thread: {error}"),
        });
    }
}

fn answer(request: Request, state: &State, messages: &Messages) {
    let id = request.id;
    let ends = match request.command {
        Command::Reboot => Some(RebootCommand::Restart),
        Command::Poweroff => Some(RebootCommand::PowerOff),
        _ => None,
    };
    // PID 1 must not end: a bug in one command stays in its answer.
    let result = catch_unwind(AssertUnwindSafe(|| run(request, state, messages)))
        .unwrap_or_else(|_| bail!("the agent panicked, see the console"));
    match result {
        Ok(ok) => messages.send(&Message::Answer { id, ok }),
        Err(error) => messages.send(&Message::Failure {
            id,
            error: format!("{error:#}"),
        }),
    }
    if let Some(command) = ends {
        messages.drain();
        let error = rustix::system::reboot(command);
        messages.send(&Message::Failure {
            id,
            error: format!("{command:?}: {error:?}"),
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(request: Request, state: &State, messages: &Messages) -> Result<Value> {
    let id = request.id;
    let progress =
        |done, total| messages.send(&Message::Event(Event::Progress { id, done, total }));
    let threads = report::cpus_online() as usize;
    match request.command {
        Command::Report => to_value(report::report()?),
        Command::Fill { bytes, seed } => to_value(fill(state, bytes, seed, threads, progress)?),
        Command::Check => {
            let area = lock(&state.area);
            to_value(
                area.as_ref()
                    .context("nothing is filled: send fill first")?
                    .check(threads, progress),
            )
        }
        Command::Free => {
            let area = lock(&state.area).take();
            to_value(Freed {
                bytes: area.map_or(0, |area| area.bytes()),
            })
        }
        Command::DiskStart(start) => {
            let mut disks = lock(&state.disks);
            if disks
                .get(&start.path)
                .is_some_and(|work| work.status().running)
            {
                bail!("{}: is being worked on already", start.path);
            }
            let work = Work::start(&start)?;
            let status = work.status();
            disks.insert(start.path, work);
            to_value(status)
        }
        Command::DiskStatus { path } => to_value(started(&mut lock(&state.disks), &path)?.status()),
        Command::DiskVerify { path } => to_value(started(&mut lock(&state.disks), &path)?.verify()),
        Command::DiskStop { path, verify } => {
            let mut disks = lock(&state.disks);
            let status = started(&mut disks, &path)?.stop(verify);
            // The disk is closed: its name is free when it goes.
            disks.remove(&path);
            to_value(status)
        }
        Command::DiskOnce { path, bytes, seed } => to_value(disk::once(&path, bytes, seed)?),
        Command::WriteFrom { path, place, seed } => to_value(placed::write(&path, &place, seed)?),
        Command::Pin(place) => {
            let mut pins = lock(&state.pins);
            pins.push(Pinned::at(&place)?);
            to_value(PinnedMemory {
                bytes: pins.iter().map(Pinned::bytes).sum(),
            })
        }
        Command::Unpin => {
            lock(&state.pins).clear();
            to_value(PinnedMemory { bytes: 0 })
        }
        Command::DiskLoad(disk_load) => to_value(load::run(&disk_load)?),
        Command::Dmesg { deny, tail } => to_value(kernel_log::search(&deny, tail)?),
        Command::Pipes { bytes } => to_value(PipesHeld {
            bytes: lock(&state.pipes).hold(bytes)?,
        }),
        Command::PipesFree => {
            lock(&state.pipes).free();
            to_value(PipesHeld { bytes: 0 })
        }
        Command::Exec { argv, timeout_ms } => {
            to_value(exec::run(&argv, Duration::from_millis(timeout_ms))?)
        }
        Command::PortWrite { port, value, width } => to_value(ports::write(port, value, width)?),
        Command::PortRead { port, width } => to_value(ports::read(port, width)?),
        Command::Sleep { ms } => {
            std::thread::sleep(Duration::from_millis(ms));
            to_value(Done {})
        }
        Command::Reboot | Command::Poweroff => {
            rustix::fs::sync();
            to_value(Done {})
        }
    }
}

fn fill(
    state: &State,
    bytes: u64,
    seed: u64,
    threads: usize,
    progress: impl Fn(u64, u64),
) -> Result<Filled> {
    let mut area = lock(&state.area);
    // First give back the old one: both together may be more than there is.
    *area = None;
    let (filled, summary) = Area::fill(bytes, seed, report::available_bytes()?, threads, progress)?;
    *area = Some(filled);
    Ok(summary)
}

fn started<'a>(disks: &'a mut HashMap<String, Work>, path: &str) -> Result<&'a mut Work> {
    disks
        .get_mut(path)
        .with_context(|| format!("{path}: no work was started: send disk_start first"))
}

fn to_value(result: impl Serialize) -> Result<Value> {
    serde_json::to_value(result).context("answer")
}
