// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory a vCPU shares with the kernel: why it came back, the data of the exit, and the flag that stops it.
//!
//! One mapping serves the vCPU (everything) and its kickers (one byte). Nothing here is ever a Rust reference except the
//! exit's data, which the kernel leaves alone between two KVM_RUN of the only thread that may call it.

use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU8;

use kvm_bindings::kvm_run;

use crate::Error;

/// A mapping of `kvm_run` and the pages behind it.
#[derive(Debug)]
pub(super) struct RunArea {
    base: NonNull<u8>,
    size_bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread. Of what is reached through a shared reference only the
// exit flag is written, atomically; the rest is read by the one thread that owns the vCPU, see `RunArea::run`.
unsafe impl Send for RunArea {}
// SAFETY: as above.
unsafe impl Sync for RunArea {}

impl RunArea {
    /// Maps `size_bytes` (KVM_GET_VCPU_MMAP_SIZE) of the vCPU `fd`.
    pub(super) fn map(fd: &impl AsRawFd, size_bytes: usize, vcpu: u8) -> Result<Self, Error> {
        let refused = |source: std::io::Error| {
            Error::refused("mmap of the run area", format!("vcpu {vcpu}"), source)
        };
        if size_bytes < size_of::<kvm_run>() {
            return Err(refused(std::io::ErrorKind::InvalidData.into()));
        }
        // SAFETY: a new shared mapping at an address the kernel chooses; the fd is open.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error()));
        }
        let base =
            NonNull::new(base.cast()).ok_or_else(|| refused(std::io::ErrorKind::Other.into()))?;
        Ok(Self { base, size_bytes })
    }

    /// The structure at its start. Dereferencing it is only sound for the thread that owns the vCPU, outside KVM_RUN.
    pub(super) fn run(&self) -> *mut kvm_run {
        self.base.as_ptr().cast()
    }

    /// `len` bytes at `offset`, or `None` if they do not all lie in the mapping.
    pub(super) fn bytes(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: the whole range was just checked to lie inside the mapping.
        (end <= self.size_bytes).then(|| unsafe { self.base.as_ptr().add(offset) })
    }

    /// The flag that makes KVM turn back instead of entering the guest.
    pub(super) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; Rust code only accesses it through this
        // function, hence only atomically.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run()).immediate_exit) }
    }
}

impl Drop for RunArea {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `map`, and every pointer into it borrows from `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size_bytes) };
    }
}
