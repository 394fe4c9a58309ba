// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest writes that become an eventfd signal without leaving the kernel.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ebbtide_memory::{FlatIoeventfd, FlatSection, Listener, ListenerError};
use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::vm::Machine;

// kvm-ioctls derives the width from the data to match, and so cannot say "2 bytes, any value".
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// One of the two address spaces KVM watches.
pub(super) struct Bus {
    machine: Arc<Machine>,
    /// `KVM_IOEVENTFD_FLAG_PIO`, or nothing for memory.
    space: u32,
}

impl Bus {
    pub(super) fn memory(machine: Arc<Machine>) -> Self {
        Self { machine, space: 0 }
    }

    pub(super) fn ports(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            space: 1 << kvm_ioeventfd_flag_nr_pio,
        }
    }

    pub(super) fn add(&self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.change(ioeventfd, 0).map_err(|error| ListenerError {
            what: self.name(ioeventfd),
            reason: error.to_string(),
        })?;
        self.machine.ioeventfds.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn remove(&self, ioeventfd: &FlatIoeventfd) {
        // The only way to fail is that it was never added, and then there is nothing to take back.
        match self.change(ioeventfd, 1 << kvm_ioeventfd_flag_nr_deassign) {
            Ok(()) => {
                self.machine.ioeventfds.fetch_sub(1, Ordering::Relaxed);
            }
            Err(error) => tracing::error!(%error, "{} could not be removed", self.name(ioeventfd)),
        }
    }

    fn change(&self, ioeventfd: &FlatIoeventfd, action: u32) -> io::Result<()> {
        let matched = match ioeventfd.datamatch {
            Some(_) => 1 << kvm_ioeventfd_flag_nr_datamatch,
            None => 0,
        };
        let request = kvm_ioeventfd {
            datamatch: ioeventfd.datamatch.unwrap_or(0),
            addr: ioeventfd.addr,
            len: ioeventfd.size.into(),
            fd: ioeventfd.fd.as_raw_fd(),
            flags: self.space | matched | action,
            ..Default::default()
        };
        // SAFETY: the fd is a machine's, and the kernel reads one kvm_ioeventfd, which the request number says too.
        let done = unsafe { ioctl_with_ref(&self.machine.fd, KVM_IOEVENTFD(), &request) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn name(&self, ioeventfd: &FlatIoeventfd) -> String {
        let space = if self.space == 0 { "address" } else { "port" };
        format!(
            "ioeventfd at {space} {:#x}, {} bytes",
            ioeventfd.addr, ioeventfd.size
        )
    }
}

/// Follows the port address space. Ports have no slots; only their ioeventfds concern KVM.
pub(super) struct PortListener {
    bus: Bus,
}

impl PortListener {
    pub(super) fn new(bus: Bus) -> Self {
        Self { bus }
    }
}

impl Listener for PortListener {
    fn region_add(&mut self, _section: &FlatSection) -> Result<(), ListenerError> {
        Ok(())
    }

    fn region_del(&mut self, _section: &FlatSection) {}

    fn ioeventfd_add(&mut self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.bus.add(ioeventfd)
    }

    fn ioeventfd_del(&mut self, ioeventfd: &FlatIoeventfd) {
        self.bus.remove(ioeventfd);
    }
}
