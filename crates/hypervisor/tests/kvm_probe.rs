// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The probe against what this machine has.

mod flat;

use std::time::{Duration, Instant};

use ebbtide_hypervisor::probe;

const LIMIT: Duration = Duration::from_secs(5);
/// What a host that is busy with others may take besides: what ends at all is told from what hangs.
const SLACK: Duration = Duration::from_secs(60);

#[test]
fn no_device_is_no_kvm() {
    let report = probe::run("/nonexistent/kvm", LIMIT);
    assert!(!report.present && !report.opens && !report.can_run_guest);
    assert!(
        report.reason.contains("/nonexistent/kvm"),
        "{}",
        report.reason
    );
}

#[test]
fn a_device_that_is_not_kvm_does_not_open() {
    let report = probe::run("/dev/null", LIMIT);
    assert!(report.present && !report.opens && !report.can_run_guest);
    assert!(report.reason.contains("/dev/null"), "{}", report.reason);
}

#[test]
fn the_verdict_comes_in_time_and_says_why() {
    if flat::kvm().is_none() {
        return;
    }
    let began = Instant::now();
    let report = probe::run("/dev/kvm", LIMIT);
    assert!(began.elapsed() < LIMIT + SLACK);
    assert!(report.present && report.opens, "{report:?}");
    assert!(!report.reason.is_empty());
    println!("{}", report.reason);
    match (report.guest_ns_per_loop, report.host_ns_per_loop) {
        (Some(guest), Some(host)) => {
            assert_eq!(report.can_run_guest, guest / host < 32.0, "{report:?}");
        }
        _ => assert!(!report.can_run_guest, "{report:?}"),
    }
}

#[test]
fn a_limit_too_short_is_not_a_hang() {
    if flat::kvm().is_none() {
        return;
    }
    let began = Instant::now();
    let report = probe::run("/dev/kvm", Duration::ZERO);
    assert!(began.elapsed() < SLACK);
    assert!(report.opens);
    assert!(
        report.can_run_guest || report.reason.contains("did not end in time"),
        "{report:?}"
    );
}
