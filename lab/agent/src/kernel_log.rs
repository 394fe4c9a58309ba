// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's log, searched in the guest so that it need not travel.

use anyhow::{Result, bail};

use crate::protocol::KernelLog;

const MATCH_LIMIT: usize = 50;
/// `syslog(2)` actions, see its manual page.
const READ_ALL: libc::c_int = 3;
const CONSOLE_LEVEL: libc::c_int = 8;
const BUFFER_SIZE: libc::c_int = 10;

/// Searches the kernel log for lines that contain one of `deny`.
///
/// # Errors
/// The log can't be read.
pub fn search(deny: &[String], tail: usize) -> Result<KernelLog> {
    Ok(search_text(&read_all()?, deny, tail))
}

/// Keeps kernel messages off the console, so that none falls into the middle
/// of an answer. An oops or a panic lifts this in the kernel itself.
///
/// # Errors
/// Not allowed.
pub fn quiet_console() -> Result<()> {
    // SAFETY: this action takes a number in place of the length and no buffer.
    if unsafe { libc::klogctl(CONSOLE_LEVEL, std::ptr::null_mut(), 1) } < 0 {
        bail!(
            "set the console log level: {}",
            std::io::Error::last_os_error()
        );
    }
    Ok(())
}

fn read_all() -> Result<String> {
    // SAFETY: this action takes no buffer.
    let size = unsafe { libc::klogctl(BUFFER_SIZE, std::ptr::null_mut(), 0) };
    if size <= 0 {
        bail!(
            "size of the kernel log: {}",
            std::io::Error::last_os_error()
        );
    }
    let mut buffer = vec![0u8; size as usize];
    // SAFETY: `buffer` is writable for the `size` bytes named.
    let length = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), size) };
    if length < 0 {
        bail!("read the kernel log: {}", std::io::Error::last_os_error());
    }
    buffer.truncate(length as usize);
    Ok(String::from_utf8_lossy(&buffer).into_owned())
}

fn search_text(text: &str, deny: &[String], tail: usize) -> KernelLog {
    let lines: Vec<&str> = text.lines().collect();
    let matches = lines
        .iter()
        .filter(|line| {
            deny.iter()
                .any(|pattern| !pattern.is_empty() && line.contains(pattern))
        })
        .take(MATCH_LIMIT)
        .map(|line| line.to_string())
        .collect();
    let tail = lines
        .iter()
        .skip(lines.len().saturating_sub(tail))
        .map(|line| line.to_string())
        .collect();
    KernelLog {
        lines: lines.len() as u64,
        matches,
        tail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_denied_lines_come_back() {
        let text = "<6>[ 0.1] a\n<4>[ 0.2] WARNING: CPU: 0\n<3>[ 0.3] Buffer I/O error on vda\n<6>[ 0.4] z\n";
        let deny = ["WARNING:".to_owned(), String::new(), "I/O error".to_owned()];
        let log = search_text(text, &deny, 1);
        assert_eq!((log.lines, log.matches.len()), (4, 2));
        assert!(log.matches[0].contains("CPU: 0"));
        assert_eq!(log.tail, ["<6>[ 0.4] z"]);
        assert_eq!(search_text(text, &deny, 100).tail.len(), 4);
    }
}
