// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask demo`.

use anyhow::Result;

use crate::{build, lab};

#[derive(clap::Args)]
pub struct DemoArgs {
    /// Debian kernel to boot: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
}

/// Runs the demo; its summary is in `target/demo/summary.json`.
///
/// # Errors
/// When a step of it fails.
pub fn run(args: &DemoArgs) -> Result<()> {
    build::run(lab::command("demo")?.args(["--kernel", &args.kernel]))
}
