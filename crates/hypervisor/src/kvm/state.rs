// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything a guest can see of one processor.

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{Cap, VcpuFd};
use vmm_sys_util::fam::FamStruct;

use super::msrs;
use super::vm::Machine;
use crate::Error;

pub(super) struct State {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: Fpu,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// The floating point and vector registers: an area of 4 KiB, or longer where this host gives its guests more.
enum Fpu {
    Short(Box<kvm_xsave>),
    Long(Xsave),
}

/// Gathers the state of `fd`. `ran` says whether it ever ran, which decides about its time stamp counter.
pub(super) fn save(
    machine: &Machine,
    fd: &VcpuFd,
    vcpu: u8,
    msr_list: &[u32],
    ran: bool,
) -> Result<State, Error> {
    let failed = |operation| {
        move |errno: kvm_ioctls::Error| Error::refused(operation, format!("vcpu {vcpu}"), errno)
    };
    // Asking for this one first makes KVM settle start-up interrupts that have arrived.
    let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let mut values = msrs::read(fd, msr_list, vcpu)?;
    let tsc = if ran {
        msrs::read(fd, &[msrs::TSC], vcpu)?
    } else {
        // KVM takes 0 to mean: as the other processors.
        vec![kvm_msr_entry {
            index: msrs::TSC,
            data: 0,
            ..Default::default()
        }]
    };
    values.splice(0..0, tsc);
    Ok(State {
        mp_state,
        regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
        fpu: Fpu::save(machine, fd, vcpu)?,
        xcrs: fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
        debug_regs: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
        msrs: values,
        events: fd
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?,
    })
}

/// Puts a state back. The order matters: the APIC's base address (in the special registers) before the APIC, the APIC
/// before the registers of its timer, and pending events last, since setting registers clears them.
pub(super) fn restore(fd: &VcpuFd, vcpu: u8, state: &State) -> Result<(), Error> {
    let State {
        mp_state,
        regs,
        sregs,
        fpu,
        xcrs,
        debug_regs,
        lapic,
        msrs: values,
        events,
    } = state;
    let failed = |operation| {
        move |errno: kvm_ioctls::Error| Error::refused(operation, format!("vcpu {vcpu}"), errno)
    };
    fd.set_mp_state(*mp_state)
        .map_err(failed("KVM_SET_MP_STATE"))?;
    fd.set_regs(regs).map_err(failed("KVM_SET_REGS"))?;
    fd.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))?;
    fpu.restore(fd, vcpu)?;
    // A host without XSAVE has none and refuses to set none.
    if xcrs.nr_xcrs != 0 {
        fd.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
    }
    fd.set_debug_regs(debug_regs)
        .map_err(failed("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))?;
    msrs::write(fd, values, vcpu)?;
    fd.set_vcpu_events(events)
        .map_err(failed("KVM_SET_VCPU_EVENTS"))
}

impl Fpu {
    fn save(machine: &Machine, fd: &VcpuFd, vcpu: u8) -> Result<Self, Error> {
        let failed = |operation, source: std::io::Error| {
            Error::refused(operation, format!("vcpu {vcpu}"), source)
        };
        let size_bytes = machine.fd.check_extension_int(Cap::Xsave2);
        let extra = usize::try_from(size_bytes)
            .unwrap_or(0)
            .saturating_sub(size_of::<kvm_xsave>())
            .div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
        if extra == 0 {
            let area = fd
                .get_xsave()
                .map_err(|errno| failed("KVM_GET_XSAVE", errno.into()))?;
            return Ok(Self::Short(Box::new(area)));
        }
        let mut area = Xsave::new(extra).map_err(|error| {
            failed(
                "building an xsave area",
                std::io::Error::other(format!("{error:?}")),
            )
        })?;
        // SAFETY: the area is at least as long as KVM_CAP_XSAVE2 says KVM writes; nothing in this process asks the kernel
        // for further dynamic features.
        unsafe { fd.get_xsave2(&mut area) }
            .map_err(|errno| failed("KVM_GET_XSAVE2", errno.into()))?;
        Ok(Self::Long(area))
    }

    fn restore(&self, fd: &VcpuFd, vcpu: u8) -> Result<(), Error> {
        match self {
            // SAFETY: KVM_CAP_XSAVE2 said that KVM reads no more than this structure holds when the area was saved, and
            // nothing in this process asks the kernel for further dynamic features.
            Self::Short(area) => unsafe { fd.set_xsave(area) },
            // SAFETY: as above, with the length that was needed.
            Self::Long(area) => unsafe { fd.set_xsave2(area) },
        }
        .map_err(|errno| Error::refused("KVM_SET_XSAVE", format!("vcpu {vcpu}"), errno))
    }
}
