// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A processor of KVM: entering the guest and telling why it came back.

use std::io;
use std::slice;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Weak};

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::rings::VcpuRing;
use super::run_area::RunArea;
use super::vm::Machine;
use super::{boot, msrs, signal, state};
use crate::kick;
use crate::{BootState, Error, Exit, Kicker, SystemEventKind, Vcpu, VcpuState};

/// An instruction that spans pages or uses many units comes back in parts; this is more than any has.
const MAX_PARTS: usize = 1 << 16;
/// So often in a row may a dirty ring be full with nothing to take: somebody else just took it.
const MAX_FULL_RINGS: u32 = 1000;

pub(super) struct KvmVcpu {
    index: u8,
    fd: VcpuFd,
    machine: Arc<Machine>,
    shared: Arc<Shared>,
    /// Where KVM notes what this processor writes, if it does so in rings.
    ring: Option<Arc<VcpuRing>>,
    ran: bool,
    /// The last exit asked for something whose answer KVM takes at the next entry.
    answer_due: bool,
}

/// What the processor shares with its kickers.
struct Shared {
    area: RunArea,
    /// 0: none is bound yet; the flag alone then does.
    thread: AtomicI32,
}

/// How KVM_RUN ended.
enum Outcome {
    Exit,
    Interrupted,
    Retry,
    MemoryFault(Option<u64>),
    Failed(io::Error),
}

impl KvmVcpu {
    pub(super) fn new(machine: &Arc<Machine>, index: u8, cpus: u8) -> Result<Self, Error> {
        let failed = |operation| {
            move |errno: kvm_ioctls::Error| {
                Error::refused(operation, format!("vcpu {index}"), errno)
            }
        };
        if index >= cpus {
            return Err(Error::refused(
                "creating a processor",
                format!("vcpu {index} of {cpus}"),
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        let fd = machine
            .fd
            .create_vcpu(index.into())
            .map_err(failed("KVM_CREATE_VCPU"))?;
        let size = machine
            .system
            .get_vcpu_mmap_size()
            .map_err(failed("KVM_GET_VCPU_MMAP_SIZE"))?;
        let area = RunArea::map(&fd, size, index)?;
        fd.set_cpuid2(&machine.cpuid.for_vcpu(index, cpus)?)
            .map_err(failed("KVM_SET_CPUID2"))?;
        msrs::write(&fd, &msrs::boot(), index)?;
        let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        fd.set_lapic(&boot::local_apic(lapic))
            .map_err(failed("KVM_SET_LAPIC"))?;
        if let Ok(khz) = fd.get_tsc_khz() {
            machine.tsc_khz.get_or_init(|| khz);
        }
        let shared = Arc::new(Shared {
            area,
            thread: AtomicI32::new(0),
        });
        let ring = match &machine.rings {
            Some(rings) => Some(rings.add_vcpu(index, &fd, kick_of(&shared))?),
            None => None,
        };
        Ok(Self {
            index,
            fd,
            machine: Arc::clone(machine),
            shared,
            ring,
            ran: false,
            answer_due: false,
        })
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Outcome {
        kick::before_entry(self.shared.area.immediate_exit());
        self.ran = true;
        let crossing = self.ring.as_deref().map(VcpuRing::crossing);
        if let Some(crossing) = crossing {
            crossing.enter();
        }
        let result = self.fd.run();
        if let Some(crossing) = crossing {
            crossing.leave();
        }
        // kvm-ioctls forgets how wide an exit's units are; what it decodes is left and decoded here from the area.
        match result {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Outcome::MemoryFault(Some(gpa)),
            Ok(VcpuExit::Intr) => Outcome::Interrupted,
            Ok(_) => Outcome::Exit,
            Err(errno) => match errno.errno() {
                libc::EINTR => Outcome::Interrupted,
                // A processor that waited for its start-up interrupt got it.
                libc::EAGAIN => Outcome::Retry,
                libc::EFAULT | libc::EHWPOISON => Outcome::MemoryFault(None),
                _ => Outcome::Failed(errno.into()),
            },
        }
    }

    /// Lets KVM take the answer to the last exit without running the guest, so that it does not come into what is
    /// restored.
    fn settle(&mut self) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        kick::without_guest(shared.area.immediate_exit(), || {
            for _ in 0..MAX_PARTS {
                if !self.answer_due {
                    return Ok(());
                }
                self.answer_due = match self.enter() {
                    Outcome::Exit | Outcome::Retry => true,
                    Outcome::Interrupted | Outcome::MemoryFault(_) => false,
                    Outcome::Failed(source) => return Err(self.refused("KVM_RUN", source)),
                };
            }
            Err(self.refused("KVM_RUN", io::Error::other("an instruction does not end")))
        })
    }

    /// Whether the last exit was for a dirty ring without room.
    fn is_ring_full(&self) -> bool {
        // SAFETY: KVM_RUN has returned, and only this thread calls it: nobody writes the area.
        let reason = unsafe { (*self.shared.area.run()).exit_reason };
        self.ring.is_some() && reason == KVM_EXIT_DIRTY_RING_FULL
    }

    /// Empties this processor's dirty ring. Others go on.
    fn make_room(&self) -> Result<usize, Error> {
        let (Some(rings), Some(ring)) = (&self.machine.rings, &self.ring) else {
            return Ok(0);
        };
        let made = rings.make_room(ring, &self.machine.fd);
        made.map_err(|source| self.refused("KVM_RESET_DIRTY_RINGS", source))
    }

    fn refused(&self, operation: &'static str, source: impl Into<io::Error>) -> Error {
        Error::refused(operation, format!("vcpu {}", self.index), source)
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map(|regs| regs.rip).unwrap_or_default()
    }

    /// Reads what KVM left in the run area.
    fn decode(&mut self) -> Result<Exit<'_>, Error> {
        let run = self.shared.area.run();
        // SAFETY: KVM_RUN has returned, and only this thread calls it: nobody writes the area.
        let reason = unsafe { (*run).exit_reason };
        self.answer_due = matches!(reason, KVM_EXIT_MMIO | KVM_EXIT_IO);
        match reason {
            KVM_EXIT_MMIO => Ok(self.mmio(run)),
            KVM_EXIT_IO => self.port(run),
            KVM_EXIT_HLT => Ok(Exit::Halt),
            KVM_EXIT_SHUTDOWN => Ok(Exit::Shutdown),
            KVM_EXIT_INTR => Ok(Exit::Interrupted),
            KVM_EXIT_INTERNAL_ERROR => Ok(self.internal_error(run)),
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: the exit reason says which member of the union is valid.
                let kind = unsafe { (*run).__bindgen_anon_1.system_event.type_ };
                Ok(Exit::SystemEvent {
                    kind: system_event(kind),
                })
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let fail = unsafe { (*run).__bindgen_anon_1.fail_entry };
                let reason = fail.hardware_entry_failure_reason;
                Err(Error::EntryFailed {
                    vcpu: self.index,
                    reason,
                })
            }
            reason => Err(Error::UnexpectedExit {
                vcpu: self.index,
                reason,
            }),
        }
    }

    fn mmio(&mut self, run: *mut kvm_run) -> Exit<'_> {
        // SAFETY: the exit reason says which member of the union is valid. Its data is borrowed together with `self`, so
        // that KVM_RUN cannot be called while the borrow lives; nobody else reaches these bytes.
        let mmio = unsafe { &mut (*run).__bindgen_anon_1.mmio };
        let gpa = mmio.phys_addr;
        let len = (mmio.len as usize).min(mmio.data.len());
        let (data, _) = mmio.data.split_at_mut(len);
        if mmio.is_write != 0 {
            Exit::MmioWrite { gpa, data }
        } else {
            Exit::MmioRead { gpa, data }
        }
    }

    fn port(&mut self, run: *mut kvm_run) -> Result<Exit<'_>, Error> {
        // SAFETY: the exit reason says which member of the union is valid.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let (port, size) = (io.port, io.size);
        let len = usize::from(size).saturating_mul(io.count as usize);
        let data = usize::try_from(io.data_offset)
            .ok()
            .and_then(|offset| self.shared.area.bytes(offset, len))
            .ok_or_else(|| self.refused("KVM_RUN", io::Error::other("port data out of bounds")))?;
        // SAFETY: the bytes were checked to lie in the area; the borrow is bound to `self` as in `mmio`.
        let data = unsafe { slice::from_raw_parts_mut(data, len) };
        Ok(if u32::from(io.direction) == KVM_EXIT_IO_IN {
            Exit::PortIn { port, data, size }
        } else {
            Exit::PortOut { port, data, size }
        })
    }

    fn internal_error(&self, run: *mut kvm_run) -> Exit<'_> {
        // SAFETY: the exit reason says which member of the union is valid; it is plain data.
        let internal = unsafe { (*run).__bindgen_anon_1.internal };
        let words = internal
            .data
            .get(..internal.ndata as usize)
            .unwrap_or(&internal.data);
        let mut detail = match internal.suberror {
            KVM_INTERNAL_ERROR_EMULATION => match instruction(words) {
                Some(bytes) => format!("cannot emulate the instruction {bytes:02x?}"),
                None => "cannot emulate an instruction".to_owned(),
            },
            _ => format!("data {words:x?}"),
        };
        if let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) {
            detail += &format!(
                " at rip {:#x} (rsp {:#x}, rflags {:#x}, cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x})",
                regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer,
            );
        }
        Exit::InternalError {
            suberror: internal.suberror,
            detail,
        }
    }
}

/// The instruction's bytes in the data of a failed emulation: flags, then its length in a byte, then its bytes.
fn instruction(words: &[u64]) -> Option<Vec<u8>> {
    const HAS_BYTES: u64 = 1;
    let (flags, rest) = words.split_first()?;
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (&len, bytes) = bytes.split_first()?;
    (flags & HAS_BYTES != 0).then(|| bytes.get(..len.into()).unwrap_or(bytes).to_vec())
}

fn system_event(kind: u32) -> SystemEventKind {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => SystemEventKind::Shutdown,
        KVM_SYSTEM_EVENT_RESET => SystemEventKind::Reset,
        KVM_SYSTEM_EVENT_CRASH => SystemEventKind::Crash,
        other => SystemEventKind::Other(other),
    }
}

impl Shared {
    fn kick(&self) {
        kick::kick(self.area.immediate_exit(), || {
            match self.thread.load(Ordering::Acquire) {
                0 => {}
                thread => signal::send(thread),
            }
        });
    }
}

/// What kicks a processor. Weak: a kicker somebody kept must not keep the machine in the kernel.
fn kick_of(shared: &Arc<Shared>) -> impl Fn() + Send + Sync + 'static {
    let shared: Weak<Shared> = Arc::downgrade(shared);
    move || {
        if let Some(shared) = shared.upgrade() {
            shared.kick();
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        if let Some(rings) = &self.machine.rings {
            rings.remove_vcpu(self.index, &self.machine.fd);
        }
    }
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u8 {
        self.index
    }

    fn bind_thread(&mut self) -> Result<(), Error> {
        signal::receive().map_err(|error| self.refused("preparing the kick signal", error))?;
        self.shared
            .thread
            .store(signal::this_thread(), Ordering::Release);
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>, Error> {
        let mut full = 0;
        let outcome = loop {
            match self.enter() {
                Outcome::Retry => {}
                Outcome::Exit if self.is_ring_full() => {
                    full = match self.make_room()? {
                        0 => full + 1,
                        _ => 0,
                    };
                    if full > MAX_FULL_RINGS {
                        let source = io::Error::other("a dirty ring stays full");
                        return Err(self.refused("KVM_RUN", source));
                    }
                }
                outcome => break outcome,
            }
        };
        self.answer_due = false;
        match outcome {
            Outcome::Exit => self.decode(),
            Outcome::Interrupted | Outcome::Retry => {
                kick::after_interruption(self.shared.area.immediate_exit());
                Ok(Exit::Interrupted)
            }
            Outcome::MemoryFault(gpa) => Ok(Exit::MemoryFault {
                gpa,
                rip: self.rip(),
            }),
            Outcome::Failed(source) => Err(self.refused("KVM_RUN", source)),
        }
    }

    fn kicker(&self) -> Kicker {
        Kicker::new(kick_of(&self.shared))
    }

    fn set_boot_state(&mut self, boot: &BootState) -> Result<(), Error> {
        let sregs = self
            .fd
            .get_sregs()
            .map_err(|errno| self.refused("KVM_GET_SREGS", errno))?;
        self.fd
            .set_sregs(&boot::special_registers(boot, sregs))
            .map_err(|errno| self.refused("KVM_SET_SREGS", errno))?;
        self.fd
            .set_fpu(&boot::fpu())
            .map_err(|errno| self.refused("KVM_SET_FPU", errno))?;
        self.fd
            .set_regs(&boot::registers(boot))
            .map_err(|errno| self.refused("KVM_SET_REGS", errno))
    }

    fn save(&self) -> Result<VcpuState, Error> {
        if self.answer_due {
            return Err(Error::AnswerDue { vcpu: self.index });
        }
        let msrs = &self.machine.msrs;
        let state = state::save(&self.machine, &self.fd, self.index, msrs, self.ran)?;
        Ok(VcpuState(Box::new(state)))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let Some(state) = state.0.downcast_ref() else {
            return Err(Error::ForeignState {
                object: format!("vcpu {}", self.index),
            });
        };
        self.settle()?;
        state::restore(&self.fd, self.index, state)
    }

    fn mark_paused(&self) -> Result<(), Error> {
        match self.fd.kvmclock_ctrl() {
            Ok(()) => Ok(()),
            // The guest has not set up its clock.
            Err(errno) if errno.errno() == libc::EINVAL => Ok(()),
            Err(errno) => Err(self.refused("KVM_KVMCLOCK_CTRL", errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_instructions_are_named_by_their_bytes() {
        // 15 bytes fetched, movaps first: what a host that emulates leaves for it.
        let words = [1, 0x00c2_ef0f_660f_280f << 8 | 3, 0];
        assert_eq!(instruction(&words), Some(vec![0x0f, 0x28, 0x0f]));
        assert_eq!(instruction(&[0, 0xff03, 0]), None);
        assert_eq!(instruction(&[]), None);
        assert_eq!(instruction(&[1, 0xff]), Some(vec![0; 7]));
    }

    #[test]
    fn system_events_have_names() {
        assert_eq!(system_event(1), SystemEventKind::Shutdown);
        assert_eq!(system_event(2), SystemEventKind::Reset);
        assert_eq!(system_event(3), SystemEventKind::Crash);
        assert_eq!(system_event(9), SystemEventKind::Other(9));
    }
}
