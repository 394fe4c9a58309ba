// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab's end of the guest's serial line.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ebbtide_agent::protocol::{
    Checked, Command, DiskStart, DiskStatus, Done, Event, Executed, Filled, Freed, KernelLog,
    Message, PipesHeld, PortWritten, Ready, Report, Request, parse_line,
};
use ebbtide_hostile::ejector;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::delay;

/// What the kernel prints when it is lost.
const PANIC: &str = "Kernel panic";
/// Console output kept for errors and the log.
const CONSOLE_LIMIT_BYTES: usize = 8 << 20;
const TAIL_LINES: usize = 20;
/// For commands that need no time of their own.
const SHORT: Duration = Duration::from_secs(60);

/// A guest, seen through its agent. Errors carry the end of the console.
#[derive(Debug)]
pub struct Guest {
    writer: Box<dyn DebugWrite>,
    incoming: Receiver<Incoming>,
    console: Console,
    next_id: u64,
    /// Answers to requests that nobody has waited for yet.
    answers: HashMap<u64, std::result::Result<Value, String>>,
    readies: VecDeque<(Ready, Instant)>,
    /// Lines of a guest that is its own kernel.
    lines: VecDeque<String>,
    panic: Option<String>,
}

trait DebugWrite: Write + Send + std::fmt::Debug {}
impl<T: Write + Send + std::fmt::Debug> DebugWrite for T {}

/// What the reading thread passes on, with the time its first byte came.
#[derive(Debug)]
enum Incoming {
    Message(Message, Instant),
    Line(String),
    Garbled(String),
    Panic(String),
    Closed,
}

/// A request on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Pending(u64);

/// All the guest has written, shared with the thread that reads it.
#[derive(Clone, Debug, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    /// As text, from the beginning or the last 8 MiB.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    fn add(&self, bytes: &[u8]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend_from_slice(bytes);
        let excess = all.len().saturating_sub(CONSOLE_LIMIT_BYTES);
        if excess > CONSOLE_LIMIT_BYTES / 8 {
            all.drain(..excess);
        }
    }

    fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty())
            .collect();
        let kept = lines.iter().skip(lines.len().saturating_sub(TAIL_LINES));
        kept.fold(String::from("\n--- guest console ---"), |all, line| {
            all + "\n" + line
        })
    }
}

impl Guest {
    /// Reads `reader` on a thread until its end.
    pub fn new(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + std::fmt::Debug + 'static,
    ) -> Guest {
        let (sender, incoming) = mpsc::channel();
        let console = Console::default();
        let copy = console.clone();
        std::thread::spawn(move || read_lines(reader, &copy, &sender));
        Guest {
            writer: Box::new(writer),
            incoming,
            console,
            next_id: 1,
            answers: HashMap::new(),
            readies: VecDeque::new(),
            lines: VecDeque::new(),
            panic: None,
        }
    }

    /// All the guest has written.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Waits until an agent reports for the first time since the last call:
    /// once after the start, and once after each reboot. Also says when the
    /// first byte of that report came.
    ///
    /// # Errors
    /// Nothing comes in time, the kernel panics, the line is closed, or the
    /// agent reports problems.
    pub fn wait_ready_at(&mut self, timeout: Duration) -> Result<(Ready, Instant)> {
        let deadline = Instant::now() + timeout;
        while self.readies.is_empty() {
            self.advance(deadline, "the agent to report")?;
        }
        let (ready, at) = self.readies.pop_front().context("no report")?;
        if !ready.problems.is_empty() {
            bail!(
                "the agent reports problems: {}{}",
                ready.problems.join("; "),
                self.console.tail()
            );
        }
        // What was asked before a reboot will never be answered.
        self.answers.clear();
        Ok((ready, at))
    }

    /// As [`Guest::wait_ready_at`], without the time.
    ///
    /// # Errors
    /// As there.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Ready> {
        self.wait_ready_at(timeout).map(|(ready, _)| ready)
    }

    /// Sends a request; [`Guest::wait`] brings the answer.
    ///
    /// # Errors
    /// The line is closed.
    pub fn send(&mut self, command: Command) -> Result<Pending> {
        delay::pass();
        let id = self.next_id;
        self.next_id += 1;
        let line =
            serde_json::to_string(&Request { id, command }).context("write the request")? + "\n";
        self.writer
            .write_all(line.as_bytes())
            .context("serial line")?;
        self.writer.flush().context("serial line")?;
        Ok(Pending(id))
    }

    /// Waits for the answer to a request.
    ///
    /// # Errors
    /// The agent's own error; no answer in time; the kernel panics.
    pub fn wait<T: DeserializeOwned>(&mut self, pending: Pending, timeout: Duration) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.answers.remove(&pending.0) {
                Some(Ok(value)) => {
                    return serde_json::from_value(value).context("understand the answer");
                }
                Some(Err(error)) => bail!("guest: {error}"),
                None => self.advance(deadline, &format!("the answer to request {}", pending.0))?,
            }
        }
    }

    /// Sends a request and waits for the answer.
    ///
    /// # Errors
    /// As [`Guest::send`] and [`Guest::wait`].
    pub fn call<T: DeserializeOwned>(&mut self, command: Command, timeout: Duration) -> Result<T> {
        let what = format!("{command:?}");
        let pending = self.send(command)?;
        self.wait(pending, timeout).with_context(|| what)
    }

    /// Whether an answer is there; never waits.
    ///
    /// # Errors
    /// The kernel panics or the line is closed.
    pub fn is_answered(&mut self, pending: Pending) -> Result<bool> {
        while let Ok(incoming) = self.incoming.try_recv() {
            self.take(incoming)?;
        }
        Ok(self.answers.contains_key(&pending.0))
    }

    /// Sends a byte to a guest that is its own kernel (see [`ebbtide_hostile::ejector`]).
    ///
    /// # Errors
    /// The line is closed.
    pub fn send_byte(&mut self, byte: u8) -> Result<()> {
        delay::pass();
        self.writer.write_all(&[byte]).context("serial line")?;
        self.writer.flush().context("serial line")
    }

    /// The next line of a guest that is its own kernel, without [`ejector::LINE`].
    ///
    /// # Errors
    /// None comes in time; the line is closed.
    pub fn wait_line(&mut self, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Ok(line);
            }
            self.advance(deadline, "a line of the guest")?;
        }
    }

    /// The state of the guest.
    ///
    /// # Errors
    /// As [`Guest::call`]; so for all that follow.
    pub fn report(&mut self) -> Result<Report> {
        self.call(Command::Report, SHORT)
    }

    /// Fills memory with a pattern.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn fill(&mut self, bytes: u64, seed: u64, timeout: Duration) -> Result<Filled> {
        self.call(Command::Fill { bytes, seed }, timeout)
    }

    /// Checks the pattern.
    ///
    /// # Errors
    /// As [`Guest::call`], and when a word is not what was written.
    pub fn check(&mut self, timeout: Duration) -> Result<Checked> {
        let checked: Checked = self.call(Command::Check, timeout)?;
        if let Some(wrong) = &checked.mismatch {
            bail!(
                "guest memory at offset {:#x} holds {:#x}, not {:#x}",
                wrong.offset,
                wrong.found,
                wrong.expected
            );
        }
        Ok(checked)
    }

    /// Gives the filled memory back.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn free(&mut self) -> Result<Freed> {
        self.call(Command::Free, SHORT)
    }

    /// Starts working on a disk.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn disk_start(&mut self, start: DiskStart) -> Result<DiskStatus> {
        self.call(Command::DiskStart(start), SHORT)
    }

    /// How the work on a disk goes.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn disk_status(&mut self, path: &str) -> Result<DiskStatus> {
        self.call(
            Command::DiskStatus {
                path: path.to_owned(),
            },
            SHORT,
        )
    }

    /// Ends the work on a disk and reads back all it wrote.
    ///
    /// # Errors
    /// As [`Guest::call`], and when anything was wrong with the disk.
    pub fn disk_stop_verified(&mut self, path: &str, timeout: Duration) -> Result<DiskStatus> {
        let status: DiskStatus = self.call(
            Command::DiskStop {
                path: path.to_owned(),
                verify: true,
            },
            timeout,
        )?;
        if !status.ok || !status.verified_all {
            bail!("disk {path} is not what was written: {status:?}");
        }
        Ok(status)
    }

    /// The lines of the kernel log that contain one of `deny`.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn denied_kernel_messages(&mut self, deny: &[String]) -> Result<Vec<String>> {
        let log: KernelLog = self.call(
            Command::Dmesg {
                deny: deny.to_vec(),
                tail: 0,
            },
            SHORT,
        )?;
        if log.lines == 0 {
            bail!("the guest's kernel log is empty: nothing can be said about it");
        }
        Ok(log.matches)
    }

    /// Runs a program in the guest.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn exec(&mut self, argv: &[&str], timeout: Duration) -> Result<Executed> {
        let argv = argv.iter().map(|word| word.to_string()).collect();
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        // The agent ends the program in time and still has to answer.
        self.call(Command::Exec { argv, timeout_ms }, timeout + SHORT)
    }

    /// Holds memory in pipes, which the kernel can't move.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn hold_in_pipes(&mut self, bytes: u64, timeout: Duration) -> Result<PipesHeld> {
        self.call(Command::Pipes { bytes }, timeout)
    }

    /// Lets go of what pipes hold.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn free_pipes(&mut self) -> Result<PipesHeld> {
        self.call(Command::PipesFree, SHORT)
    }

    /// Writes four bytes to an I/O port; the time the guest's processor stayed at that, by its own clock.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn port_write(&mut self, port: u16, value: u32, timeout: Duration) -> Result<Duration> {
        let written: PortWritten = self.call(
            Command::PortWrite {
                port,
                value,
                width: 4,
            },
            timeout,
        )?;
        Ok(Duration::from_nanos(written.ns))
    }

    /// Restarts the guest; [`Guest::wait_ready`] waits for it to come back.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn reboot(&mut self) -> Result<Done> {
        self.call(Command::Reboot, SHORT)
    }

    /// Powers the guest off.
    ///
    /// # Errors
    /// As [`Guest::call`].
    pub fn power_off(&mut self) -> Result<Done> {
        self.call(Command::Poweroff, SHORT)
    }

    fn advance(&mut self, deadline: Instant, what: &str) -> Result<()> {
        if let Some(line) = &self.panic {
            bail!("the guest's kernel panicked: {line}{}", self.console.tail());
        }
        match self
            .incoming
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(incoming) => self.take(incoming),
            Err(RecvTimeoutError::Timeout) => {
                bail!("waited in vain for {what}{}", self.console.tail())
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.closed()),
        }
    }

    fn closed(&self) -> anyhow::Error {
        anyhow!("the serial line was closed{}", self.console.tail())
    }

    fn take(&mut self, incoming: Incoming) -> Result<()> {
        match incoming {
            Incoming::Message(Message::Event(Event::Ready(ready)), at) => {
                self.readies.push_back((ready, at))
            }
            Incoming::Message(Message::Event(Event::Progress { .. }), _) => {}
            Incoming::Message(Message::Answer { id, ok }, _) => {
                self.answers.insert(id, Ok(ok));
            }
            Incoming::Message(Message::Failure { id: 0, error }, _) => bail!("guest: {error}"),
            Incoming::Message(Message::Failure { id, error }, _) => {
                self.answers.insert(id, Err(error));
            }
            Incoming::Line(line) => self.lines.push_back(line),
            Incoming::Garbled(line) => bail!(
                "a line of the agent is damaged: {line}{}",
                self.console.tail()
            ),
            Incoming::Panic(line) => {
                self.panic = Some(line.clone());
                bail!("the guest's kernel panicked: {line}{}", self.console.tail());
            }
            Incoming::Closed => return Err(self.closed()),
        }
        Ok(())
    }
}

fn read_lines(mut reader: impl Read, console: &Console, sender: &Sender<Incoming>) {
    let mut line = Vec::new();
    let mut line_began = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        let length = match reader.read(&mut buffer) {
            Ok(length) if length > 0 => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            _ => break,
        };
        let now = Instant::now();
        let bytes = buffer.get(..length).unwrap_or_default();
        console.add(bytes);
        for &byte in bytes {
            if line.is_empty() {
                line_began = now;
            }
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&line).into_owned();
            line.clear();
            if let Some(incoming) = understand(&text, line_began)
                && sender.send(incoming).is_err()
            {
                return;
            }
        }
    }
    // Nobody may be listening any more, which is fine.
    let _ = sender.send(Incoming::Closed);
}

fn understand(line: &str, began: Instant) -> Option<Incoming> {
    match parse_line(line) {
        Some(Ok(message)) => Some(Incoming::Message(message, began)),
        Some(Err(_)) => Some(Incoming::Garbled(line.trim_end().to_owned())),
        None if line.contains(PANIC) => Some(Incoming::Panic(line.trim_end().to_owned())),
        None => {
            let line = line.strip_prefix(ejector::LINE)?;
            Some(Incoming::Line(line.trim_end().to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    const READY: &str = r#"@ebb {"event":"ready","kernel":"6.1","cpus":1,"mem_total":1,"started_ms":1,"uptime_ms":2,"problems":[]}"#;
    const SOON: Duration = Duration::from_secs(60);

    fn line() -> (Guest, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Guest::new(ours.try_clone().unwrap(), ours), theirs)
    }

    fn say(peer: &mut UnixStream, text: &str) {
        peer.write_all(text.as_bytes()).unwrap();
        peer.write_all(b"\r\n").unwrap();
    }

    #[test]
    fn answers_find_their_request_whatever_comes_between() {
        let (mut guest, mut peer) = line();
        say(&mut peer, "[ 0.1] noise");
        say(&mut peer, READY);
        assert_eq!(guest.wait_ready(SOON).unwrap().kernel, "6.1");
        let first = guest.send(Command::Free).unwrap();
        let second = guest.send(Command::Free).unwrap();
        let mut requests = BufReader::new(peer.try_clone().unwrap()).lines();
        assert_eq!(
            requests.next().unwrap().unwrap(),
            r#"{"id":1,"cmd":"free"}"#
        );
        assert_eq!(
            requests.next().unwrap().unwrap(),
            r#"{"id":2,"cmd":"free"}"#
        );
        say(&mut peer, r#"@ebb {"id":2,"ok":{"bytes":2}}"#);
        say(&mut peer, "[ 0.2] more noise");
        say(
            &mut peer,
            r#"@ebb {"event":"progress","id":1,"done":1,"total":2}"#,
        );
        assert!(!guest.is_answered(first).unwrap());
        say(&mut peer, r#"@ebb {"id":1,"ok":{"bytes":1}}"#);
        assert_eq!(guest.wait::<Freed>(first, SOON).unwrap().bytes, 1);
        assert!(guest.is_answered(second).unwrap());
        assert_eq!(guest.wait::<Freed>(second, SOON).unwrap().bytes, 2);
        assert!(guest.console().text().contains("more noise"));
    }

    #[test]
    fn the_agents_errors_come_through() {
        let (mut guest, mut peer) = line();
        say(&mut peer, r#"@ebb {"id":1,"error":"nothing is filled"}"#);
        let error = format!("{:#}", guest.check(SOON).unwrap_err());
        assert!(
            error.contains("Check") && error.contains("nothing is filled"),
            "{error}"
        );
    }

    #[test]
    fn a_guest_that_is_its_own_kernel_speaks_in_lines() {
        let (mut guest, mut peer) = line();
        say(&mut peer, "SeaBIOS");
        say(&mut peer, "flat: clock 5");
        guest.send_byte(ejector::CLOCK).unwrap();
        assert_eq!(guest.wait_line(SOON).unwrap(), "clock 5");
        let mut byte = [0];
        peer.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [b'c']);
        assert!(guest.wait_line(Duration::from_millis(10)).is_err());
    }

    #[test]
    fn a_wrong_word_is_an_error() {
        let (mut guest, mut peer) = line();
        let mismatch = r#"{"offset":4096,"expected":1,"found":0}"#;
        say(
            &mut peer,
            &format!(
                r#"@ebb {{"id":1,"ok":{{"bytes":9,"ok":false,"mismatch":{mismatch},"ms":1}}}}"#
            ),
        );
        assert!(
            guest
                .check(SOON)
                .unwrap_err()
                .to_string()
                .contains("0x1000 holds 0x0, not 0x1")
        );
    }

    #[test]
    fn a_panic_ends_the_waiting_at_once() {
        let (mut guest, mut peer) = line();
        say(&mut peer, "[ 1.0] Kernel panic - not syncing: lost");
        let begun = Instant::now();
        let error = guest
            .wait_ready(Duration::from_secs(100))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("not syncing: lost") && begun.elapsed() < SOON,
            "{error}"
        );
        assert!(guest.report().is_err());
    }

    #[test]
    fn silence_damage_and_the_end_are_errors_with_the_console() {
        let (mut guest, mut peer) = line();
        say(&mut peer, "last words");
        let begun = Instant::now();
        loop {
            let waited = guest.wait_ready(Duration::from_millis(50));
            let error = waited.unwrap_err().to_string();
            assert!(error.contains("waited in vain"), "{error}");
            // They are read by another thread.
            if error.contains("last words") {
                break;
            }
            assert!(begun.elapsed() < SOON, "{error}");
        }
        say(&mut peer, "@ebb {\"id\":1,\"o[ 1.0] oops");
        assert!(
            guest
                .wait_ready(SOON)
                .unwrap_err()
                .to_string()
                .contains("damaged")
        );
        drop(peer);
        assert!(
            guest
                .wait_ready(SOON)
                .unwrap_err()
                .to_string()
                .contains("closed")
        );
    }

    #[test]
    fn problems_of_the_agent_are_errors() {
        let (mut guest, mut peer) = line();
        say(
            &mut peer,
            &READY.replace("[]", r#"["load module virtio_mem.ko: refused"]"#),
        );
        assert!(
            guest
                .wait_ready(SOON)
                .unwrap_err()
                .to_string()
                .contains("virtio_mem.ko")
        );
    }
}
