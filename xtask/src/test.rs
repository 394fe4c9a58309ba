// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask test`: every layer, with its seconds; red when one fails or can't run.

use std::time::Instant;

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
    run: fn() -> Result<()>,
}

/// Debian's kernels that guests boot.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

const LAYERS: &[Layer] = &[
    Layer {
        name: "lint",
        what: "formatting, clippy, layers, headers",
        run: lint::run,
    },
    Layer {
        name: "unit",
        what: "unit, property and device tests of every crate",
        run: unit,
    },
    Layer {
        name: "models",
        what: "concurrency models with their seeded bugs, beside the torture of the memory core, also under AddressSanitizer",
        run: models_and_torture,
    },
    Layer {
        name: "kvm",
        what: "flat guests on a real KVM",
        run: kvm,
    },
    Layer {
        name: "system",
        what: "Debian guests: memory, disks, resets, monitors",
        run: system,
    },
    Layer {
        name: "demo",
        what: "the demo",
        run: || build::run(&mut lab::command("demo")?),
    },
];

/// The hypervisor's tests on a real KVM, in the capsule where this machine's carries none.
fn kvm() -> Result<()> {
    let programs = build::test_programs("ebbtide-hypervisor", "kvm_")?;
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

/// Those of the network try a passt where there is one: here there is.
fn unit() -> Result<()> {
    ebbtide_lab::packages::ensure_packages(&["passt"])?;
    build::run(&mut build::cargo(&["test", "--workspace", "--quiet"]))
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
    let mut rows = Vec::new();
    let start = Instant::now();
    for layer in LAYERS {
        if !args.layers.is_empty() && !args.layers.iter().any(|n| n == layer.name) {
            continue;
        }
        println!("== {}: {}", layer.name, layer.what);
        let began = Instant::now();
        let result = (layer.run)();
        if let Err(e) = &result {
            println!("{}: {e:#}", layer.name);
        }
        rows.push((layer, result.is_ok(), began.elapsed()));
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
