// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: [`Hostile`] on each processor of a machine without an operating system.
//!
//! An ELF file at 2 MiB, entered in 64-bit mode by the Linux boot protocol. `seed=N` and `cpus=N` on its command line say
//! what it does. There is no interrupt table: whatever it provokes resets the machine, and it begins again with the
//! numbers of its next life. On the first serial port it says how far it is.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use ebbtide_hostile::{Board, Hostile, Width, map};

global_asm!(
    ".globl _start",
    "_start:",
    "cli",
    "cld",
    // The compiler uses SSE.
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "mov rsp, 0x1000000",
    "mov rdi, rsi",
    "call {first}",
    // Another processor begins here, in real mode, in the page it was told of (0x30000).
    ".globl hostile_trampoline",
    "hostile_trampoline:",
    ".code16",
    "cli",
    "jmp 1f",
    ".balign 8",
    "hostile_gdt:",
    ".quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff",
    "hostile_gdtr:",
    ".word 23",
    ".long 0x30000 + hostile_gdt - hostile_trampoline",
    ".set hostile_gdtr_at, hostile_gdtr - hostile_trampoline",
    "1:",
    "mov ax, cs",
    "mov ds, ax",
    "lgdt [hostile_gdtr_at]",
    "mov eax, 0x620",
    "mov cr4, eax",
    "mov eax, 0x9000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, 0x80010033",
    "mov cr0, eax",
    // jmp 8:0x30000 + hostile_long - hostile_trampoline
    ".byte 0x66, 0xea",
    ".long 0x30000 + hostile_long - hostile_trampoline",
    ".word 8",
    ".code64",
    "hostile_long:",
    "mov ax, 16",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov rsp, 0xf00000",
    "mov rax, offset {other}",
    "call rax",
    ".globl hostile_trampoline_end",
    "hostile_trampoline_end:",
    first = sym first,
    other = sym other,
);

/// Where the other processor starts.
const TRAMPOLINE: u64 = 0x3_0000;
const PAGE_DIRECTORIES: u64 = 0xa000;
const LOCAL_APIC: u64 = 0xfee0_0000;
/// In the zero page of Linux's boot protocol.
const COMMAND_LINE_POINTER: u64 = 0x228;
const SERIAL: u16 = 0x3f8;
/// Acts between two words on the serial line.
const WORD: u64 = 200;
/// Where the lives' seed is, behind their count.
const SEED: u64 = map::LIVES + 16;
const LIVES_MAGIC: u64 = 0x6562_6274_6964_6531;

/// A processor that reaches guest-physical addresses below `reach`; accesses beyond are left out.
struct Processor {
    reach: u64,
}

impl Board for Processor {
    fn port_read(&mut self, port: u16, width: Width) -> u32 {
        let mut value = 0u32;
        // SAFETY: ports are the devices', of which there is nothing that this program relies on.
        unsafe {
            match width {
                Width::Byte => {
                    let byte: u8;
                    asm!("in al, dx", in("dx") port, out("al") byte, options(nostack));
                    value = byte.into();
                }
                Width::Word => {
                    let word: u16;
                    asm!("in ax, dx", in("dx") port, out("ax") word, options(nostack));
                    value = word.into();
                }
                Width::Dword => {
                    asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack))
                }
                Width::Qword => {}
            }
        }
        value
    }

    fn port_write(&mut self, port: u16, width: Width, value: u32) {
        // SAFETY: as above.
        unsafe {
            match width {
                Width::Byte => {
                    asm!("out dx, al", in("dx") port, in("al") value as u8, options(nostack));
                }
                Width::Word => {
                    asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nostack));
                }
                Width::Dword => {
                    asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack))
                }
                Width::Qword => {}
            }
        }
    }

    fn read(&mut self, at: u64, width: Width) -> u64 {
        if at.saturating_add(8) > self.reach {
            return u64::MAX;
        }
        let value: u64;
        // SAFETY: the page tables map all below `reach`; it may be anything, so it is read by the instruction only.
        unsafe {
            match width {
                Width::Byte => asm!("movzx eax, byte ptr [rdi]", in("rdi") at, out("rax") value),
                Width::Word => asm!("movzx eax, word ptr [rdi]", in("rdi") at, out("rax") value),
                Width::Dword => asm!("mov eax, [rdi]", in("rdi") at, out("rax") value),
                Width::Qword => asm!("mov rax, [rdi]", in("rdi") at, out("rax") value),
            }
        }
        value
    }

    fn write(&mut self, at: u64, width: Width, value: u64) {
        if at.saturating_add(8) > self.reach {
            return;
        }
        // SAFETY: as above; this program writes to registers, to the arena and to its own cells there.
        unsafe {
            match width {
                Width::Byte => asm!("mov [rdi], al", in("rdi") at, in("rax") value),
                Width::Word => asm!("mov [rdi], ax", in("rdi") at, in("rax") value),
                Width::Dword => asm!("mov [rdi], eax", in("rdi") at, in("rax") value),
                Width::Qword => asm!("mov [rdi], rax", in("rdi") at, in("rax") value),
            }
        }
    }

    fn fault(&mut self) {
        // SAFETY: ends this life, as there is no interrupt table.
        unsafe { asm!("ud2", options(noreturn)) }
    }
}

extern "C" fn first(zero_page: u64) -> ! {
    let mut board = Processor { reach: 4 << 30 };
    let line = board.read(zero_page + COMMAND_LINE_POINTER, Width::Dword);
    let (seed, cpus) = (
        option(&mut board, line, b"seed="),
        option(&mut board, line, b"cpus="),
    );
    let life = next_life(&mut board);
    let life_seed = seed.wrapping_add(life.wrapping_mul(0x1_0000_0001));
    board.write(SEED, Width::Qword, !life_seed);
    board.reach = reach_further(&mut board);
    board.write(SEED + 8, Width::Qword, board.reach);
    say(&mut board, b"hostile: life ", life);
    if cpus > 1 {
        start_other(&mut board);
    }
    let mut hostile = Hostile::new(life_seed);
    loop {
        hostile.act(&mut board);
        if hostile.acts().is_multiple_of(WORD) {
            say(&mut board, b"hostile: acts ", hostile.acts());
        }
    }
}

extern "C" fn other() -> ! {
    let mut board = Processor { reach: 4 << 30 };
    let seed = board.read(SEED, Width::Qword);
    board.reach = board.read(SEED + 8, Width::Qword);
    let mut hostile = Hostile::new(seed);
    loop {
        hostile.act(&mut board);
    }
}

/// The value behind `name` on the command line, 0 if it is not there.
fn option(board: &mut Processor, mut line: u64, name: &[u8]) -> u64 {
    loop {
        let mut at = line;
        for expected in name {
            if board.read(at, Width::Byte) != u64::from(*expected) {
                break;
            }
            at += 1;
        }
        if at == line + name.len() as u64 {
            return number(board, at);
        }
        if board.read(line, Width::Byte) == 0 {
            return 0;
        }
        line += 1;
    }
}

fn number(board: &mut Processor, mut at: u64) -> u64 {
    let mut value = 0u64;
    loop {
        let digit = board.read(at, Width::Byte).wrapping_sub(u64::from(b'0'));
        if digit > 9 {
            return value;
        }
        value = value.wrapping_mul(10).wrapping_add(digit);
        at += 1;
    }
}

/// Which life this is, from 0.
fn next_life(board: &mut Processor) -> u64 {
    let known = board.read(map::LIVES, Width::Qword) == LIVES_MAGIC;
    let life = if known {
        board.read(map::LIVES + 8, Width::Qword).wrapping_add(1)
    } else {
        0
    };
    board.write(map::LIVES, Width::Qword, LIVES_MAGIC);
    board.write(map::LIVES + 8, Width::Qword, life);
    life
}

/// Maps 512 GiB instead of 4, if the processor has pages of 1 GiB.
fn reach_further(board: &mut Processor) -> u64 {
    if core::arch::x86_64::__cpuid(0x8000_0001).edx & 1 << 26 == 0 {
        return 4 << 30;
    }
    for gib in 4..512u64 {
        // Present, writable, a page of this size.
        board.write(PAGE_DIRECTORIES + gib * 8, Width::Qword, gib << 30 | 0x83);
    }
    map::END
}

/// INIT, then the page to start at, twice (Intel SDM, 11.4.4).
fn start_other(board: &mut Processor) {
    unsafe extern "C" {
        #[link_name = "hostile_trampoline"]
        static BEGIN: u8;
        #[link_name = "hostile_trampoline_end"]
        static END: u8;
    }
    let (begin, end) = (&raw const BEGIN as u64, &raw const END as u64);
    for offset in 0..end - begin {
        let byte = board.read(begin + offset, Width::Byte);
        board.write(TRAMPOLINE + offset, Width::Byte, byte);
    }
    for command in [0x4500, 0x4600 | TRAMPOLINE >> 12, 0x4600 | TRAMPOLINE >> 12] {
        board.write(LOCAL_APIC + 0x310, Width::Dword, 1 << 24);
        board.write(LOCAL_APIC + 0x300, Width::Dword, command);
        for _ in 0..100 {
            board.port_read(0x80, Width::Byte);
        }
    }
}

fn say(board: &mut Processor, words: &[u8], value: u64) {
    for byte in words {
        board.port_write(SERIAL, Width::Byte, (*byte).into());
    }
    let mut started = false;
    let mut unit = 10_000_000_000_000_000_000u64;
    while unit > 0 {
        let digit = value / unit % 10;
        started |= digit > 0 || unit == 1;
        if started {
            board.port_write(SERIAL, Width::Byte, u32::from(b'0') + digit as u32);
        }
        unit /= 10;
    }
    board.port_write(SERIAL, Width::Byte, b'\n'.into());
}

#[panic_handler]
fn panicked(_: &PanicInfo<'_>) -> ! {
    let mut board = Processor { reach: 4 << 30 };
    say(&mut board, b"hostile: panicked in act ", 0);
    loop {
        board.port_write(0xcf9, Width::Byte, 6);
    }
}

/// What the compiler calls for copies.
mod copies {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
        // SAFETY: the caller says that both are valid for as many bytes.
        unsafe {
            asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _);
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
        // SAFETY: the caller says that it is valid for as many bytes.
        unsafe {
            asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8);
        }
        to
    }
}
