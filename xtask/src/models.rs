// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The concurrency models: each must hold, and each seeded bug must be found.
//!
//! A crate with models lists them in its `models.toml`; they are the tests of its
//! `tests/models.rs`, or of the file of `tests/` that it names, built with `--cfg loom`. A seeded bug is compiled in by the crate's build
//! script when `EBBTIDE_SEEDED` names it, so that only that crate is built again.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::build;

/// Crates whose models run at the same time.
const WORKERS: usize = 2;

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

/// Two crates at a time, each in a target directory of its own: one waits for the compiler while
/// the other searches.
fn all(say: impl Fn(&str) + Sync) -> Result<Vec<Row>> {
    let crates = build::root().join("crates");
    let mut dirs: Vec<_> = fs::read_dir(&crates)?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.join("models.toml").exists())
        .collect();
    dirs.sort();
    let waiting = Mutex::new(dirs.iter().enumerate());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (waiting, done, say) = (&waiting, &done, &say);
                scope.spawn(move || {
                    let target = build::target_dir().join(format!("models-{worker}"));
                    while let Some((place, dir)) = next(waiting) {
                        let rows = of_crate(dir, &target, say)?;
                        if let Ok(mut done) = done.lock() {
                            done.push((place, rows));
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a worker panicked")))
    })?;
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(place, _)| *place);
    let rows: Vec<Row> = done.into_iter().flat_map(|(_, rows)| rows).collect();
    if rows.is_empty() {
        bail!("no models.toml found under {}", crates.display());
    }
    Ok(rows)
}

fn next<T>(waiting: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    waiting.lock().ok()?.next()
}

/// First every model as it is, then every bug: a bug is compiled in, and each is compiled once.
fn of_crate(dir: &Path, target: &Path, say: &impl Fn(&str)) -> Result<Vec<Row>> {
    let file = dir.join("models.toml");
    let listing: Listing = toml::from_str(&fs::read_to_string(&file)?)
        .with_context(|| format!("{}", file.display()))?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let package = format!("ebbtide-{name}");
    let mut rows = Vec::new();
    for model in &listing.model {
        let row = holds(&package, target, model)?;
        say(&format!(
            "{:<24} holds in {:>8} schedules: {}",
            row.model, row.schedules, row.invariant
        ));
        rows.push(row);
    }
    let mut bugs: Vec<&String> = listing.model.iter().flat_map(|m| &m.seeded).collect();
    bugs.sort();
    bugs.dedup();
    for bug in bugs {
        for (row, model) in rows.iter_mut().zip(&listing.model) {
            if !model.seeded.contains(bug) {
                continue;
            }
            let found = finds(&package, target, model, bug)?;
            say(&format!(
                "{:<24} seeded {bug}: {}",
                model.name,
                if found { "found" } else { "NOT FOUND" }
            ));
            let bug = bug.clone();
            row.seeded.push(Seeded { bug, found });
        }
    }
    Ok(rows)
}

/// Runs a model as it is.
fn holds(package: &str, target: &Path, model: &Model) -> Result<Row> {
    let (holds, text) = test(package, target, model, None)?;
    let passed = text
        .lines()
        .find_map(|l| l.split_once("MODEL ").map(|(_, json)| json))
        .and_then(|json| serde_json::from_str::<Passed>(json).ok());
    let Some(passed) = passed.filter(|_| holds) else {
        bail!("{}: the model does not hold:\n{text}", model.name);
    };
    Ok(Row {
        model: model.name.clone(),
        invariant: model.invariant.clone(),
        schedules: passed.schedules,
        seeded: Vec::new(),
    })
}

/// Whether a model finds a bug.
fn finds(package: &str, target: &Path, model: &Model, bug: &str) -> Result<bool> {
    let (holds, text) = test(package, target, model, Some(bug))?;
    // A bug that does not compile is not found.
    if !text.contains("running 1 test") {
        bail!("{}: seeded bug {bug} could not run:\n{text}", model.name);
    }
    Ok(!holds)
}

/// Runs one model's test; whether it held, and what was printed.
fn test(
    package: &str,
    target: &Path,
    model: &Model,
    seeded: Option<&str>,
) -> Result<(bool, String)> {
    let mut command = build::cargo(&["test", "--release", "--quiet", "--package", package]);
    command
        .args(["--test", &model.file, "--", "--exact", &model.test])
        .arg("--nocapture")
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", target)
        .env_remove("EBBTIDE_SEEDED");
    if let Some(bug) = seeded {
        command.env("EBBTIDE_SEEDED", bug);
    }
    let out = command.output().context("cargo test")?;
    let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&out.stderr));
    Ok((out.status.success(), text))
}
