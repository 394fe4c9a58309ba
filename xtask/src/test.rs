// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask test`: every layer, with its seconds; red when one fails or can't run.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{build, lab, lint, models, torture};

#[derive(clap::Args)]
pub struct TestArgs {
    /// Run only these layers; the result then says so and is not the verdict on the tree
    #[arg(long, value_delimiter = ',')]
    layers: Vec<String>,
}

struct Layer {
    name: &'static str,
    what: &'static str,
    /// The layer it runs beside, if that is wanted, too.
    beside: Option<&'static str>,
    /// Whether it boots guests.
    guests: bool,
    run: fn(Later) -> Result<()>,
}

/// What comes after a layer.
#[derive(Clone, Copy)]
struct Later {
    /// Layers with guests.
    guests: bool,
}

/// Debian's kernels that guests boot.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

const LAYERS: &[Layer] = &[
    Layer {
        name: "lint",
        what: "formatting, clippy, layers, headers",
        beside: None,
        guests: false,
        run: |_| lint::run(),
    },
    Layer {
        name: "unit",
        what: "unit, property and device tests of every crate",
        beside: None,
        guests: false,
        run: unit,
    },
    Layer {
        name: "models",
        what: "concurrency models with their seeded bugs, beside the torture of the memory core, also under AddressSanitizer",
        beside: None,
        guests: false,
        run: |_| models_and_torture(),
    },
    Layer {
        name: "kvm",
        what: "flat guests on a real KVM",
        beside: None,
        guests: true,
        run: |_| kvm(),
    },
    // A capsule takes one core, as that of the flat guests does.
    Layer {
        name: "demo",
        what: "the demo",
        beside: Some("kvm"),
        guests: true,
        run: |_| build::run(&mut lab::command("demo")?),
    },
    Layer {
        name: "system",
        what: "Debian guests: memory, disks, resets, monitors",
        beside: None,
        guests: true,
        run: |_| system(),
    },
];

/// The hypervisor's tests on a real KVM, in the capsule where this machine's carries none.
fn kvm() -> Result<()> {
    let programs = build::test_programs("kvm_")?;
    build::run(lab::command("each")?.arg("--").args(programs))
}

/// Each kernel on its own, side by side: a capsule takes one core.
fn system() -> Result<()> {
    let mut runs = Vec::new();
    for kernel in KERNELS {
        let mut command = lab::command("system")?;
        command.args(["--kernel", kernel]);
        runs.push(command);
    }
    build::run_together(&mut runs)
}

/// Those of the network try a passt where there is one: here there is. Most of them wait most of the time: what guests need
/// is made meanwhile.
fn unit(later: Later) -> Result<()> {
    ebbtide_lab::packages::ensure_packages(&["passt"])?;
    let tests = || build::cargo(&["test", "--workspace", "--quiet"]);
    build::run(tests().arg("--no-run"))?;
    std::thread::scope(|scope| {
        if later.guests {
            // Those who need it say what can't be had.
            scope.spawn(lab::prepare);
        }
        build::run(tests().arg("--no-fail-fast"))
    })
}

/// Neither minds to be slow, as other tests do: they run side by side.
fn models_and_torture() -> Result<()> {
    std::thread::scope(|scope| {
        let torture = scope.spawn(torture::run_both);
        let models = models::run(&models::ModelsArgs::default());
        let torture = torture
            .join()
            .unwrap_or_else(|_| bail!("the torture's thread panicked"));
        match (models, torture) {
            (Err(models), Err(torture)) => bail!("{models:#}\n{torture:#}"),
            (models, torture) => models.and(torture),
        }
    })
}

/// The layers that are wanted, in order: those of a group run at the same time.
fn groups(is_wanted: impl Fn(&str) -> bool) -> Vec<Vec<&'static Layer>> {
    let mut groups: Vec<Vec<&Layer>> = Vec::new();
    for layer in LAYERS.iter().filter(|layer| is_wanted(layer.name)) {
        let mut others = groups.iter_mut();
        match others.find(|group| layer.beside == Some(group[0].name)) {
            Some(group) => group.push(layer),
            None => groups.push(vec![layer]),
        }
    }
    groups
}

/// A layer, whether it passed, and what it took.
type Row = (&'static Layer, bool, Duration);

fn run_together(group: &[&'static Layer], later: Later) -> Vec<Row> {
    for layer in group {
        println!("== {}: {}", layer.name, layer.what);
    }
    let run = |layer: &'static Layer| {
        let began = Instant::now();
        let result = (layer.run)(later);
        if let Err(e) = &result {
            println!("{}: {e:#}", layer.name);
        }
        (layer, result.is_ok(), began.elapsed())
    };
    std::thread::scope(|scope| {
        let runs: Vec<_> = group
            .iter()
            .map(|&layer| (layer, scope.spawn(move || run(layer))))
            .collect();
        runs.into_iter()
            .map(|(layer, run)| run.join().unwrap_or((layer, false, Duration::ZERO)))
            .collect()
    })
}

/// Runs the layers in order, to the end also when one fails.
///
/// # Errors
/// Names the layers that failed.
pub fn run(args: &TestArgs) -> Result<()> {
    if let Some(name) = args
        .layers
        .iter()
        .find(|n| !LAYERS.iter().any(|l| l.name == n.as_str()))
    {
        let names: Vec<&str> = LAYERS.iter().map(|l| l.name).collect();
        bail!("--layers {name}: there are {}", names.join(", "));
    }
    let groups = groups(|name| args.layers.is_empty() || args.layers.iter().any(|it| it == name));
    let mut rows = Vec::new();
    let start = Instant::now();
    for (index, group) in groups.iter().enumerate() {
        let mut rest = groups[index + 1..].iter().flatten();
        let later = Later {
            guests: rest.any(|layer| layer.guests),
        };
        rows.extend(run_together(group, later));
    }
    println!("\nlayer      seconds  result");
    for (layer, ok, took) in &rows {
        let verdict = if *ok { "ok" } else { "FAILED" };
        println!("{:<10} {:>7.1}  {verdict}", layer.name, took.as_secs_f64());
    }
    println!("total      {:>7.1}", start.elapsed().as_secs_f64());
    let passed = rows.iter().filter(|(_, ok, _)| *ok).count();
    let failed = rows.len() - passed;
    if rows.len() < LAYERS.len() {
        println!(
            "only {} of {} layers were asked for",
            rows.len(),
            LAYERS.len()
        );
    }
    println!("layers: {passed} passed, {failed} failed");
    if failed > 0 {
        bail!("{failed} of {} layers failed", rows.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(is_wanted: impl Fn(&str) -> bool) -> Vec<Vec<&'static str>> {
        let groups = groups(is_wanted).into_iter();
        let names = |group: Vec<&Layer>| group.iter().map(|layer| layer.name).collect();
        groups.map(names).collect()
    }

    #[test]
    fn each_layer_runs_once_and_beside_another_only_if_that_is_wanted() {
        let all = names(|_| true);
        assert_eq!(all.concat().len(), LAYERS.len());
        assert!(all.contains(&vec!["kvm", "demo"]));
        assert_eq!(
            names(|name| name == "demo" || name == "lint"),
            [["lint"], ["demo"]]
        );
    }
}
