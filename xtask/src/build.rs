// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Running cargo and finding what it built.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// The target directory: that of the cargo that runs us, so that nothing is built twice.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A cargo command in the workspace root.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// Runs `command`; its output goes to ours.
///
/// # Errors
/// When it can't be started or fails; names it.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command
        .status()
        .with_context(|| format!("{shown}: can't be started"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Runs all `commands` at once; what they print comes as it is printed.
///
/// # Errors
/// When one can't be started or fails, after the others have ended; names each.
pub fn run_together(commands: &mut [Command]) -> Result<()> {
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let runs: Vec<_> = commands
            .iter_mut()
            .map(|command| scope.spawn(|| run(command)))
            .collect();
        runs.into_iter()
            .map(|run| run.join().unwrap_or_else(|_| bail!("a run panicked")))
            .collect()
    });
    let failed: Vec<String> = results
        .into_iter()
        .filter_map(|result| result.err().map(|e| format!("{e:#}")))
        .collect();
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

/// Runs `command` and returns what it printed on standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let out = command
        .output()
        .with_context(|| format!("{shown}: can't be started"))?;
    if !out.status.success() {
        bail!(
            "{shown}: {}\n{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Builds the binaries of `packages` in release mode and returns the folder they are in.
pub fn release(packages: &[&str]) -> Result<PathBuf> {
    let mut command = cargo(&["build", "--release", "--quiet"]);
    for package in packages {
        command.args(["--package", package]);
    }
    run(&mut command)?;
    Ok(target_dir().join("release"))
}

/// Builds the integration tests whose names start with `prefix` and returns the programs.
///
/// Out of the whole workspace: of one package alone the crates that it is made of would be built anew, with fewer features.
///
/// # Errors
/// When the build fails or there is no such test.
pub fn test_programs(prefix: &str) -> Result<Vec<PathBuf>> {
    let mut command = cargo(&["test", "--workspace", "--no-run", "--quiet"]);
    command.args(["--message-format=json", "--test", &format!("{prefix}*")]);
    let programs = programs(&mut command, prefix)?;
    if programs.is_empty() {
        bail!("there is no test {prefix}*");
    }
    Ok(programs)
}

/// The programs that a build with messages in JSON makes of targets whose name starts with
/// `prefix`.
///
/// # Errors
/// When the build fails.
pub fn programs(command: &mut Command, prefix: &str) -> Result<Vec<PathBuf>> {
    let made = made(command)?.into_iter();
    Ok(made
        .filter(|program| program.name.starts_with(prefix))
        .map(|program| program.path)
        .collect())
}

/// A program that was built.
pub struct Program {
    /// The target's name.
    pub name: String,
    /// The target's first source file.
    pub source: PathBuf,
    pub path: PathBuf,
}

/// The programs that a build with messages in JSON makes.
///
/// # Errors
/// When the build fails.
pub fn made(command: &mut Command) -> Result<Vec<Program>> {
    let text = output(command)?;
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|m| {
            Some(Program {
                name: m["target"]["name"].as_str()?.to_owned(),
                source: m["target"]["src_path"].as_str()?.into(),
                path: m["executable"].as_str()?.into(),
            })
        })
        .collect())
}
