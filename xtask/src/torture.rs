// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask torture`: everything the memory core does at once, on real memory, for as long as
//! one likes; what was done, what went wrong and what is left.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::{asan, build};

const PACKAGE: &str = "ebbtide-memory";
const TEST: &str = "torture";

#[derive(clap::Args)]
pub struct TortureArgs {
    /// How long, in seconds
    #[arg(long, default_value_t = SECONDS)]
    seconds: u32,
    /// Under AddressSanitizer
    #[arg(long)]
    asan: bool,
    /// Optimized, and without debug assertions
    #[arg(long)]
    release: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

/// What the test of the whole tree takes.
const SECONDS: u32 = 60;

impl Default for TortureArgs {
    fn default() -> TortureArgs {
        TortureArgs {
            seconds: SECONDS,
            asan: false,
            release: false,
            json: false,
        }
    }
}

/// What it takes under AddressSanitizer besides.
const ASAN_SECONDS: u32 = 20;

/// The torture in the test of the whole tree: as it is, and under AddressSanitizer where the compiler comes with that.
///
/// # Errors
/// As [`run`].
pub fn run_both() -> Result<()> {
    run(&TortureArgs::default())?;
    if let Err(error) = asan::check() {
        println!("torture under AddressSanitizer is left out: {error:#}");
        return Ok(());
    }
    println!("torture under AddressSanitizer:");
    run(&TortureArgs {
        seconds: ASAN_SECONDS,
        asan: true,
        ..TortureArgs::default()
    })
}

/// Builds the torture, runs it, prints the summary.
///
/// # Errors
/// When it fails, or can't be built or run; with what it printed.
pub fn run(args: &TortureArgs) -> Result<()> {
    if args.seconds == 0 {
        bail!("--seconds 0: at least 1");
    }
    let program = program(args)?;
    let mut command = Command::new(&program);
    command
        .current_dir(build::root())
        .args(["--nocapture", "--test-threads", "1"])
        .env("EBBTIDE_TORTURE_SECONDS", args.seconds.to_string());
    let out = command
        .output()
        .with_context(|| format!("{}: can't be started", program.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let summary = summary(&text);
    if !out.status.success() {
        let errors = String::from_utf8_lossy(&out.stderr);
        bail!("torture: {}\n{text}\n{errors}", out.status);
    }
    let summary = summary.with_context(|| format!("torture: no summary in\n{text}"))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print(&summary);
    }
    Ok(())
}

/// The program to run.
fn program(args: &TortureArgs) -> Result<PathBuf> {
    let mut command = build::cargo(&["test", "--no-run", "--quiet", "--message-format=json"]);
    command.args(["--test", TEST]);
    if args.release {
        command.arg("--release");
    }
    if args.asan {
        asan::apply(&mut command)?;
    }
    // In a folder of its own: else what the tests of the whole workspace are made of is there already.
    if args.asan || args.release {
        command.args(["--package", PACKAGE]);
    } else {
        command.arg("--workspace");
    }
    let mut programs = build::programs(&mut command, TEST)?;
    match (programs.pop(), programs.is_empty()) {
        (Some(program), true) => Ok(program),
        _ => bail!("{PACKAGE} has not one test {TEST}"),
    }
}

/// What the test printed last.
fn summary(text: &str) -> Option<Map<String, Value>> {
    let json = text
        .lines()
        .rev()
        .find_map(|l| l.strip_prefix("TORTURE "))?;
    serde_json::from_str(json).ok()
}

/// Each part of the summary on a line of its own.
fn print(summary: &Map<String, Value>) {
    for (part, counts) in summary {
        let shown = match counts.as_object() {
            Some(counts) => {
                let counts = counts.iter().map(|(name, count)| format!("{name} {count}"));
                counts.collect::<Vec<_>>().join(", ")
            }
            None => counts.to_string(),
        };
        println!("{part:<11} {shown}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_summary_counts() {
        let text = "running 1 test\nTORTURE {\"seconds\":1}\nTORTURE {\"seconds\":2}\n.\n";
        let found = summary(text).unwrap();
        assert_eq!(found["seconds"], 2);
        assert!(summary("TORTURE of prose\n").is_none());
        assert!(summary("").is_none());
    }
}
