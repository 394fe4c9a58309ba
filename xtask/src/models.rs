// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The concurrency models: each must hold, and each seeded bug must be found.
//!
//! A crate with models lists them in its `models.toml`; they are the tests of its
//! `tests/models.rs`, or of the file of `tests/` that it names, built with `--cfg loom`. A seeded bug is compiled in by the crate's build
//! script when `EBBTIDE_SEEDED` names it, so that only that crate is built again. `cargo xtask test` tries one bug of
//! each model, `cargo xtask models` all.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::build;

/// Builds that run at the same time.
const WORKERS: usize = 2;

#[derive(clap::Args, Default)]
pub struct ModelsArgs {
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
    /// One seeded bug of each model instead of all
    #[arg(long)]
    short: bool,
}

impl ModelsArgs {
    /// The short form, for people.
    pub fn short() -> Self {
        Self {
            json: false,
            short: true,
        }
    }
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
    let say = |line: &str| {
        if !args.json {
            println!("{line}");
        }
    };
    let rows = all(args.short, say)?;
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

/// The models of one crate.
struct Crate {
    package: String,
    models: Vec<Model>,
}

/// One build of a crate: as it is, or with a bug. All models that want it run on it, so that each
/// is compiled once.
struct Build<'a> {
    package: &'a str,
    models: &'a [Model],
    bug: Option<&'a str>,
}

/// What a model did on a build.
struct Outcome<'a> {
    model: &'a str,
    bug: Option<&'a str>,
    schedules: u64,
    found: bool,
}

/// Two builds at a time, each in a target directory of its own: one waits for the compiler while
/// the other searches.
fn all(short: bool, say: impl Fn(&str) + Sync) -> Result<Vec<Row>> {
    let mut crates = crates()?;
    if short {
        let models = crates.iter_mut().flat_map(|of| &mut of.models);
        models.for_each(|model| model.seeded.truncate(1));
    }
    let builds: Vec<Build<'_>> = crates.iter().flat_map(builds).collect();
    let waiting = Mutex::new(builds.iter());
    let outcomes = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (waiting, say) = (&waiting, &say);
                scope.spawn(move || {
                    let target = build::target_dir().join(format!("models-{worker}"));
                    let mut outcomes = Vec::new();
                    while let Some(build) = next(waiting) {
                        build.run(&target, say, &mut outcomes)?;
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

fn crates() -> Result<Vec<Crate>> {
    let folder = build::root().join("crates");
    let mut crates = Vec::new();
    for entry in fs::read_dir(&folder)? {
        let dir = entry?.path();
        let file = dir.join("models.toml");
        if !file.exists() {
            continue;
        }
        let listing: Listing = toml::from_str(&fs::read_to_string(&file)?)
            .with_context(|| format!("{}", file.display()))?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        crates.push(Crate {
            package: format!("ebbtide-{name}"),
            models: listing.model,
        });
    }
    crates.sort_by(|a, b| a.package.cmp(&b.package));
    if crates.is_empty() {
        bail!("no models.toml found under {}", folder.display());
    }
    Ok(crates)
}

fn builds(of: &Crate) -> Vec<Build<'_>> {
    let mut bugs: Vec<&str> = of
        .models
        .iter()
        .flat_map(|m| m.seeded.iter().map(String::as_str))
        .collect();
    bugs.sort_unstable();
    bugs.dedup();
    std::iter::once(None)
        .chain(bugs.into_iter().map(Some))
        .map(|bug| Build {
            package: &of.package,
            models: &of.models,
            bug,
        })
        .collect()
}

fn next<T>(waiting: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    waiting.lock().ok()?.next()
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

impl<'a> Build<'a> {
    fn run(
        &self,
        target: &Path,
        say: &impl Fn(&str),
        outcomes: &mut Vec<Outcome<'a>>,
    ) -> Result<()> {
        for model in self.models {
            let outcome = match self.bug {
                None => self.holds(target, model, say)?,
                Some(bug) if model.seeded.iter().any(|b| b == bug) => {
                    self.finds(target, model, bug, say)?
                }
                Some(_) => continue,
            };
            outcomes.push(outcome);
        }
        Ok(())
    }

    /// Runs a model on the crate as it is.
    fn holds(&self, target: &Path, model: &'a Model, say: &impl Fn(&str)) -> Result<Outcome<'a>> {
        let (holds, text) = test(self.package, target, model, None)?;
        let passed = text
            .lines()
            .find_map(|l| l.split_once("MODEL ").map(|(_, json)| json))
            .and_then(|json| serde_json::from_str::<Passed>(json).ok());
        let Some(Passed { schedules }) = passed.filter(|_| holds) else {
            bail!("{}: the model does not hold:\n{text}", model.name);
        };
        let (name, invariant) = (&model.name, &model.invariant);
        say(&format!(
            "{name:<24} holds in {schedules:>8} schedules: {invariant}"
        ));
        Ok(Outcome {
            model: name,
            bug: None,
            schedules,
            found: false,
        })
    }

    /// Whether a model finds a bug.
    fn finds(
        &self,
        target: &Path,
        model: &'a Model,
        bug: &'a str,
        say: &impl Fn(&str),
    ) -> Result<Outcome<'a>> {
        let (holds, text) = test(self.package, target, model, Some(bug))?;
        // A bug that does not compile is not found.
        if !text.contains("running 1 test") {
            bail!("{}: seeded bug {bug} could not run:\n{text}", model.name);
        }
        let verdict = if holds { "NOT FOUND" } else { "found" };
        say(&format!("{:<24} seeded {bug}: {verdict}", model.name));
        Ok(Outcome {
            model: &model.name,
            bug: Some(bug),
            schedules: 0,
            found: !holds,
        })
    }
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
        // A bug is a few lines of a crate that was built before.
        .env("CARGO_INCREMENTAL", "1")
        .env_remove("EBBTIDE_SEEDED");
    if let Some(bug) = seeded {
        command.env("EBBTIDE_SEEDED", bug);
    }
    let out = command.output().context("cargo test")?;
    let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&out.stderr));
    Ok((out.status.success(), text))
}
