// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Says whether this machine's KVM can carry a kernel: `probe [PATH]`. Exit code 0 if it can.

use std::process::ExitCode;
use std::time::Duration;

use ebbtide_hypervisor::{kvm, probe};

fn main() -> ExitCode {
    let path = std::env::args()
        .nth(1)
        .unwrap_or_else(|| kvm::DEFAULT_PATH.to_owned());
    let report = probe::run(path, Duration::from_secs(2));
    println!("{report:#?}");
    if report.can_run_guest {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
