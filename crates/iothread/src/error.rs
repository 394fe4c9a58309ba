// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong when an executor starts, and the small errors of its parts.

use std::io;

/// An executor or a thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or a policy does not let this process use io_uring at all.
    #[error("io_uring is refused to `{name}` ({source}): {reason}")]
    Refused {
        /// The thread that asked.
        name: String,
        /// Who refuses it, as far as can be told, and what to change.
        reason: String,
        /// EPERM, EACCES or ENOSYS.
        source: io::Error,
    },
    /// The ring could not be made for another reason.
    #[error("cannot set up an io_uring of {entries} entries for `{name}`: {source}")]
    Ring {
        /// The thread that asked.
        name: String,
        /// Submission queue entries asked for.
        entries: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel does not limit the ring to the operations that were asked for.
    #[error("cannot restrict the io_uring of `{name}` (Linux 5.10 or newer can): {source}")]
    Restrict {
        /// The thread that asked.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// This kernel's io_uring lacks something that memory safety or delivery depends on.
    #[error(
        "the io_uring of this kernel is too old for `{name}`: it lacks {lacks} (Linux 5.6 or newer has it)"
    )]
    TooOld {
        /// The thread that asked.
        name: String,
        /// The missing feature.
        lacks: &'static str,
    },
    /// The kernel refused to go on with a ring that had worked. Nothing that a caller can cause.
    #[error("the io_uring of `{name}` failed: {source}")]
    Failed {
        /// The thread it belongs to.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No eventfd for the wake-ups.
    #[error("cannot make an eventfd for `{name}`: {source}")]
    Eventfd {
        /// The thread that asked.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No thread.
    #[error("cannot start thread `{name}`: {source}")]
    Thread {
        /// The thread's name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Error {
    /// Sorts the kernel's answer to io_uring_setup.
    pub(crate) fn from_setup(name: &str, entries: u32, source: io::Error) -> Error {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                let switch = std::fs::read_to_string(SWITCH).ok();
                Error::Refused { name, reason: who_forbids(switch.as_deref()), source }
            }
            Some(libc::ENOSYS) => Error::Refused {
                name,
                reason: "this kernel is built without io_uring, or a seccomp filter (containers have one) hides it; \
                         Linux 5.6 or newer with CONFIG_IO_URING is needed"
                    .to_owned(),
                source,
            },
            _ => Error::Ring { name, entries, source },
        }
    }
}

/// The kernel's switch for io_uring: 0 for everybody, 1 for the privileged, 2 for nobody. Since Linux 6.6.
const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

fn who_forbids(switch: Option<&str>) -> String {
    match switch.map(str::trim) {
        Some(value) if value != "0" => format!(
            "kernel.io_uring_disabled is {value}; `sysctl kernel.io_uring_disabled=0` allows it \
             (1 allows it to CAP_SYS_ADMIN and members of kernel.io_uring_group)"
        ),
        _ => "a seccomp filter or security module forbids it, as containers do by default; run outside the \
              container or allow io_uring_setup, io_uring_enter and io_uring_register in its profile"
            .to_owned(),
    }
}

/// The executor has stopped and takes no new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the iothread has stopped")]
pub struct Stopped;

/// The time ran out before the future was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timed out")]
pub struct Elapsed;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_the_switch_only_when_it_is_set() {
        assert!(who_forbids(Some("2\n")).contains("kernel.io_uring_disabled is 2;"));
        for open in [Some("0\n"), None] {
            let reason = who_forbids(open);
            assert!(
                reason.contains("seccomp") && !reason.contains("disabled"),
                "{reason}"
            );
        }
    }
}
