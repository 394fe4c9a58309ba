// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial line as a stream of messages.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use rustix::termios::{
    OptionalActions, QueueSelector, Termios, speed, tcdrain, tcflush, tcgetattr, tcsetattr,
};

use crate::protocol::{Message, REQUEST_LIMIT_BYTES, format_line};

/// Opens a terminal raw: no echo, no translation, no signals.
///
/// # Errors
/// The terminal can't be opened or set.
pub fn open_raw(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits() as i32)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    let mut attributes: Termios = tcgetattr(&file).context("read terminal attributes")?;
    attributes.make_raw();
    attributes
        .set_speed(speed::B115200)
        .context("set terminal speed")?;
    tcsetattr(&file, OptionalActions::Now, &attributes).context("make the terminal raw")?;
    // What came in before was echoed, and was for nobody.
    tcflush(&file, QueueSelector::IFlush).context("flush terminal input")?;
    Ok(file)
}

/// Writes messages, each with one write, from any thread.
#[derive(Clone, Debug)]
pub struct Messages {
    tty: Arc<Mutex<File>>,
}

impl Messages {
    /// Writes to `tty`.
    pub fn new(tty: File) -> Messages {
        Messages {
            tty: Arc::new(Mutex::new(tty)),
        }
    }

    /// Sends one line. A failure is dropped: there is nobody to tell.
    pub fn send(&self, message: &Message) {
        let line = format_line(message);
        let mut tty = self.tty.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = tty.write_all(line.as_bytes());
    }

    /// Waits until everything has left the port.
    pub fn drain(&self) {
        let tty = self.tty.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = tcdrain(&*tty);
    }
}

/// Splits what comes in from the serial line into request lines.
#[derive(Debug)]
pub struct Lines<R> {
    input: R,
    pending: Vec<u8>,
}

/// What [`Lines::next_line`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// One line without its end.
    Text(String),
    /// A line longer than [`REQUEST_LIMIT_BYTES`], dropped.
    TooLong,
}

impl<R: Read> Lines<R> {
    /// Reads from `input`.
    pub fn new(input: R) -> Lines<R> {
        Lines {
            input,
            pending: Vec::new(),
        }
    }

    /// Waits for the next line that is not empty. End of file is not the end
    /// of a serial line (the other side may come back), so it is waited out.
    pub fn next_line(&mut self) -> Line {
        let mut skipping = false;
        loop {
            if let Some(end) = self
                .pending
                .iter()
                .position(|&byte| byte == b'\n' || byte == b'\r')
            {
                let rest = self.pending.split_off(end + 1);
                let line = std::mem::replace(&mut self.pending, rest);
                let text = String::from_utf8_lossy(&line).trim().to_owned();
                if skipping {
                    return Line::TooLong;
                }
                if !text.is_empty() {
                    return Line::Text(text);
                }
                continue;
            }
            if self.pending.len() > REQUEST_LIMIT_BYTES {
                self.pending.clear();
                skipping = true;
            }
            self.read_more();
        }
    }

    fn read_more(&mut self) {
        let mut buffer = [0; 4096];
        match self.input.read(&mut buffer) {
            Ok(0) => std::thread::sleep(Duration::from_millis(50)),
            Ok(length) => self.pending.extend(buffer.iter().take(length)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_at_either_end_of_line() {
        let mut lines = Lines::new(&b"one\r\n\r\n  two \nthree\r"[..]);
        for expected in ["one", "two", "three"] {
            assert_eq!(lines.next_line(), Line::Text(expected.into()));
        }
    }

    #[test]
    fn an_endless_line_is_dropped_and_the_next_one_read() {
        let mut input = vec![b'x'; REQUEST_LIMIT_BYTES * 3];
        input.extend(b"\nafter\n");
        let mut lines = Lines::new(&input[..]);
        assert_eq!(lines.next_line(), Line::TooLong);
        assert_eq!(lines.next_line(), Line::Text("after".into()));
    }
}
