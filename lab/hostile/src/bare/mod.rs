// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The processor of a machine without an operating system, for the programs of this crate that are guests.
//!
//! A program is an ELF file at 2 MiB that defines two functions, `first` and `other`, for its processors to begin in
//! (`start.rs`). It is entered in 64-bit mode by the Linux boot protocol or, as QEMU does it, in 32-bit mode by Xen's PVH
//! protocol. What is below 4 GiB is mapped to itself. The compiler is told to leave SSE alone: a KVM that emulates this
//! code instruction by instruction knows few instructions of it.

mod config;
mod copies;
mod sleep;
mod start;

use core::arch::asm;

use crate::{Board, Width};

pub use config::ConfigPorts;
pub use sleep::Sleeper;
pub use start::start_other;

const SERIAL: u16 = 0x3f8;
/// The line status register: a byte has come.
const SERIAL_STATUS: u16 = 0x3fd;
const DATA_READY: u32 = 1;

/// A processor that reaches guest-physical addresses below `reach`; accesses beyond are left out.
#[derive(Debug)]
pub struct Processor {
    /// Where the accesses end.
    pub reach: u64,
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
        // SAFETY: ends this life, as no gate takes the exception.
        unsafe { asm!("ud2", options(noreturn)) }
    }
}

/// The value behind `name` on the command line at `line`, 0 if it is not there.
pub fn option(board: &mut Processor, mut line: u64, name: &[u8]) -> u64 {
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

/// Writes to the first serial port: words, a number, the end of the line.
pub fn say(board: &mut Processor, words: &[u8], value: u64) {
    say_words(board, words);
    say_number(board, value);
    say_words(board, b"\n");
}

/// Words alone.
pub fn say_words(board: &mut Processor, words: &[u8]) {
    for byte in words {
        board.port_write(SERIAL, Width::Byte, (*byte).into());
    }
}

/// A number alone, in decimal.
pub fn say_number(board: &mut Processor, value: u64) {
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
}

/// A byte that has come on the first serial port.
pub fn heard(board: &mut Processor) -> Option<u8> {
    let status = board.port_read(SERIAL_STATUS, Width::Byte);
    (status & DATA_READY != 0).then(|| board.port_read(SERIAL, Width::Byte) as u8)
}

/// The time stamp counter, of which nothing is known but that it counts evenly.
pub fn now() -> u64 {
    let (high, low): (u32, u32);
    // SAFETY: reads a register.
    unsafe { asm!("rdtsc", out("edx") high, out("eax") low, options(nostack, nomem)) };
    u64::from(high) << 32 | u64::from(low)
}
