// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From lists of system calls to the filters of threads (seccomp(2)).

use std::io;

use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::calls::{self, Rules, VCPU_REFUSED, VCPU_TOLD};
use super::{Kind, Seccomp};

const TARGET: TargetArch = TargetArch::x86_64;

/// The filters of one kind of thread. Where several judge a call, the strictest counts.
pub(super) struct Filters(Vec<BpfProgram>);

impl Filters {
    pub(super) fn new(kind: Kind, mode: Seccomp) -> Result<Filters, BackendError> {
        let beyond = match mode {
            Seccomp::Off => return Ok(Filters(Vec::new())),
            Seccomp::Log => SeccompAction::Log,
            // The signal says which call of which thread it was; see `violation`.
            Seccomp::On => SeccompAction::Trap,
        };
        let mut programs = Vec::new();
        if kind == Kind::Vcpu && mode == Seccomp::On {
            let of = |calls: &[i64]| calls.iter().map(|call| (*call, Vec::new())).collect();
            let answer = SeccompAction::Errno(libc::EPERM as u32);
            programs.push(compile(of(VCPU_REFUSED), SeccompAction::Allow, answer)?);
            // Answered by `violation`.
            let told = of(&[VCPU_TOLD]);
            programs.push(compile(told, SeccompAction::Allow, SeccompAction::Trap)?);
        }
        let rules = calls::rules(kind, std::process::id())?;
        programs.push(compile(rules, beyond, SeccompAction::Allow)?);
        Ok(Filters(programs))
    }

    /// Puts the calling thread, and those it starts, under the filters, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        self.0.iter().try_for_each(install)
    }
}

/// Puts the calling thread, and those it starts, under a filter, for good.
pub(super) fn install(program: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(|error| match error {
        seccompiler::Error::Prctl(source) | seccompiler::Error::Seccomp(source) => source,
        other => io::Error::other(other.to_string()),
    })
}

pub(super) fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, otherwise, matching, TARGET)?.try_into()
}

/// Whether this kernel has filters: it looks at the (missing) program only where it knows the mode.
pub(super) fn available() -> bool {
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel is given no program to install, and says so.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, mode, 0, std::ptr::null::<u8>()) };
    answer < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}
