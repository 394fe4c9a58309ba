// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PID 1 of a test guest: mounts, loads modules, serves the lab over /dev/ttyS0.

use std::path::Path;
use std::time::Duration;

use ebbtide_agent::protocol::{Event, Message};
use ebbtide_agent::tty::{Messages, open_raw};
use ebbtide_agent::{boot, kernel_log, report, serve};

const TTY: &str = "/dev/ttyS0";

fn main() {
    let started_ms = boot::uptime_ms();
    let mut problems = boot::mount_kernel_file_systems();
    if let Err(error) = kernel_log::quiet_console() {
        problems.push(format!("{error:#}"));
    }
    let tty = loop {
        match open_raw(Path::new(TTY)).and_then(|tty| Ok((tty.try_clone()?, tty))) {
            Ok(both) => break both,
            Err(error) => {
                // Standard error is the kernel's console, wherever that is.
                eprintln!("ebbtide-agent: {error:#}");
                std::thread::sleep(Duration::from_secs(5));
            }
        }
    };
    let (input, output) = tty;
    problems.extend(boot::load_modules(|_| {}));
    let messages = Messages::new(output);
    messages.send(&Message::Event(Event::Ready(report::ready(
        started_ms, problems,
    ))));
    serve::serve(input, &messages)
}
