// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide doctor`: what this machine offers.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ebbtide_hypervisor::probe::{self, ProbeReport};
use ebbtide_machine::host::Facts;
use ebbtide_qmp::sizes;
use serde::Serialize;

/// How long the test guest may take; where it works it takes a fraction of a second.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

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
        kvm: probe(&args.kvm),
        host: Facts::gather(),
    };
    let text = if args.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => text + "\n",
            Err(e) => {
                eprintln!("ebbtide doctor: {e}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        table(&report)
    };
    if let Err(e) = io::stdout().write_all(text.as_bytes()) {
        // The reader has gone, as `| head` does; nobody is left to tell.
        if e.kind() != io::ErrorKind::BrokenPipe {
            eprintln!("ebbtide doctor: cannot write the result: {e}");
            return ExitCode::FAILURE;
        }
    }
    if report.kvm.can_run_guest && report.host.io_uring.available {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A KVM that emulates takes all the time there is: a terminal is told what is going on.
fn probe(kvm: &Path) -> ProbeReport {
    let terminal = io::stderr().is_terminal();
    if terminal {
        let seconds = PROBE_LIMIT.as_secs();
        eprint!("running a test guest, for {seconds} s at most ...");
    }
    let report = probe::run(kvm, PROBE_LIMIT);
    if terminal {
        eprint!("\r\x1b[2K");
    }
    report
}

/// The report for people.
fn table(report: &Report) -> String {
    let Report { kvm, host, .. } = report;
    let barrier = host.membarrier.private_expedited;
    let huge = &host.huge_pages;
    let rows = [
        ("KVM", kvm.can_run_guest, kvm.reason.clone()),
        (
            "io_uring",
            host.io_uring.available,
            host.io_uring.reason.clone().unwrap_or("works".into()),
        ),
        (
            "membarrier",
            barrier,
            if barrier {
                "works".into()
            } else {
                "missing: each access to guest memory costs a fence more".into()
            },
        ),
        (
            "huge pages",
            huge.transparent != "never",
            format!(
                "transparent: {}, shared: {}; reserved 2 MiB: {} ({} free)",
                huge.transparent, huge.transparent_shared, huge.reserved_2m, huge.free_2m
            ),
        ),
        (
            "memory guard",
            host.memory_guard,
            if host.memory_guard {
                "works".into()
            } else {
                "missing (Linux 6.13 has it); page protection is used instead".into()
            },
        ),
        (
            "seccomp",
            host.seccomp,
            if host.seccomp {
                "works".into()
            } else {
                "missing: `run` needs --seccomp off".into()
            },
        ),
        (
            "landlock",
            host.landlock.is_some(),
            match host.landlock {
                Some(version) => format!("version {version}"),
                None => "missing: `run` can't limit which files are opened".into(),
            },
        ),
    ];
    let mut text: String = rows
        .iter()
        .map(|(name, good, said)| {
            format!("{} {name:<14} {said}\n", if *good { "ok" } else { "--" })
        })
        .collect();
    if let (Some(bytes), Some(limit)) = (host.available_bytes, &host.available_limit) {
        text.push_str(&format!(
            "   {:<14} {} by {limit}\n",
            "memory",
            sizes::human(bytes)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fact_has_a_line_and_a_mark() {
        let report = Report {
            version: "1",
            kvm: probe(Path::new("/nonexistent/kvm")),
            host: Facts::gather(),
        };
        let text = table(&report);
        let first = text.lines().next().unwrap();
        assert_eq!(first, "-- KVM            there is no /nonexistent/kvm");
        for name in [
            "io_uring",
            "membarrier",
            "huge pages",
            "memory guard",
            "seccomp",
            "landlock",
        ] {
            let line = text
                .lines()
                .find(|l| l.get(3..).is_some_and(|l| l.starts_with(name)));
            let mark = &line.unwrap()[..2];
            assert!(mark == "ok" || mark == "--", "{text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["kvm"]["can_run_guest"], false);
        assert!(json["io_uring"]["available"].is_boolean());
    }
}
