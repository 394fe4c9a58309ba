// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Project tasks: `cargo xtask <task>`.

mod asan;
mod bench;
mod build;
mod demo;
mod lab;
mod layers;
mod lint;
mod matrix;
mod models;
mod soak;
mod test;
mod torture;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, prove, show and measure Ebbtide.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot Debian under Ebbtide, grow it to 4 GiB, use the memory, give it back; on this
    /// machine's KVM or, where that can't carry a kernel, in the capsule
    Demo(demo::DemoArgs),
    /// Run every layer of tests; red when one fails or can't run
    Test(test::TestArgs),
    /// Measure against peers and floors; writes target/bench/summary.json
    Bench(bench::BenchArgs),
    /// The long forms of the system tests
    Soak(soak::SoakArgs),
    /// Do everything to the memory core at once, on real memory, and count what goes wrong
    Torture(torture::TortureArgs),
    /// Have every device model come, be reset, stopped and taken away at every step of its driver's
    Matrix(matrix::MatrixArgs),
    /// Run the concurrency models and check that each seeded bug is found
    Models(models::ModelsArgs),
    /// Check that crates depend on each other only in layer order
    Layers,
    /// Formatting, clippy, licence headers, file lengths
    Lint,
}

fn main() -> ExitCode {
    let result = match Args::parse().task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Soak(args) => soak::run(&args),
        Task::Torture(args) => torture::run(&args),
        Task::Matrix(args) => matrix::run(&args),
        Task::Models(args) => models::run(&args),
        Task::Layers => layers::run(),
        Task::Lint => lint::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}
