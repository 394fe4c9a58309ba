// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the processors come to where Rust begins.

use core::arch::{asm, global_asm};

use super::Processor;
use crate::{Board, Width};

/// Where the other processor starts.
const TRAMPOLINE: u64 = 0x3_0000;
/// The local APIC's registers: its interrupt command, high half and low (Intel SDM, 11.6.1).
const COMMAND_HIGH: u64 = 0xfee0_0310;
const COMMAND_LOW: u64 = 0xfee0_0300;
/// What an interrupt command may be: INIT, and the page to start at.
const INIT: u64 = 0x4500;
const STARTUP: u64 = 0x4600;

global_asm!(
    // XEN_ELFNOTE_PHYS32_ENTRY, by which QEMU finds where to enter.
    ".pushsection .note.Xen, \"a\", @note",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long bare_pvh",
    ".popsection",
    ".globl _start",
    "_start:",
    "cli",
    "cld",
    // The zero page's cmd_line_ptr.
    "mov edi, dword ptr [rsi + 0x228]",
    "bare_first:",
    "mov rax, cr3",
    "mov dword ptr [bare_tables], eax",
    "mov rsp, 0x1000000",
    "call first",
    "ud2",
    // PVH: 32-bit mode without paging, EBX: hvm_start_info.
    ".code32",
    "bare_pvh:",
    "cli",
    "cld",
    // The table of all, then that of 512 GiB, then four of a GiB each, in pages of 2 MiB.
    "mov edi, 0x1a00000",
    "mov ecx, 0x1800",
    "xor eax, eax",
    "rep stosd",
    "mov dword ptr [0x1a00000], 0x1a01003",
    "mov eax, 0x1a02003",
    "mov edi, 0x1a01000",
    "2:",
    "mov dword ptr [edi], eax",
    "add edi, 8",
    "add eax, 0x1000",
    "cmp edi, 0x1a01020",
    "jne 2b",
    "mov eax, 0x83",
    "mov edi, 0x1a02000",
    "3:",
    "mov dword ptr [edi], eax",
    "add edi, 8",
    "add eax, 0x200000",
    "cmp edi, 0x1a06000",
    "jne 3b",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x1a00000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, 0x80010033",
    "mov cr0, eax",
    "lgdt [bare_pvh_gdtr]",
    // jmp 8:bare_pvh_long
    ".byte 0xea",
    ".long bare_pvh_long",
    ".word 8",
    ".balign 8",
    "bare_pvh_gdtr:",
    ".word 23",
    ".long bare_gdt",
    ".code64",
    "bare_pvh_long:",
    "mov ax, 16",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    // Its cmdline_paddr.
    "mov edi, dword ptr [rbx + 24]",
    "jmp bare_first",
    // Another processor begins here, in real mode, in the page it was told of (0x30000).
    "bare_trampoline:",
    ".code16",
    "cli",
    "jmp 4f",
    ".balign 8",
    "bare_gdt:",
    ".quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff",
    "bare_gdtr:",
    ".word 23",
    ".long 0x30000 + bare_gdt - bare_trampoline",
    // Where the first processor's page tables are.
    "bare_tables:",
    ".long 0",
    ".set bare_gdtr_at, bare_gdtr - bare_trampoline",
    ".set bare_tables_at, bare_tables - bare_trampoline",
    "4:",
    "mov ax, cs",
    "mov ds, ax",
    "lgdt [bare_gdtr_at]",
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov eax, dword ptr [bare_tables_at]",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, 0x80010033",
    "mov cr0, eax",
    // jmp 8:0x30000 + bare_long - bare_trampoline
    ".byte 0x66, 0xea",
    ".long 0x30000 + bare_long - bare_trampoline",
    ".word 8",
    ".code64",
    "bare_long:",
    "mov ax, 16",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov rsp, 0xf00000",
    "mov rax, offset other",
    "call rax",
    "ud2",
    "bare_trampoline_end:",
);

/// Starts another processor: INIT, then the page to start at, twice (Intel SDM, 11.4.4).
pub fn start_other(board: &mut Processor) {
    let (mut begin, end): (u64, u64);
    // SAFETY: addresses of the code above, which lies in the first 2 GiB.
    unsafe {
        asm!(
            "mov {0:e}, offset bare_trampoline",
            "mov {1:e}, offset bare_trampoline_end",
            out(reg) begin, out(reg) end, options(nomem, nostack)
        );
    }
    let mut to = TRAMPOLINE;
    while begin < end {
        let byte = board.read(begin, Width::Byte);
        board.write(to, Width::Byte, byte);
        (begin, to) = (begin + 1, to + 1);
    }
    let startup = STARTUP | TRAMPOLINE >> 12;
    for command in [INIT, startup, startup] {
        board.write(COMMAND_HIGH, Width::Dword, 1 << 24);
        board.write(COMMAND_LOW, Width::Dword, command);
        for _ in 0..100 {
            board.port_read(0x80, Width::Byte);
        }
    }
}
