// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The models and seeded bugs that the crates list, and whether that is what their source has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::build;

#[derive(Deserialize)]
struct Listing {
    model: Vec<Model>,
}

#[derive(Deserialize)]
pub struct Model {
    pub name: String,
    /// The file of `tests/`, without its extension.
    #[serde(default = "models_file")]
    pub file: String,
    pub test: String,
    pub invariant: String,
    /// Takes longest: begins first, so that it is not alone at the end.
    #[serde(default)]
    pub long: bool,
    pub seeded: Vec<String>,
}

fn models_file() -> String {
    "models".to_owned()
}

/// A crate with its models.
pub struct Crate {
    pub package: String,
    pub dir: PathBuf,
    pub models: Vec<Model>,
}

impl Crate {
    /// The source of the test program that `model` is in.
    pub fn source(&self, model: &Model) -> PathBuf {
        self.dir.join("tests").join(format!("{}.rs", model.file))
    }
}

/// The crates with models.
///
/// # Errors
/// A list that can't be read, a bug that is listed or seeded alone, or no model at all.
pub fn crates() -> Result<Vec<Crate>> {
    let folder = build::root().join("crates");
    let mut dirs: Vec<PathBuf> = fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    dirs.sort();
    let (mut crates, mut wrong) = (Vec::new(), Vec::new());
    let mut owners = BTreeMap::new();
    for dir in dirs.into_iter().filter(|dir| dir.is_dir()) {
        let models = read(&dir.join("models.toml"))?;
        let mut seeded = Vec::new();
        collect(&dir.join("src"), &mut seeded)?;
        collect(&dir.join("tests"), &mut seeded)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        wrong.extend(compare(&name, &models, &seeded, &mut owners));
        if !models.is_empty() {
            crates.push(Crate {
                package: format!("ebbtide-{name}"),
                dir,
                models,
            });
        }
    }
    if !wrong.is_empty() {
        bail!("seeded bugs:\n  {}", wrong.join("\n  "));
    }
    if crates.is_empty() {
        bail!("no models.toml found under {}", folder.display());
    }
    Ok(crates)
}

fn read(file: &Path) -> Result<Vec<Model>> {
    if !file.exists() {
        return Ok(Vec::new());
    }
    let shown = || file.display().to_string();
    let listing: Listing =
        toml::from_str(&fs::read_to_string(file).with_context(shown)?).with_context(shown)?;
    Ok(listing.model)
}

/// The names of the bugs seeded in the source files below `dir`, which need not exist.
fn collect(dir: &Path, names: &mut Vec<String>) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, names)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(seeded(&fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

/// The names of the bugs seeded in a source file; comments name them, too, and don't count.
fn seeded(text: &str) -> Vec<String> {
    let code: String = text
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.starts_with("//"))
        .collect();
    code.split("seeded!(")
        .skip(1)
        .filter_map(|rest| rest.strip_prefix('"')?.split_once('"'))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// What is wrong with the bugs of a crate: listed and not seeded, or seeded and not listed, or of
/// a name that another crate has: where both are linked, both would be there.
fn compare(
    name: &str,
    models: &[Model],
    seeded: &[String],
    owners: &mut BTreeMap<String, String>,
) -> Vec<String> {
    let listed = || models.iter().flat_map(|model| &model.seeded);
    let mut wrong = Vec::new();
    for bug in listed().filter(|bug| !seeded.contains(bug)) {
        wrong.push(format!(
            "{name}: models.toml lists {bug}, which no source file seeds"
        ));
    }
    for bug in seeded {
        if !listed().any(|listed| listed == bug) {
            wrong.push(format!("{name}: no model of models.toml lists {bug}"));
        }
        let owner = owners.entry(bug.clone()).or_insert_with(|| name.to_owned());
        if owner != name {
            wrong.push(format!("{name}: {bug} is also seeded in {owner}"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(seeded: &[&str]) -> Model {
        Model {
            name: "gate/drain".to_owned(),
            file: models_file(),
            test: "model_drain".to_owned(),
            invariant: "drained means drained".to_owned(),
            long: false,
            seeded: seeded.iter().map(|bug| (*bug).to_owned()).collect(),
        }
    }

    #[test]
    fn bugs_are_read_from_code_alone() {
        let text = "//! seeded!(\"a\")\nif seeded!(\"b\") || !seeded!(\n    \"c\"\n) {}\n// seeded!(\"d\")\n";
        assert_eq!(seeded(text), ["b", "c"]);
    }

    #[test]
    fn lists_and_source_must_agree() {
        let (models, mut owners) = ([model(&["a", "b"])], BTreeMap::new());
        let names = |names: &[&str]| -> Vec<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        let mut wrong = |of, seeded: &[&str]| compare(of, &models, &names(seeded), &mut owners);
        assert_eq!(wrong("gate", &["a", "b", "a"]), [""; 0]);
        assert_eq!(
            wrong("gate", &["a"]),
            ["gate: models.toml lists b, which no source file seeds"]
        );
        assert_eq!(
            wrong("gate", &["a", "b", "c"]),
            ["gate: no model of models.toml lists c"]
        );
        assert_eq!(
            wrong("memory", &["a", "b"]),
            [
                "memory: a is also seeded in gate",
                "memory: b is also seeded in gate"
            ]
        );
    }
}
