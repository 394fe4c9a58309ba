// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests under AddressSanitizer.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build;

/// The only target of ours that has both the sanitizer and the table of faults.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Has a `cargo test` build for the sanitizer, in a folder of its own.
///
/// # Errors
/// The compiler comes without the sanitizer's runtime.
pub fn apply(command: &mut Command) -> Result<()> {
    check()?;
    command
        .args(["--target", TARGET, "--target-dir"])
        .arg(build::target_dir().join("asan"))
        // The option is one of nightly compilers, or of any that is told to pass for one.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address");
    Ok(())
}

/// Whether the compiler comes with the sanitizer.
///
/// # Errors
/// It has no runtime for it.
pub fn check() -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let printed = build::output(Command::new(rustc).args(["--print", "target-libdir"]))?;
    let folder = PathBuf::from(printed.trim());
    let is_runtime = |name: &str| name.starts_with("librustc") && name.ends_with("rt.asan.a");
    let found = std::fs::read_dir(&folder)
        .with_context(|| format!("{}", folder.display()))?
        .filter_map(Result::ok)
        .any(|entry| is_runtime(&entry.file_name().to_string_lossy()));
    let folder = folder.display().to_string();
    if !found || !folder.contains(TARGET) {
        bail!(
            "--asan: can't run: no runtime of AddressSanitizer for {TARGET} in {folder}; \
             rustup's toolchains for Linux on x86-64 have one"
        );
    }
    Ok(())
}
