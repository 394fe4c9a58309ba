// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual processor: how it is started, why it comes back, how it is stopped and saved.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::Error;

/// A virtual processor. It belongs to one thread at a time.
///
/// ```text
///   bind_thread → [ check what to do → run → serve the exit ]*       Kicker::kick from anywhere: run returns Interrupted
/// ```
pub trait Vcpu: Send {
    /// The index it was created with; also its local APIC id.
    fn index(&self) -> u8;

    /// Makes the calling thread the one a [`Kicker`] wakes. Must be called by the thread that will call
    /// [`run`](Self::run), before it.
    ///
    /// # Errors
    /// The host refused to prepare the thread.
    fn bind_thread(&mut self) -> Result<(), Error>;

    /// Enters the guest and comes back when it needs something. The data of an `…Read` or `…In` exit must be filled in
    /// before the next call, which hands it to the guest.
    ///
    /// A kick that arrived at any time since the last [`Exit::Interrupted`] makes this call return it; no kick is lost.
    /// When it does, the guest has taken the answer of the previous exit: the vCPU can be saved.
    ///
    /// # Errors
    /// The guest cannot go on: the hypervisor or the processor refuses to enter it.
    fn run(&mut self) -> Result<Exit<'_>, Error>;

    /// A handle that makes [`run`](Self::run) come back.
    fn kicker(&self) -> Kicker;

    /// Puts the processor where a 64-bit boot protocol starts it. Others wait for their start-up interrupt by themselves.
    ///
    /// # Errors
    /// The hypervisor refused the registers.
    fn set_boot_state(&mut self, boot: &BootState) -> Result<(), Error>;

    /// Everything the guest can see of this processor. Of one that never ran the time stamp counter is saved as 0, its
    /// value after power-on; restored, it joins the counters of the machine's other processors instead of jumping back.
    ///
    /// # Errors
    /// The hypervisor refused to tell, or the guest is in the middle of an instruction: after the exit of an access,
    /// only when [`run`](Self::run) has returned [`Exit::Interrupted`] is it not.
    fn save(&self) -> Result<VcpuState, Error>;

    /// Goes back to a saved state. What was pending (an unanswered exit, an interrupt, an exception) is forgotten; a kick
    /// is not.
    ///
    /// # Errors
    /// The state is another hypervisor's, or it was refused: the vCPU must then not run on.
    fn restore(&mut self, state: &VcpuState) -> Result<(), Error>;

    /// Tells the guest's lock-up detectors that its time stood still on purpose. To be called before a processor runs on
    /// after a stop. Has no effect on a guest without a paravirtual clock.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn mark_paused(&self) -> Result<(), Error>;
}

/// Why a vCPU left the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// The guest reads memory no slot backs; `data` is 1 to 8 bytes to fill in.
    MmioRead {
        /// Guest physical address.
        gpa: u64,
        /// What the guest will read.
        data: &'a mut [u8],
    },
    /// The guest wrote memory no slot backs, or that is read-only.
    MmioWrite {
        /// Guest physical address.
        gpa: u64,
        /// What the guest wrote, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest reads a port. A string instruction asks for several units at once, all from the same port.
    PortIn {
        /// The port.
        port: u16,
        /// What the guest will read: a whole number of units.
        data: &'a mut [u8],
        /// Bytes per unit: 1, 2 or 4.
        size: u8,
    },
    /// The guest wrote a port. A string instruction writes several units at once, all to the same port.
    PortOut {
        /// The port.
        port: u16,
        /// What the guest wrote: a whole number of units.
        data: &'a [u8],
        /// Bytes per unit: 1, 2 or 4.
        size: u8,
    },
    /// The guest waits for an interrupt. Not seen with interrupt controllers inside the hypervisor, which waits itself.
    Halt,
    /// Triple fault: the processor shut itself down.
    Shutdown,
    /// A kick, or a signal to the thread.
    Interrupted,
    /// The guest asked the hypervisor for something that concerns the machine.
    SystemEvent {
        /// What it asked for.
        kind: SystemEventKind,
    },
    /// The guest touched memory of a slot whose host page is inaccessible. The instruction has not been executed; the
    /// guest faults again if it is run again. One that the hypervisor emulates exits as an access without a slot instead.
    MemoryFault {
        /// Guest physical address, where the host's KVM tells it. Most do not.
        gpa: Option<u64>,
        /// Guest's instruction pointer.
        rip: u64,
    },
    /// The hypervisor cannot carry this guest on.
    InternalError {
        /// KVM's suberror: 1 is an instruction it cannot emulate.
        suberror: u32,
        /// What is known: instruction bytes, registers.
        detail: String,
    },
}

/// What a [`Exit::SystemEvent`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEventKind {
    /// Power off.
    Shutdown,
    /// Restart.
    Reset,
    /// The guest reports its own crash.
    Crash,
    /// Something else, numbered as in the kernel's API.
    Other(u32),
}

/// Makes a vCPU's [`run`](Vcpu::run) return [`Exit::Interrupted`], the running call or else the next one.
///
/// May outlive the vCPU: kicks then do nothing.
#[derive(Clone)]
pub struct Kicker(Arc<dyn Fn() + Send + Sync>);

impl Kicker {
    pub(crate) fn new(kick: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(kick))
    }

    /// Kicks. Never blocks for longer than the thread's wake-up takes.
    pub fn kick(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Kicker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kicker")
    }
}

/// The state of a vCPU, opaque; only a vCPU of the same hypervisor takes it back.
pub struct VcpuState(pub(crate) Box<dyn Any + Send + Sync>);

impl fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VcpuState")
    }
}

/// Where and how a processor starts in 64-bit mode.
///
/// The page tables `cr3` points to and the descriptors at `gdt_gpa` are put into guest memory by whoever builds it;
/// [`FLAT_GDT`] is what the selectors here refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootState {
    /// First instruction.
    pub rip: u64,
    /// Second argument register: the zero page in Linux's 64-bit boot protocol.
    pub rsi: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Physical address of the top page table.
    pub cr3: u64,
    /// Control register 0: paging and protection must be on.
    pub cr0: u64,
    /// Control register 4: physical address extension must be on.
    pub cr4: u64,
    /// Extended features: long mode enabled and active.
    pub efer: u64,
    /// Physical address of the descriptor table.
    pub gdt_gpa: u64,
    /// Its last byte, counted from its first.
    pub gdt_limit: u16,
}

impl BootState {
    /// CR0 of a processor in long mode: PE, MP, ET, NE, WP, AM, PG.
    pub const LONG_MODE_CR0: u64 = 0x8005_0033;
    /// CR4 of a processor in long mode: PAE.
    pub const LONG_MODE_CR4: u64 = 0x20;
    /// EFER of a processor in long mode: LME, LMA.
    pub const LONG_MODE_EFER: u64 = 0x500;

    /// Flat 64-bit mode with [`FLAT_GDT`] at `gdt_gpa`.
    pub fn long_mode(rip: u64, rsi: u64, rsp: u64, cr3: u64, gdt_gpa: u64) -> Self {
        Self {
            rip,
            rsi,
            rsp,
            cr3,
            cr0: Self::LONG_MODE_CR0,
            cr4: Self::LONG_MODE_CR4,
            efer: Self::LONG_MODE_EFER,
            gdt_gpa,
            gdt_limit: (FLAT_GDT.len() * 8 - 1) as u16,
        }
    }
}

/// Selector of the 64-bit code segment in [`FLAT_GDT`]: what Linux's boot protocol calls `__BOOT_CS`.
pub const BOOT_CS: u16 = 0x10;
/// Selector of the data segment in [`FLAT_GDT`]: `__BOOT_DS`.
pub const BOOT_DS: u16 = 0x18;
/// Selector of the task state segment in [`FLAT_GDT`].
pub const BOOT_TSS: u16 = 0x20;

/// Flat descriptors for 64-bit boot: null, null, code at [`BOOT_CS`], data at [`BOOT_DS`], a task state segment
/// of two entries at [`BOOT_TSS`].
pub const FLAT_GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];
