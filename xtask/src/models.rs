// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The concurrency models: each must hold, and each seeded bug must be found.
//!
//! A crate with models lists them in its `models.toml`; they are the tests of its
//! `tests/models.rs`, or of the file of `tests/` that it names, built with `--cfg loom`. A seeded bug is compiled in by the crate's build
//! script when `EBBTIDE_SEEDED` names it, so that only that crate is built again.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::build;

#[derive(clap::Args, Default)]
pub struct ModelsArgs {
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Listing {
    model: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    name: String,
    /// The file of `tests/`, without its extension.
    #[serde(default = "models_file")]
    file: String,
    test: String,
    invariant: String,
    seeded: Vec<String>,
}

fn models_file() -> String {
    "models".to_owned()
}

/// What a model's test prints when it holds.
#[derive(Deserialize)]
struct Passed {
    schedules: u64,
}

#[derive(Serialize)]
struct Row {
    model: String,
    invariant: String,
    schedules: u64,
    seeded: Vec<Seeded>,
}

#[derive(Serialize)]
struct Seeded {
    bug: String,
    found: bool,
}

/// Runs every model and every seeded bug.
///
/// # Errors
/// A model that fails, a bug that is not found, or no model at all.
pub fn run(args: &ModelsArgs) -> Result<()> {
    let rows = all(|line| {
        if !args.json {
            println!("{line}");
        }
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    let missed: Vec<String> = rows
        .iter()
        .flat_map(|r| r.seeded.iter().map(move |s| (r, s)))
        .filter(|(_, s)| !s.found)
        .map(|(r, s)| format!("{}: {}", r.model, s.bug))
        .collect();
    if !missed.is_empty() {
        bail!("seeded bugs that no schedule showed: {}", missed.join(", "));
    }
    Ok(())
}

fn all(say: impl Fn(&str)) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let crates = build::root().join("crates");
    let mut dirs: Vec<_> = fs::read_dir(&crates)?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.join("models.toml").exists())
        .collect();
    dirs.sort();
    for dir in dirs {
        rows.extend(of_crate(&dir, &say)?);
    }
    if rows.is_empty() {
        bail!("no models.toml found under {}", crates.display());
    }
    Ok(rows)
}

fn of_crate(dir: &Path, say: &impl Fn(&str)) -> Result<Vec<Row>> {
    let file = dir.join("models.toml");
    let listing: Listing = toml::from_str(&fs::read_to_string(&file)?)
        .with_context(|| format!("{}", file.display()))?;
    let package = format!(
        "ebbtide-{}",
        dir.file_name().unwrap_or_default().to_string_lossy()
    );
    let mut rows = Vec::new();
    for model in listing.model {
        let (holds, text) = test(&package, &model, None)?;
        let passed = text
            .lines()
            .find_map(|l| l.split_once("MODEL ").map(|(_, json)| json))
            .and_then(|json| serde_json::from_str::<Passed>(json).ok());
        let Some(passed) = passed.filter(|_| holds) else {
            bail!("{}: the model does not hold:\n{text}", model.name);
        };
        say(&format!(
            "{:<24} holds in {:>8} schedules: {}",
            model.name, passed.schedules, model.invariant
        ));
        let mut seeded = Vec::new();
        for bug in &model.seeded {
            let (holds, text) = test(&package, &model, Some(bug))?;
            // A bug that does not compile is not found.
            let ran = text.contains("running 1 test");
            if !ran {
                bail!("{}: seeded bug {bug} could not run:\n{text}", model.name);
            }
            say(&format!(
                "{:<24} seeded {bug}: {}",
                "",
                if holds { "NOT FOUND" } else { "found" }
            ));
            seeded.push(Seeded {
                bug: bug.clone(),
                found: !holds,
            });
        }
        rows.push(Row {
            model: model.name,
            invariant: model.invariant,
            schedules: passed.schedules,
            seeded,
        });
    }
    Ok(rows)
}

/// Runs one model's test; whether it held, and what was printed.
fn test(package: &str, model: &Model, seeded: Option<&str>) -> Result<(bool, String)> {
    let mut command = build::cargo(&["test", "--release", "--quiet", "--package", package]);
    command
        .args(["--test", &model.file, "--", "--exact", &model.test])
        .arg("--nocapture")
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", build::target_dir().join("models"))
        .env_remove("EBBTIDE_SEEDED");
    if let Some(bug) = seeded {
        command.env("EBBTIDE_SEEDED", bug);
    }
    let out = command.output().context("cargo test")?;
    let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&out.stderr));
    Ok((out.status.success(), text))
}
