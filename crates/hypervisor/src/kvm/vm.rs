// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine of KVM.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use ebbtide_bus::irq::{IrqLine, MsiController};
use ebbtide_memory::{FlatIoeventfd, Listener, ListenerError};
use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;

use super::VmOptions;
use super::cpuid::{self, Supported};
use super::interrupts::{Interrupts, Routes};
use super::ioeventfds::{Bus, PortListener};
use super::rings::DirtyRings;
use super::slots::{SlotListener, SlotNumbers};
use super::vcpu::KvmVcpu;
use super::{chips, msrs};
use crate::{ChipState, Error, Holdings, Limits, Vcpu, Vm};

/// Three pages an Intel KVM needs for real mode; below the top of 32-bit space, where no machine has RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// xAPIC ids are bytes, and 255 is the broadcast.
const MAX_VCPUS: u8 = 254;

/// A machine of KVM: the fd, its interrupt controllers (PIC, I/O APIC, local APICs, all in the kernel, no PIT), its
/// slots.
pub struct KvmVm {
    machine: Arc<Machine>,
    interrupts: Arc<Interrupts>,
    slots: Arc<SlotNumbers>,
}

/// What the parts of a machine share.
pub(super) struct Machine {
    pub(super) fd: VmFd,
    pub(super) system: Arc<kvm_ioctls::Kvm>,
    pub(super) cpuid: Supported,
    /// What a vCPU's state has besides its architectural registers.
    pub(super) msrs: Vec<u32>,
    pub(super) tsc_khz: OnceLock<u32>,
    /// What the guest writes is noted in rings; without them, in bitmaps.
    pub(super) rings: Option<Arc<DirtyRings>>,
    limits: Limits,
    /// Ioeventfds that KVM has.
    pub(super) ioeventfds: AtomicUsize,
}

impl Machine {
    /// An error of a request that concerned the machine as a whole.
    pub(super) fn refused(operation: &'static str, source: impl Into<io::Error>) -> Error {
        Error::refused(operation, "the machine", source)
    }
}

impl KvmVm {
    pub(super) fn new(
        system: &Arc<kvm_ioctls::Kvm>,
        options: &VmOptions,
    ) -> Result<Arc<Self>, Error> {
        let cpuid = cpuid::supported(system)?;
        let limits = limits(system, cpuid.phys_bits())?;
        let fd = create(system)?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(|errno| Machine::refused("KVM_SET_IDENTITY_MAP_ADDR", errno))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(|errno| Machine::refused("KVM_SET_TSS_ADDR", errno))?;
        fd.create_irq_chip()
            .map_err(|errno| Machine::refused("KVM_CREATE_IRQCHIP", errno))?;
        keep_mappings_of_other_slots(&fd);
        let rings = dirty_rings(&fd, options)?;
        let msrs = msrs::to_save(system)?;
        let machine = Arc::new(Machine {
            fd,
            system: Arc::clone(system),
            cpuid,
            msrs,
            tsc_khz: OnceLock::new(),
            rings,
            limits,
            ioeventfds: AtomicUsize::new(0),
        });
        let routes = Routes::new(Arc::clone(&machine))?;
        Ok(Arc::new(Self {
            interrupts: Interrupts::new(Arc::clone(&machine), routes),
            slots: SlotNumbers::new(limits.slots),
            machine,
        }))
    }

    /// Backs guest memory by hand, for a guest that has no memory core. Takes a slot number for good.
    ///
    /// # Safety
    /// The host range must stay mapped as long as a vCPU of this machine may run.
    pub(crate) unsafe fn back(
        &self,
        gpa: u64,
        host: NonNull<u8>,
        size_bytes: u64,
    ) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: self.slots.take().ok_or(Error::Lacks {
                capability: "a free memory slot",
            })?,
            guest_phys_addr: gpa,
            memory_size: size_bytes,
            userspace_addr: host.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: as this function demands.
        unsafe { self.machine.fd.set_user_memory_region(region) }
            .map_err(|errno| Machine::refused("KVM_SET_USER_MEMORY_REGION", errno))
    }

    /// Watches an address of guest memory, for good.
    pub(crate) fn add_doorbell(&self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        Bus::memory(Arc::clone(&self.machine)).add(ioeventfd)
    }

    /// Entries of each vCPU's dirty ring; `None` when KVM keeps bitmaps.
    pub fn dirty_ring_entries(&self) -> Option<u32> {
        self.machine.rings.as_ref().map(|rings| rings.entries())
    }

    /// Memory slots in use.
    pub fn slots_in_use(&self) -> usize {
        self.slots.in_use()
    }

    /// Message-signalled interrupt routes in use.
    pub fn routes_in_use(&self) -> usize {
        self.interrupts.routes_in_use()
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, index: u8, cpus: u8) -> Result<Box<dyn Vcpu>, Error> {
        Ok(Box::new(KvmVcpu::new(&self.machine, index, cpus)?))
    }

    fn memory_listener(&self) -> Box<dyn Listener> {
        Box::new(SlotListener::new(
            Arc::clone(&self.machine),
            Arc::clone(&self.slots),
        ))
    }

    fn port_listener(&self) -> Box<dyn Listener> {
        Box::new(PortListener::new(Bus::ports(Arc::clone(&self.machine))))
    }

    fn msi(&self) -> Arc<dyn MsiController> {
        Arc::clone(&self.interrupts) as Arc<dyn MsiController>
    }

    fn irq_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, Error> {
        self.interrupts.line(gsi)
    }

    fn save_chips(&self) -> Result<ChipState, Error> {
        chips::save(&self.machine.fd)
    }

    fn restore_chips(&self, state: &ChipState) -> Result<(), Error> {
        chips::restore(&self.machine.fd, state)
    }

    fn clock_ns(&self) -> Result<u64, Error> {
        chips::clock_ns(&self.machine.fd)
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), Error> {
        chips::set_clock_ns(&self.machine.fd, clock_ns)
    }

    fn limits(&self) -> Limits {
        Limits {
            tsc_khz: self.machine.tsc_khz.get().copied(),
            ..self.machine.limits
        }
    }

    fn holdings(&self) -> Holdings {
        Holdings {
            slots: self.slots.in_use(),
            ioeventfds: self.machine.ioeventfds.load(Ordering::Relaxed),
            irqfds: self.interrupts.routes_in_use(),
            messages: self.interrupts.messages_in_kvm(),
        }
    }
}

/// Dirty rings, where they are wanted and KVM has them.
fn dirty_rings(fd: &VmFd, options: &VmOptions) -> Result<Option<Arc<DirtyRings>>, Error> {
    let Some(entries) = options.dirty_ring_entries else {
        return Ok(None);
    };
    let rings = DirtyRings::enable(fd, entries)?;
    if rings.is_none() {
        tracing::warn!("this kvm has no dirty rings (KVM_CAP_DIRTY_LOG_RING): bitmaps are used");
    }
    Ok(rings)
}

/// KVM_CREATE_VM; the kernel gives up when a signal arrives in the middle, so it is asked again.
fn create(system: &kvm_ioctls::Kvm) -> Result<VmFd, Error> {
    loop {
        match system.create_vm() {
            Ok(fd) => return Ok(fd),
            Err(errno) if errno.errno() == libc::EINTR => {}
            Err(errno) => return Err(Machine::refused("KVM_CREATE_VM", errno)),
        }
    }
}

/// Without this, deleting one slot makes KVM forget the mappings of all others, and the guest faults its whole memory in
/// again: 15 to 30 ms per GiB with huge pages, seconds without. Hosts before 6.12 know no other way.
fn keep_mappings_of_other_slots(fd: &VmFd) {
    let quirks = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    let zap_all = KVM_X86_QUIRK_SLOT_ZAP_ALL;
    if u32::try_from(quirks).is_ok_and(|mask| mask & zap_all != 0) {
        let mut capability = kvm_enable_cap {
            cap: KVM_CAP_DISABLE_QUIRKS2,
            ..Default::default()
        };
        if let Some(mask) = capability.args.first_mut() {
            *mask = zap_all.into();
        }
        if let Err(errno) = fd.enable_cap(&capability) {
            tracing::warn!(%errno, "kvm will drop all mappings whenever a slot goes");
        }
    }
}

/// What a machine of this KVM can have.
pub(super) fn limits(system: &kvm_ioctls::Kvm, phys_bits: u8) -> Result<Limits, Error> {
    let vcpus = u8::try_from(system.get_max_vcpus())
        .unwrap_or(MAX_VCPUS)
        .min(MAX_VCPUS);
    Ok(Limits {
        slots: system.get_nr_memslots(),
        phys_bits,
        vcpus,
        tsc_khz: None,
    })
}
