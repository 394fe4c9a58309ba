// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Formatting, clippy, and the project's own rules on files.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

use crate::{build, layers, models};

const HEADER: &str = "// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause";
/// "About 600 lines" with room to finish a thought.
const MAX_LINES: usize = 650;

/// Runs all lints.
///
/// # Errors
/// The first that fails.
pub fn run() -> Result<()> {
    build::run(&mut build::cargo(&["fmt", "--all", "--check"]))?;
    files()?;
    layers::run()?;
    models::list::crates()?;
    build::run(&mut build::cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    println!("lint: clean");
    Ok(())
}

/// Licence headers and lengths of the source files git knows.
fn files() -> Result<()> {
    let mut git = std::process::Command::new("git");
    git.current_dir(build::root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.rs",
    ]);
    let mut wrong = Vec::new();
    for file in build::output(&mut git)?.lines() {
        let path = build::root().join(file);
        if path.exists() {
            wrong.extend(check(Path::new(file), &fs::read_to_string(&path)?));
        }
    }
    if !wrong.is_empty() {
        bail!("files:\n  {}", wrong.join("\n  "));
    }
    Ok(())
}

fn check(file: &Path, text: &str) -> Option<String> {
    let lines = text.lines().count();
    if !text.starts_with(HEADER) {
        Some(format!(
            "{}: the first line must be `{HEADER}`",
            file.display()
        ))
    } else if lines > MAX_LINES {
        Some(format!(
            "{}: {lines} lines; split it (at most {MAX_LINES})",
            file.display()
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_length() {
        let file = Path::new("a.rs");
        assert_eq!(check(file, &format!("{HEADER}\nfn f() {{}}\n")), None);
        assert!(check(file, "fn f() {}\n").is_some());
        let long = format!("{HEADER}\n{}", "\n".repeat(MAX_LINES));
        assert!(check(file, &long).is_some_and(|m| m.contains("split")));
    }
}
