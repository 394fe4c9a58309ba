// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds the static programs that run as PID 1: the guest agent and the
//! capsule's init.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use ebbtide_agent::capsule_protocol::CAPSULE_VARIABLE;

use crate::places::{target_dir, workspace};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The static programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// PID 1 of a test guest.
    pub agent: PathBuf,
    /// PID 1 of the capsule.
    pub capsule_init: PathBuf,
}

/// Builds both programs if they are not up to date.
///
/// They get a target directory of their own: other flags would make cargo
/// rebuild everything. Inside the capsule nothing can be built, so what was
/// built on the host is taken.
///
/// # Errors
/// cargo's own words.
pub fn build() -> Result<Programs> {
    let directory = target_dir()?.join("agent");
    let built = directory.join(TARGET).join("release");
    let programs = Programs {
        agent: built.join("ebbtide-agent"),
        capsule_init: built.join("ebbtide-capsule-init"),
    };
    if env::var_os(CAPSULE_VARIABLE).is_some() {
        if !programs.agent.is_file() {
            bail!(
                "{} is missing: build it outside of the capsule",
                programs.agent.display()
            );
        }
        return Ok(programs);
    }
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "ebbtide-agent",
        "--bins",
    ]);
    // With a named target the flags don't reach procedural macros, which can't be static.
    command
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&directory);
    for setting in [
        r#"profile.release.opt-level="s""#,
        r#"profile.release.lto="fat""#,
        "profile.release.codegen-units=1",
        "profile.release.debug=false",
        "profile.release.strip=true",
    ] {
        command.args(["--config", setting]);
    }
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    // What an outer cargo has set for its own build.
    for name in [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        command.env_remove(name);
    }
    let status = command.status().context("run cargo to build the agent")?;
    if !status.success() {
        bail!("building the agent failed ({status})");
    }
    Ok(programs)
}
