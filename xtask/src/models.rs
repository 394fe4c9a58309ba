// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The concurrency models: each must hold, and each seeded bug must be found.
//!
//! A crate with models lists them in its `models.toml`; they are the tests of its
//! `tests/models.rs`, or of the file of `tests/` that it names, built once with `--cfg loom`. A
//! seeded bug is in that build, too: the program runs with it when `EBBTIDE_SEEDED` names it
//! (`ebbtide_models::seeded!`).

pub mod list;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::build;
use list::{Crate, Model};

/// Runs at the same time.
const WORKERS: usize = 2;

#[derive(clap::Args, Default)]
pub struct ModelsArgs {
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

/// What a model's test prints when it holds.
#[derive(Deserialize)]
struct Passed {
    model: String,
    invariant: String,
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
    let say = |line: &str| {
        if !args.json {
            println!("{line}");
        }
    };
    let rows = all(say)?;
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

/// A model to run: as it is, or with a bug.
struct Run<'a> {
    of: &'a Crate,
    program: PathBuf,
    model: &'a Model,
    bug: Option<&'a str>,
}

/// What a model did.
struct Outcome<'a> {
    model: &'a str,
    bug: Option<&'a str>,
    schedules: u64,
    found: bool,
}

fn all(say: impl Fn(&str) + Sync) -> Result<Vec<Row>> {
    let crates = list::crates()?;
    let runs = runs(&crates)?;
    let waiting = Mutex::new(runs.iter());
    let outcomes = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| {
                let (waiting, say) = (&waiting, &say);
                scope.spawn(move || {
                    let mut outcomes = Vec::new();
                    while let Some(run) = next(waiting) {
                        outcomes.push(run.outcome(say)?);
                    }
                    Ok(outcomes)
                })
            })
            .collect();
        let mut outcomes = Vec::new();
        for worker in workers {
            let result: Result<Vec<Outcome<'_>>> =
                worker.join().unwrap_or_else(|_| bail!("a worker panicked"));
            outcomes.extend(result?);
        }
        anyhow::Ok(outcomes)
    })?;
    let models = crates.iter().flat_map(|c| &c.models);
    Ok(models.map(|model| row(model, &outcomes)).collect())
}

fn next<T>(waiting: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    waiting.lock().ok()?.next()
}

/// Builds the programs of all models; what to run. A model that holds goes through all of its
/// schedules, with a bug only to the first that shows it: those that hold come first, and of them
/// the long ones.
fn runs(crates: &[Crate]) -> Result<Vec<Run<'_>>> {
    let programs = build(crates)?;
    let mut runs = Vec::new();
    for of in crates {
        for model in &of.models {
            let source = of.source(model);
            let Some(program) = programs.iter().find(|p| p.source == source) else {
                bail!("{}: {} is not a test", model.name, source.display());
            };
            let bugs = model.seeded.iter().map(|bug| Some(bug.as_str()));
            runs.extend(std::iter::once(None).chain(bugs).map(|bug| Run {
                of,
                program: program.path.clone(),
                model,
                bug,
            }));
        }
    }
    runs.sort_by_key(|run| (run.bug.is_some(), !run.model.long));
    Ok(runs)
}

fn build(crates: &[Crate]) -> Result<Vec<build::Program>> {
    let mut command = build::cargo(&["test", "--release", "--no-run", "--quiet"]);
    command
        .arg("--message-format=json-render-diagnostics")
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", build::target_dir().join("models"));
    for of in crates {
        command.args(["--package", &of.package]);
    }
    let models = crates.iter().flat_map(|of| &of.models);
    let mut files: Vec<&str> = models.map(|model| model.file.as_str()).collect();
    files.sort_unstable();
    files.dedup();
    for file in files {
        command.args(["--test", file]);
    }
    build::made(&mut command)
}

fn row(model: &Model, outcomes: &[Outcome<'_>]) -> Row {
    let mine = || outcomes.iter().filter(|o| o.model == model.name);
    Row {
        model: model.name.clone(),
        invariant: model.invariant.clone(),
        schedules: mine()
            .filter(|o| o.bug.is_none())
            .map(|o| o.schedules)
            .sum(),
        seeded: model
            .seeded
            .iter()
            .map(|bug| Seeded {
                bug: bug.clone(),
                found: mine().any(|o| o.bug == Some(bug) && o.found),
            })
            .collect(),
    }
}

impl<'a> Run<'a> {
    fn outcome(&self, say: &impl Fn(&str)) -> Result<Outcome<'a>> {
        let (holds, text) = self.test()?;
        let name = &self.model.name;
        let outcome = match self.bug {
            None => self.holds(holds, &text)?,
            Some(bug) => self.finds(bug, holds, &text)?,
        };
        say(&match self.bug {
            None => format!(
                "{name:<24} holds in {:>8} schedules: {}",
                outcome.schedules, self.model.invariant
            ),
            Some(bug) if outcome.found => format!("{name:<24} seeded {bug}: found"),
            Some(bug) => format!("{name:<24} seeded {bug}: NOT FOUND"),
        });
        Ok(outcome)
    }

    /// What the model did without a bug.
    fn holds(&self, holds: bool, text: &str) -> Result<Outcome<'a>> {
        let passed = text
            .lines()
            .find_map(|l| l.split_once("MODEL ").map(|(_, json)| json))
            .and_then(|json| serde_json::from_str::<Passed>(json).ok());
        let name = &self.model.name;
        let Some(passed) = passed.filter(|_| holds) else {
            bail!("{name}: the model does not hold:\n{text}");
        };
        if (&passed.model, &passed.invariant) != (name, &self.model.invariant) {
            let (model, invariant) = (&passed.model, &passed.invariant);
            bail!("{name}: models.toml says other than its test: {model}: {invariant}");
        }
        Ok(self.ended(passed.schedules, false))
    }

    /// What it did with `bug`, which it must have come to: else it failed, or held, for another
    /// reason.
    fn finds(&self, bug: &str, holds: bool, text: &str) -> Result<Outcome<'a>> {
        let reached = format!("SEEDED {bug}");
        if !text.lines().any(|line| line.ends_with(&reached)) {
            bail!(
                "{}: did not come to seeded bug {bug}:\n{text}",
                self.model.name
            );
        }
        Ok(self.ended(0, !holds))
    }

    fn ended(&self, schedules: u64, found: bool) -> Outcome<'a> {
        Outcome {
            model: &self.model.name,
            bug: self.bug,
            schedules,
            found,
        }
    }

    /// Runs the model's test; whether it held, and what was printed.
    fn test(&self) -> Result<(bool, String)> {
        let mut command = Command::new(&self.program);
        command
            .current_dir(&self.of.dir)
            .args(["--exact", &self.model.test, "--nocapture"])
            .env_remove("EBBTIDE_SEEDED");
        if let Some(bug) = self.bug {
            command.env("EBBTIDE_SEEDED", bug);
        }
        let out = command
            .output()
            .with_context(|| format!("{}", self.program.display()))?;
        let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&out.stderr));
        Ok((out.status.success(), text))
    }
}
