// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds the static programs that run as PID 1: the guest agent and the
//! capsule's init; and the guests that are their own kernels.

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

/// Nothing of a C library, at the address that its loader puts it to, with no header before its code that lies lower. No
/// SSE: a KVM that emulates kernels' code instruction by instruction does not know it.
const FLAT_FLAGS: &str = "-C panic=abort -C relocation-model=static -C link-arg=-nostartfiles -C link-arg=-nostdlib \
    -C link-arg=-static -C link-arg=-no-pie -C link-arg=-Wl,--image-base=0x200000,--build-id=none,-e,_start \
    -C target-feature=-sse,-sse2";

/// The guests that are their own kernels ([`ebbtide_hostile`]): ELF files.
#[derive(Clone, Debug)]
pub struct FlatGuests {
    /// Does to its devices what no driver would.
    pub hostile: PathBuf,
    /// Ejects disks whose requests are under way.
    pub ejector: PathBuf,
}

/// Builds the guests that are their own kernels.
///
/// # Errors
/// As [`build`].
pub fn build_flat() -> Result<FlatGuests> {
    let directory = target_dir()?.join("hostile");
    let program = |name| directory.join(TARGET).join("release").join(name);
    let guests = FlatGuests {
        hostile: program("ebbtide-hostile"),
        ejector: program("ebbtide-ejector"),
    };
    if is_built(&guests.hostile)? && is_built(&guests.ejector)? {
        return Ok(guests);
    }
    let packages = ["--package", "ebbtide-hostile", "--features", "guest"];
    run_cargo(&packages, FLAT_FLAGS, &directory)?;
    Ok(guests)
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
    // Shown only if it fails: without SSE the compiler warns of an ABI that nothing here uses.
    let output = command
        .output()
        .with_context(|| format!("run cargo {}", packages.join(" ")))?;
    if !output.status.success() {
        bail!(
            "cargo build {} failed ({})\n{}",
            packages.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(())
}
