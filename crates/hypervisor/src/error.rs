// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong between the monitor and the hypervisor.

use std::io;
use std::path::PathBuf;

/// Why the hypervisor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The hypervisor's device node could not be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device node.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The device node opened but does not speak the KVM API this crate is written for.
    #[error("{path} speaks KVM API version {version}, version 12 is needed")]
    ApiVersion {
        /// The device node.
        path: PathBuf,
        /// What it answered.
        version: i32,
    },
    /// The host's KVM lacks something a guest needs.
    #[error("this KVM lacks {capability}")]
    Lacks {
        /// The capability's name in the kernel's API.
        capability: &'static str,
    },
    /// A request to KVM was refused.
    #[error("{operation} for {object}: {source}")]
    Refused {
        /// The request's name in the kernel's API.
        operation: &'static str,
        /// What it was for: "the machine", "vcpu 2".
        object: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A vCPU's model specific register did not take the value it should have.
    #[error("vcpu {vcpu}: msr {index:#x} refuses the value {value:#x}")]
    Msr {
        /// The vCPU.
        vcpu: u8,
        /// The register.
        index: u32,
        /// The value refused.
        value: u64,
    },
    /// The state was asked for while the guest waits for the answer to an exit.
    #[error("vcpu {vcpu}: its guest is in the middle of an instruction")]
    AnswerDue {
        /// The vCPU.
        vcpu: u8,
    },
    /// A state was handed to a vCPU or machine of another kind than the one that saved it.
    #[error("the saved state of {object} is of another kind of hypervisor")]
    ForeignState {
        /// Whose state it is.
        object: String,
    },
    /// There is no such interrupt input.
    #[error("no interrupt input {gsi}: they are numbered 0 to {last}")]
    NoSuchLine {
        /// The input asked for.
        gsi: u32,
        /// The highest there is.
        last: u32,
    },
    /// Somebody drives this interrupt input already.
    #[error("interrupt input {gsi} is taken")]
    LineTaken {
        /// The input asked for.
        gsi: u32,
    },
    /// The hardware refused to enter the guest.
    #[error("vcpu {vcpu}: the processor refuses to enter the guest, hardware reason {reason:#x}")]
    EntryFailed {
        /// The vCPU.
        vcpu: u8,
        /// The processor's reason (VMX exit reason, SVM exit code).
        reason: u64,
    },
    /// The vCPU left the guest for a reason nobody asked for.
    #[error("vcpu {vcpu}: unexpected exit reason {reason}")]
    UnexpectedExit {
        /// The vCPU.
        vcpu: u8,
        /// `kvm_run.exit_reason`.
        reason: u32,
    },
}

impl Error {
    pub(crate) fn refused(
        operation: &'static str,
        object: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Refused {
            operation,
            object: object.into(),
            source: source.into(),
        }
    }
}
