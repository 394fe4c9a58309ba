// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the lab and the capsule's init say to each other over the control port.
//!
//! The lab sends one [`Job`] line. Init answers with [`Notice`] lines; the last
//! one is [`Notice::Exit`] or [`Notice::Failed`].

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port for [`Job`] and [`Notice`].
pub const CONTROL_PORT: &str = "ebbtide.control";
/// Name of the port that carries the command's standard output.
pub const STDOUT_PORT: &str = "ebbtide.stdout";
/// Name of the port that carries the command's standard error.
pub const STDERR_PORT: &str = "ebbtide.stderr";
/// 9p tag of the host's root directory.
pub const ROOT_TAG: &str = "ebbtide-root";
/// Set in the environment of every command that runs in the capsule.
pub const CAPSULE_VARIABLE: &str = "EBBTIDE_CAPSULE";

/// Directories of the host that the capsule covers with a fresh tmpfs.
///
/// What a job needs from below them is listed in [`Job::visible`].
pub const COVERED: [&str; 3] = ["/tmp", "/run", "/var/tmp"];

/// What the capsule is to run.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Job {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Writable 9p shares, mounted at the same path as on the host.
    pub shares: Vec<Share>,
    /// Directories below a covered one that stay visible, read-only.
    pub visible: Vec<String>,
    /// Host time since 1970.
    pub clock_ms: u64,
    /// Most that a covered directory may hold.
    pub tmp_bytes: u64,
}

/// A directory of the host that the capsule may write to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Share {
    /// 9p tag.
    pub tag: String,
    /// Absolute path, on the host and in the capsule.
    pub path: String,
}

/// What init reports.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "notice", rename_all = "snake_case")]
pub enum Notice {
    /// Init runs and waits for the job.
    Up {
        /// Time since the capsule's kernel started.
        uptime_ms: u64,
    },
    /// The command is about to be started.
    Started {
        /// Time since the capsule's kernel started.
        uptime_ms: u64,
        /// Whether the capsule has a /dev/kvm.
        kvm: bool,
    },
    /// The capsule works. Sent every few seconds while the command runs.
    Alive,
    /// The command ended, and all it wrote has been handed over.
    Exit {
        /// Its exit code.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
    /// The command could not be run.
    Failed {
        /// Why.
        error: String,
    },
}
