// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide ctl` as a process: Ctrl-C ends a wait, says what goes on and cuts nothing off.

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

#[path = "../../qmp/tests/toy/mod.rs"]
#[allow(missing_docs, dead_code)]
mod toy;

use toy::ToyConfig;
use toy::plug::Guest;
use toy::server::{Setup, ToyServer};

fn ctl(server: &ToyServer, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ebbtide"));
    command.arg("ctl").arg("--qmp").arg(server.path());
    command.args(words).stdin(Stdio::null());
    command
}

fn run(server: &ToyServer, words: &[&str]) -> Output {
    ctl(server, words).output().unwrap()
}

/// Reads standard error until `text` has come.
fn wait_for(child: &mut Child, text: &str) -> String {
    let mut seen = Vec::new();
    let mut pipe = child.stderr.take().unwrap();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(text) {
        assert_eq!(pipe.read(&mut byte).unwrap(), 1, "{seen:?}");
        seen.extend(byte);
    }
    child.stderr = Some(pipe);
    String::from_utf8(seen).unwrap()
}

#[test]
fn ctrl_c_ends_the_wait_and_not_the_removal() {
    let server = ToyServer::start(Setup {
        toy: ToyConfig {
            guest: Guest::Silent,
            ..ToyConfig::default()
        },
        ..Setup::default()
    });
    assert!(run(&server, &["plug-dimm", "1G"]).status.success());
    let mut waiting = ctl(&server, &["unplug", "dimm0", "--wait"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Piped, progress is a plain line for each phase.
    let progress = wait_for(&mut waiting, "the guest has not answered");
    assert!(
        progress.starts_with("dimm0: requested for ") && !progress.contains('\x1b'),
        "{progress:?}"
    );
    let begun = Instant::now();
    let pid = rustix::process::Pid::from_child(&waiting);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // Else it would wait for ever.
    while waiting.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it waits on");
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = waiting.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.starts_with("interrupted after ")
            && text.contains("the removal of dimm0 goes on: requested for "),
        "{text}"
    );
    let forced = run(&server, &["unplug", "dimm0", "--wait", "--force"]);
    assert_eq!(forced.status.code(), Some(0));
    let wrong = run(&server, &["plug-dimm", "1G", "--path", "/x"]);
    assert_eq!(wrong.status.code(), Some(2));
}
