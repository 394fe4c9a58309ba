// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds the static programs that run as PID 1: the guest agent and the
//! capsule's init; and the guest that is its own kernel.

use std::env;
use std::path::{Path, PathBuf};
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
    if is_built(&programs.agent)? {
        return Ok(programs);
    }
    let packages = ["--package", "ebbtide-agent", "--bins"];
    run_cargo(&packages, "-C target-feature=+crt-static", &directory)?;
    Ok(programs)
}

/// Builds the guest that does to its devices what no driver would ([`ebbtide_hostile`](../ebbtide_hostile/index.html)):
/// an ELF kernel.
///
/// # Errors
/// As [`build`].
pub fn build_hostile() -> Result<PathBuf> {
    let directory = target_dir()?.join("hostile");
    let program = directory.join(TARGET).join("release/ebbtide-hostile");
    if is_built(&program)? {
        return Ok(program);
    }
    let packages = ["--package", "ebbtide-hostile", "--features", "guest"];
    // Nothing of a C library, at the address that its loader puts it to, with no header before its code that lies lower.
    let flags = "-C panic=abort -C relocation-model=static -C link-arg=-nostartfiles -C link-arg=-nostdlib -C link-arg=-static \
                 -C link-arg=-no-pie -C link-arg=-Wl,--image-base=0x200000,--build-id=none,-e,_start";
    run_cargo(&packages, flags, &directory)?;
    Ok(program)
}

/// Inside the capsule nothing can be built.
fn is_built(program: &Path) -> Result<bool> {
    let inside = env::var_os(CAPSULE_VARIABLE).is_some();
    if inside && !program.is_file() {
        bail!(
            "{} is missing: build it outside of the capsule",
            program.display()
        );
    }
    Ok(inside)
}

fn run_cargo(packages: &[&str], flags: &str, directory: &Path) -> Result<()> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
        .args(["build", "--quiet", "--release"])
        .args(packages);
    // With a named target the flags don't reach procedural macros, which can't be static.
    command
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(directory);
    for setting in [
        r#"profile.release.opt-level="s""#,
        r#"profile.release.lto="fat""#,
        "profile.release.codegen-units=1",
        "profile.release.debug=false",
        "profile.release.strip=true",
    ] {
        command.args(["--config", setting]);
    }
    command.env("RUSTFLAGS", flags);
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
    let status = command
        .status()
        .with_context(|| format!("run cargo {}", packages.join(" ")))?;
    if !status.success() {
        bail!("cargo build {} failed ({status})", packages.join(" "));
    }
    Ok(())
}
