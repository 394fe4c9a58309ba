// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Linux's KVM on x86-64, with all interrupt controllers inside the kernel.

mod boot;
mod chips;
mod cpuid;
mod interrupts;
mod ioeventfds;
mod msrs;
mod rings;
mod run_area;
mod signal;
mod slots;
mod state;
mod vcpu;
mod vm;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::Cap;

use crate::{Error, Limits};
pub use vm::KvmVm;

/// Where Linux puts KVM.
pub const DEFAULT_PATH: &str = "/dev/kvm";

const API_VERSION: i32 = 12;

/// What every guest of this crate is built on.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens a KVM device node.
///
/// # Errors
/// It cannot be opened, is no KVM, or is one that lacks what a guest needs.
pub fn open(path: impl AsRef<Path>) -> Result<Kvm, Error> {
    let path = path.as_ref();
    let failed = |source: io::Error| Error::Open {
        path: path.to_owned(),
        source,
    };
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let system = kvm_ioctls::Kvm::new_with_path(&name).map_err(|errno| failed(errno.into()))?;
    let version = system.get_api_version();
    if version != API_VERSION {
        return Err(Error::ApiVersion {
            path: path.to_owned(),
            version,
        });
    }
    for (capability, name) in NEEDED {
        if !system.check_extension(capability) {
            return Err(Error::Lacks { capability: name });
        }
    }
    Ok(Kvm {
        system: Arc::new(system),
        path: path.to_owned(),
    })
}

/// How a machine is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmOptions {
    /// Have KVM note what the guest writes in a ring of so many entries for each vCPU, instead of a bitmap for each slot:
    /// a sync then costs what was written and not what there is. A power of two, from 1024 to (usually) 65536. A KVM
    /// without rings keeps bitmaps and a warning says so; [`KvmVm::dirty_ring_entries`] tells.
    pub dirty_ring_entries: Option<u32>,
}

/// An open KVM device node.
#[derive(Debug)]
pub struct Kvm {
    system: Arc<kvm_ioctls::Kvm>,
    path: PathBuf,
}

impl Kvm {
    /// Makes a machine without processors and memory.
    ///
    /// # Errors
    /// The host is out of resources or its KVM refuses a guest.
    pub fn create_vm(&self) -> Result<Arc<KvmVm>, Error> {
        self.create_vm_with(&VmOptions::default())
    }

    /// As [`create_vm`](Self::create_vm), otherwise than usual.
    ///
    /// # Errors
    /// As there; and what an option asks for is refused.
    pub fn create_vm_with(&self, options: &VmOptions) -> Result<Arc<KvmVm>, Error> {
        KvmVm::new(&self.system, options)
    }

    /// What a machine of this KVM can have.
    ///
    /// # Errors
    /// KVM does not tell which processor it offers.
    pub fn limits(&self) -> Result<Limits, Error> {
        vm::limits(&self.system, cpuid::supported(&self.system)?.phys_bits())
    }

    /// The device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
