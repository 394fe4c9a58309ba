// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide doctor`: what this machine offers.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ebbtide_hypervisor::probe::{self, ProbeReport};
use ebbtide_machine::host::Facts;
use ebbtide_qmp::sizes;
use serde::Serialize;

/// Say what this machine offers
#[derive(clap::Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The KVM device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    kvm: ProbeReport,
    #[serde(flatten)]
    host: Facts,
}

/// Probes and prints; success if a guest can run here.
pub fn main(args: &DoctorArgs) -> ExitCode {
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        kvm: probe::run(&args.kvm, Duration::from_secs(10)),
        host: Facts::gather(),
    };
    if args.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(e) => {
                eprintln!("ebbtide doctor: {e}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        print(&report);
    }
    if report.kvm.can_run_guest && report.host.io_uring.available {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn print(report: &Report) {
    let mark = |good: bool| if good { "ok " } else { "-- " };
    let Report { kvm, host, .. } = report;
    println!("{}KVM            {}", mark(kvm.can_run_guest), kvm.reason);
    let ring = host.io_uring.reason.as_deref().unwrap_or("works");
    println!("{}io_uring       {ring}", mark(host.io_uring.available));
    let barrier = host.membarrier.private_expedited;
    println!(
        "{}membarrier     {}",
        mark(barrier),
        if barrier {
            "works"
        } else {
            "missing: each access to guest memory costs a fence more"
        }
    );
    let huge = &host.huge_pages;
    println!(
        "{}huge pages     transparent: {}, shared: {}; reserved 2 MiB: {} ({} free)",
        mark(huge.transparent != "never"),
        huge.transparent,
        huge.transparent_shared,
        huge.reserved_2m,
        huge.free_2m
    );
    println!(
        "{}memory guard   {}",
        mark(host.memory_guard),
        if host.memory_guard {
            "works"
        } else {
            "missing (Linux 6.13 has it); page protection is used instead"
        }
    );
    if let (Some(bytes), Some(limit)) = (host.available_bytes, &host.available_limit) {
        println!("   memory         {} by {limit}", sizes::human(bytes));
    }
}
