// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest the probe runs: 2 MiB of memory with page tables, descriptors and a program that does, once each, what a
//! kernel does all the time.
//!
//! ```text
//!   0x0500 descriptors     0x5000 page directory of 3 GiB (local APIC)    0x8000 kernel stack, downwards
//!   0x1000 top table       0x6000 interrupt descriptors                   0xa000 stack of faults in user mode, downwards
//!   0x2000 pointer table   0x7000 task state                              0x10000 the program
//!   0x3000 page directory of 0 GiB, 0x4000 of 1 GiB (registers without memory)
//! ```
//!
//! The program tells how far it has come by writing a [`Mark`] to a port.

use std::io;
use std::ptr::{self, NonNull};

pub(super) const SIZE_BYTES: usize = 2 << 20;
pub(super) const TOP_TABLE: u64 = 0x1000;
pub(super) const DESCRIPTORS: u64 = 0x500;
pub(super) const STACK: u64 = 0x8000;
/// Where the program reports.
pub(super) const PORT: u16 = 0xe0;
/// A register that exits.
pub(super) const REGISTER: u64 = 0x4000_0000;
/// Where the program writes back what it read from [`REGISTER`], plus one.
pub(super) const ECHO: u64 = REGISTER + 8;
/// Where a write of 4 bytes signals an eventfd.
pub(super) const DOORBELL: u64 = REGISTER + 0x100;

const PROGRAM: u64 = 0x10000;
/// The program starts with a table of three entry points.
pub(super) const ENTRY: u64 = PROGRAM + 32;

/// How far the guest has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Mark {
    Entered = 1,
    LoopBegins = 2,
    LoopEnds = 3,
    Vectors = 4,
    Control = 5,
    Faults = 6,
    UserMode = 7,
    Interrupts = 8,
    Registers = 9,
    Doorbell = 10,
}

impl Mark {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Entered,
            2 => Self::LoopBegins,
            3 => Self::LoopEnds,
            4 => Self::Vectors,
            5 => Self::Control,
            6 => Self::Faults,
            7 => Self::UserMode,
            8 => Self::Interrupts,
            9 => Self::Registers,
            10 => Self::Doorbell,
            _ => return None,
        })
    }

    /// What the guest does after this mark, until the next one.
    pub(super) fn next_step(self) -> &'static str {
        match self {
            Self::Entered | Self::LoopEnds => "using vector registers",
            Self::LoopBegins => "counting in a loop",
            Self::Vectors => "changing page tables and model specific registers",
            Self::Control => "handling a page fault",
            Self::Faults => "running user code and its system calls",
            Self::UserMode => "waiting for its timer's interrupt",
            Self::Interrupts => "accessing a device's registers",
            Self::Registers => "ringing a doorbell",
            Self::Doorbell => "ending",
        }
    }
}

std::arch::global_asm!(
    r#"
    .pushsection .rodata
    .balign 16
ebbtide_probe_begin:
    .quad ebbtide_probe_fault - ebbtide_probe_begin
    .quad ebbtide_probe_timer - ebbtide_probe_begin
    .quad ebbtide_probe_syscall - ebbtide_probe_begin
    .quad 0
    # Here the guest starts; rsi is the loop's length.
    mov al, 1
    out {port}, al

    mov r15d, {loops}
2:  mov al, 2
    out {port}, al
    mov rcx, rsi
3:  dec rcx
    jnz 3b
    mov al, 3
    out {port}, al
    dec r15d
    jnz 2b

    mov rax, cr4
    or eax, 0x600               # OSFXSR, OSXMMEXCPT
    mov cr4, rax
    mov eax, 0x5a5a5a5a
    movq xmm0, rax
    movdqa xmm1, xmm0
    paddd xmm1, xmm0
    movq rdx, xmm1
    cmp edx, 0xb4b4b4b4
    jne ebbtide_probe_wrong
    mov al, 4
    out {port}, al

    mov rax, cr3
    mov cr3, rax
    invlpg [{stack}]
    mov rax, cr4
    xor eax, 0x80               # PGE, which flushes everything
    mov cr4, rax
    xor eax, 0x80
    mov cr4, rax
    mov ecx, 0xc0000100         # FS_BASE
    mov eax, 0x1234
    xor edx, edx
    wrmsr
    rdmsr
    cmp eax, 0x1234
    jne ebbtide_probe_wrong
    xor eax, eax
    cpuid
    mov al, 5
    out {port}, al

    lgdt [rip + ebbtide_probe_gdtr]
    lidt [rip + ebbtide_probe_idtr]
    mov ax, 0x38
    ltr ax
    xor r13d, r13d
    lea r14, [rip + 4f]
    mov eax, [{nowhere}]
    jmp ebbtide_probe_wrong
4:  cmp r13d, 1
    jne ebbtide_probe_wrong
    mov al, 6
    out {port}, al

    mov ecx, 0xc0000080         # EFER.SCE
    rdmsr
    or eax, 1
    wrmsr
    mov ecx, 0xc0000081         # STAR: kernel 0x10, user 0x20
    xor eax, eax
    mov edx, 0x00230010
    wrmsr
    mov ecx, 0xc0000082         # LSTAR
    lea rax, [rip + ebbtide_probe_syscall]
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000084         # SFMASK: interrupts off
    mov eax, 0x200
    wrmsr
    mov rax, rsp
    push 0x2b
    push rax
    push 2
    push 0x33
    lea rax, [rip + 5f]
    push rax
    iretq
5:  lea r14, [rip + 6f]         # user code
    mov eax, [{nowhere}]
    jmp ebbtide_probe_wrong
6:  mov edi, 1
    syscall
    mov edi, 2
    syscall
ebbtide_probe_syscall:
    swapgs
    swapgs
    cmp edi, 2
    je 7f
    sysretq
7:  cmp r13d, 2
    jne ebbtide_probe_wrong
    mov al, 7
    out {port}, al

    xor r12d, r12d
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff       # on
    mov dword ptr [rbx + 0x3e0], 0xb        # timer: divide by 1
    mov dword ptr [rbx + 0x320], 0x40       # once, vector 0x40
    mov dword ptr [rbx + 0x380], 200000
8:  sti
    hlt
    cli
    test r12d, r12d
    jz 8b
    mov al, 8
    out {port}, al

    mov ebx, {register}
    mov eax, [rbx]
    inc eax
    mov [rbx + 8], eax
    mov al, 9
    out {port}, al

    mov dword ptr [rbx + 0x100], 1
    mov al, 10
    out {port}, al
9:  hlt
    jmp 9b

ebbtide_probe_wrong:
    mov al, 0xff
    out {port}, al
    hlt

ebbtide_probe_fault:
    inc r13d
    add rsp, 8
    mov [rsp], r14
    iretq

ebbtide_probe_timer:
    inc r12d
    mov dword ptr [rbx + 0xb0], 0
    iretq

ebbtide_probe_gdtr:
    .word 0x47
    .quad {descriptors}
ebbtide_probe_idtr:
    .word 0xfff
    .quad {idt}
ebbtide_probe_end:
    .popsection
    "#,
    port = const PORT,
    loops = const LOOPS,
    stack = const STACK,
    nowhere = const NOWHERE,
    register = const REGISTER,
    descriptors = const DESCRIPTORS,
    idt = const INTERRUPTS,
);

unsafe extern "C" {
    #[link_name = "ebbtide_probe_begin"]
    static BEGIN: u8;
    #[link_name = "ebbtide_probe_end"]
    static END: u8;
}

/// How often the guest runs its loop.
pub(super) const LOOPS: usize = 3;
/// An address without a page.
const NOWHERE: u64 = 0x7000_0000;
const INTERRUPTS: u64 = 0x6000;
const TASK_STATE: u64 = 0x7000;
const FAULT_STACK: u64 = 0xa000;

fn program() -> &'static [u8] {
    let (begin, end) = (&raw const BEGIN, &raw const END);
    // SAFETY: the assembler block above puts both symbols into one read-only section, in this order.
    unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
}

/// The guest's memory.
pub(super) struct Image {
    host: NonNull<u8>,
}

impl Image {
    /// Maps memory and builds the guest in it.
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: a new private mapping at an address the kernel chooses.
        let host = unsafe {
            libc::mmap(
                ptr::null_mut(),
                SIZE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let host = NonNull::new(host.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut image = Self { host };
        image.build();
        Ok(image)
    }

    pub(super) fn host(&self) -> NonNull<u8> {
        self.host
    }

    fn build(&mut self) {
        self.page_tables();
        self.descriptors();
        self.bytes(PROGRAM, program());
        let mut entry = |at| self.word_at(PROGRAM + at).wrapping_add(PROGRAM);
        let (fault, timer) = (entry(0), entry(8));
        self.gate(14, fault);
        self.gate(0x40, timer);
        // The stack the processor takes for an interrupt of user code.
        self.word(TASK_STATE + 4, FAULT_STACK);
    }

    fn page_tables(&mut self) {
        const TABLE: u64 = 0b111; // present, writable, user
        const PAGE: u64 = 0b1000_0111; // of 2 MiB
        const DEVICE: u64 = PAGE | 0b1_1000; // not cached
        self.word(TOP_TABLE, 0x2000 | TABLE);
        for (gib, directory) in [(0, 0x3000), (1, 0x4000), (3, 0x5000)] {
            self.word(0x2000 + gib * 8, directory | TABLE);
        }
        self.word(0x3000, PAGE);
        self.word(0x4000, REGISTER | DEVICE);
        let apic = 0xfee0_0000;
        self.word(0x5000 + (apic >> 21 & 511) * 8, apic | DEVICE);
    }

    fn descriptors(&mut self) {
        let task_state = TASK_STATE << 16 | 0x0000_8900_0000_0067;
        let table = [
            0,
            0,
            0x00af_9b00_0000_ffff, // 0x10 kernel code
            0x00cf_9300_0000_ffff, // 0x18 kernel data
            0,
            0x00cf_f300_0000_ffff, // 0x28 user data
            0x00af_fb00_0000_ffff, // 0x30 user code
            task_state,            // 0x38, two entries
            0,
        ];
        for (at, descriptor) in (DESCRIPTORS..).step_by(8).zip(table) {
            self.word(at, descriptor);
        }
    }

    /// An interrupt gate to the kernel's code segment.
    fn gate(&mut self, vector: u64, handler: u64) {
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.word(INTERRUPTS + vector * 16, low);
        self.word(INTERRUPTS + vector * 16 + 8, handler >> 32);
    }

    fn word(&mut self, at: u64, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn word_at(&mut self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        let Some(from) = self.place(at, bytes.len()) else {
            return 0;
        };
        // SAFETY: both ranges are valid for 8 bytes and distinct; no guest runs yet.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        u64::from_le_bytes(bytes)
    }

    fn bytes(&mut self, at: u64, bytes: &[u8]) {
        if let Some(to) = self.place(at, bytes.len()) {
            // SAFETY: both ranges are valid for the length and distinct; no guest runs yet.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        }
    }

    fn place(&mut self, at: u64, len: usize) -> Option<*mut u8> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(len)?;
        // SAFETY: the range was just checked to lie in the mapping.
        (end <= SIZE_BYTES).then(|| unsafe { self.host.as_ptr().add(at) })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`; whoever gave it to a guest ends the guest first.
        unsafe { libc::munmap(self.host.as_ptr().cast(), SIZE_BYTES) };
    }
}
