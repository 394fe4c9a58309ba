// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A processor's registers at the moment a 64-bit boot protocol hands over.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use crate::{BOOT_CS, BOOT_DS, BOOT_TSS, BootState};

/// Interrupts off; the bit that is always set.
const RFLAGS: u64 = 2;
/// The values `FNINIT` and a reset leave.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

pub(super) fn registers(boot: &BootState) -> kvm_regs {
    kvm_regs {
        rip: boot.rip,
        rsi: boot.rsi,
        rsp: boot.rsp,
        rbp: boot.rsp,
        rflags: RFLAGS,
        ..Default::default()
    }
}

pub(super) fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    }
}

/// Masks the input of the 8259's at the local APIC. KVM leaves the boot processor's open, as old firmware did, and Linux
/// takes an open one for a reason to keep it so.
pub(super) fn local_apic(mut power_on: kvm_lapic_state) -> kvm_lapic_state {
    const LVT_LINT0: usize = 0x350;
    const MASKED: u32 = 1 << 16;
    let register = power_on.regs.iter_mut().skip(LVT_LINT0);
    for (to, from) in register.zip(MASKED.to_le_bytes()) {
        *to = from as std::os::raw::c_char;
    }
    power_on
}

/// Puts the boot state over what the processor has after power-on: the local APIC's base address stays.
pub(super) fn special_registers(boot: &BootState, power_on: kvm_sregs) -> kvm_sregs {
    let code = flat(BOOT_CS, CODE, true);
    let data = flat(BOOT_DS, DATA, false);
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_state(),
        gdt: kvm_dtable {
            base: boot.gdt_gpa,
            limit: boot.gdt_limit,
            ..Default::default()
        },
        // No interrupt can be taken before the guest brings its own table.
        idt: kvm_dtable::default(),
        cr0: boot.cr0,
        cr3: boot.cr3,
        cr4: boot.cr4,
        efer: boot.efer,
        ..power_on
    }
}

/// Executable, readable, accessed.
const CODE: u8 = 0xb;
/// Writable, accessed.
const DATA: u8 = 0x3;
/// Busy 64-bit task state segment.
const TASK_STATE: u8 = 0xb;

fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn task_state() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: BOOT_TSS,
        type_: TASK_STATE,
        present: 1,
        ..Default::default()
    }
}
