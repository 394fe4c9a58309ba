// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A terminal is raw while it is used and as before afterwards, however the process ends.
//!
//! Runs the example `stdio_echo` in a session of its own on a pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

const LONG: Duration = Duration::from_secs(60);

struct Session {
    controller: File,
    terminal: OwnedFd,
    child: Child,
}

fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .join("examples/stdio_echo");
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --example stdio_echo`",
        path.display()
    );
    path
}

/// Starts the example and waits until it says that it is ready.
fn start() -> Session {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let path = ptsname(&controller, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let terminal = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
    assert!(cooked(&terminal));
    let end = || terminal.try_clone().unwrap();
    // A new session whose controlling terminal is its standard input.
    let child = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .arg(example())
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .env("RUST_BACKTRACE", "0")
        .spawn()
        .expect("setsid, of util-linux");
    let mut session = Session {
        controller: File::from(controller),
        terminal,
        child,
    };
    session.expect("ready\r\n");
    session
}

fn cooked(terminal: &OwnedFd) -> bool {
    let modes = tcgetattr(terminal).unwrap().local_modes;
    modes.contains(LocalModes::ICANON | LocalModes::ECHO)
}

impl Session {
    fn send(&mut self, text: &str) {
        self.controller.write_all(text.as_bytes()).unwrap();
    }

    /// Reads up to and including `text`.
    fn expect(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(text.as_bytes()) {
            self.readable(&seen);
            assert_eq!(self.controller.read(&mut byte).unwrap(), 1);
            seen.push(byte[0]);
        }
        String::from_utf8(seen).unwrap()
    }

    fn readable(&self, seen: &[u8]) {
        let limit = Timespec {
            tv_sec: LONG.as_secs() as i64,
            tv_nsec: 0,
        };
        let mut wanted = [PollFd::new(&self.controller, PollFlags::IN)];
        let ready = poll(&mut wanted, Some(&limit)).unwrap();
        assert_eq!(
            ready,
            1,
            "nothing more after {:?}",
            String::from_utf8_lossy(seen)
        );
    }

    fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LONG, "the process does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process ends and leaves the terminal as it was.
    fn ends(&mut self) -> ExitStatus {
        let status = self.wait();
        assert!(cooked(&self.terminal), "restored after {status}");
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn bytes_pass_as_they_are_typed() {
    let mut session = start();
    assert!(!cooked(&session.terminal));
    session.send("x\r\x13\x11\x04");
    assert_eq!(
        session.expect("\x04"),
        "x\r\x13\x11\x04",
        "no echo, no translation, no flow control, no end of file"
    );
    session.send("q");
    session.expect("qbye\r\n");
    assert!(session.ends().success());
}

#[test]
fn ctrl_c_interrupts() {
    let mut session = start();
    session.send("\x03");
    session.expect("bye\r\n");
    assert!(session.ends().success());
}

#[test]
fn restored_after_a_panic() {
    let mut session = start();
    session.send("p");
    assert_eq!(session.ends().code(), Some(101));
}

#[test]
fn restored_after_an_abort() {
    let mut session = start();
    session.send("a");
    assert!(!session.ends().success());
}

#[test]
fn restored_after_ctrl_backslash() {
    let mut session = start();
    session.send("\x1c");
    assert!(!session.ends().success());
}
