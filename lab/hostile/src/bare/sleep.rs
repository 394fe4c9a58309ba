// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A processor that has nothing to do halts until its local APIC's timer wakes it.

use core::arch::{asm, global_asm};

use super::Processor;
use crate::{Board, Width};

/// Registers of the local APIC (Intel SDM, 11.4.1).
const TASK_PRIORITY: u64 = 0xfee0_0080;
const SPURIOUS: u64 = 0xfee0_00f0;
const TIMER: u64 = 0xfee0_0320;
const LINE_0: u64 = 0xfee0_0350;
const TIMER_COUNT: u64 = 0xfee0_0380;
const TIMER_DIVIDE: u64 = 0xfee0_03e0;
/// The local APIC is on; its spurious vector.
const ENABLED: u64 = 0x1ff;
const BY_ONE: u64 = 0xb;
const MASKED: u64 = 1 << 16;
/// It begins again by itself: what loses an interrupt costs a period, and no more.
const PERIODIC: u64 = 1 << 17;
const VECTOR: u64 = 0x50;
/// Bytes of a gate; those up to [`VECTOR`]'s are there.
const GATE_BYTES: u64 = 16;
/// Present, interrupt gate (Intel SDM, 6.14.1).
const INTERRUPT_GATE: u64 = 0x8e;

global_asm!(
    ".balign 16",
    "bare_sleep:",
    "sti",
    "bare_halt:",
    "hlt",
    "cli",
    "ret",
    "bare_woken:",
    "push rax",
    // Amid `sti` and `hlt`, where no interrupt comes; but an emulated processor that was left there forgets that. Then
    // there is nothing any more to wait for.
    "lea rax, [rip + bare_halt]",
    "cmp qword ptr [rsp + 8], rax",
    "jne 2f",
    "inc qword ptr [rsp + 8]",
    "2:",
    // The end of the interrupt.
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
);

/// What a processor needs to wake up.
#[derive(Debug)]
pub struct Sleeper(());

impl Sleeper {
    /// Of the processor that calls this, with a table of its own in the page at `table`.
    pub fn new(board: &mut Processor, table: u64) -> Sleeper {
        let (handler, code): (u64, u64);
        // SAFETY: reads a register and an address in the first 2 GiB.
        unsafe {
            asm!("mov {0:e}, offset bare_woken", "mov {1:e}, cs", out(reg) handler, out(reg) code,
                options(nomem, nostack));
        }
        let gate = table + VECTOR * GATE_BYTES;
        let low = handler & 0xffff | (code & 0xffff) << 16 | INTERRUPT_GATE << 40;
        board.write(gate, Width::Qword, low | (handler >> 16 & 0xffff) << 48);
        board.write(gate + 8, Width::Qword, handler >> 32);
        // The table's last byte and where it is, as `lidt` wants them: 2 bytes and 8.
        let pointer = [(gate + GATE_BYTES - table - 1) << 48, table];
        // SAFETY: the table has the gate of the only interrupt there is.
        unsafe { asm!("lidt [{}]", in(reg) (&raw const pointer as u64) + 6) };
        for (register, value) in [
            (SPURIOUS, ENABLED),
            (TASK_PRIORITY, 0),
            // Where firmware may have left a timer of the board connected.
            (LINE_0, MASKED),
            (TIMER_DIVIDE, BY_ONE),
            (TIMER, PERIODIC | VECTOR),
        ] {
            board.write(register, Width::Dword, value);
        }
        Sleeper(())
    }

    /// Halts for as many ticks of the local APIC's bus: nanoseconds under KVM and QEMU. From 200,000 on, below which KVM
    /// has no periods.
    pub fn sleep(&self, board: &mut Processor, ticks: u32) {
        board.write(TIMER_COUNT, Width::Dword, ticks.into());
        // SAFETY: the timer's interrupt comes, which changes nothing.
        unsafe { asm!("call bare_sleep") };
        board.write(TIMER_COUNT, Width::Dword, 0);
    }
}
