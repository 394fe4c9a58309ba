// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Python with QEMU's own QMP client, in a virtual environment of the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{packages, places};

/// The client, pinned: what it checks must not change by itself.
const CLIENT: &str = "qemu.qmp==0.0.6";
/// Written last: an environment without this file is half made.
const COMPLETE: &str = "complete";

/// The interpreter of an environment that has [`CLIENT`]; made if it is missing.
///
/// # Errors
/// Python or its venv module is missing, or the client can't be had.
pub fn ensure() -> Result<PathBuf> {
    let cache = places::cache_dir()?;
    let dir = cache.join("python-qmp");
    let python = dir.join("bin/python3");
    if is_complete(&dir) {
        return Ok(python);
    }
    let _lock = places::lock_cache(&cache)?;
    // Another process may have been faster.
    if is_complete(&dir) {
        return Ok(python);
    }
    packages::ensure_packages(&["python3", "python3-venv"])?;
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    // Debian's own, whatever else is in PATH: it is there in every place the tests run.
    run(Command::new("/usr/bin/python3")
        .args(["-m", "venv"])
        .arg(&dir))?;
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", CLIENT]))?;
    let complete = dir.join(COMPLETE);
    fs::write(&complete, CLIENT).with_context(|| format!("write {}", complete.display()))?;
    Ok(python)
}

fn is_complete(dir: &Path) -> bool {
    fs::read_to_string(dir.join(COMPLETE)).is_ok_and(|what| what == CLIENT)
        && dir.join("bin/python3").exists()
}

fn run(command: &mut Command) -> Result<()> {
    let out = command
        .output()
        .with_context(|| format!("run {:?}", command.get_program()))?;
    ensure!(
        out.status.success(),
        "{command:?} ended with {}:\n{}",
        out.status,
        String::from_utf8_lossy(&out.stderr).trim_end()
    );
    Ok(())
}
