// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask matrix`: the long form of the lab driver's matrix of device models, backends, steps and events.

use anyhow::{Result, bail};

use crate::{asan, build};

#[derive(clap::Args)]
pub struct MatrixArgs {
    /// Cycles of each model
    #[arg(long, default_value_t = 1000)]
    cycles: u32,
    /// Which cycles, and in which order: any number
    #[arg(long)]
    seed: Option<u64>,
    /// One cycle only: MODEL/BEHAVIOUR/STEP/EVENT/SEED, as a failure prints it
    #[arg(long)]
    only: Option<String>,
    /// Under AddressSanitizer
    #[arg(long)]
    asan: bool,
}

/// Builds the test and runs it; what it prints comes through.
///
/// # Errors
/// When a cycle fails, or it can't be built or run.
pub fn run(args: &MatrixArgs) -> Result<()> {
    if args.cycles == 0 {
        bail!("--cycles 0: at least 1");
    }
    let mut command = build::cargo(&["test", "--quiet", "--package", "ebbtide-lab-driver"]);
    if args.asan {
        asan::apply(&mut command)?;
    }
    command
        .args(["--test", "matrix", "--", "--nocapture"])
        .env("EBBTIDE_MATRIX_CYCLES", args.cycles.to_string())
        .env("EBBTIDE_MATRIX_SEED", seed(args))
        .env("EBBTIDE_MATRIX_ONLY", args.only.as_deref().unwrap_or(""));
    build::run(&mut command)
}

/// Nothing: the test's own.
fn seed(args: &MatrixArgs) -> String {
    args.seed.map_or(String::new(), |seed| seed.to_string())
}
