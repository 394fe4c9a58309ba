// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask soak`: the long forms of the system tests.

use anyhow::Result;

use crate::{build, lab};

#[derive(clap::Args)]
pub struct SoakArgs {
    /// Debian kernel to boot: 6.1 or 6.12; both if not given
    #[arg(long)]
    kernel: Option<String>,
    /// Run only the scenario of this name, or those whose name contains it
    #[arg(long)]
    only: Option<String>,
    /// Wait at random before what is asked of VMM and guest: finds tests that only pass in a hurry
    #[arg(long, value_name = "SEED")]
    delays: Option<u64>,
}

/// Runs every scenario at full length.
///
/// # Errors
/// When one fails.
pub fn run(args: &SoakArgs) -> Result<()> {
    let mut command = lab::command("system")?;
    command.arg("--long");
    if let Some(kernel) = &args.kernel {
        command.args(["--kernel", kernel]);
    }
    if let Some(only) = &args.only {
        command.args(["--only", only]);
    }
    if let Some(seed) = args.delays {
        command.args(["--delays", &seed.to_string()]);
    }
    build::run(&mut command)
}
