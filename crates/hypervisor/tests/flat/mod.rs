// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flat 64-bit guests for the tests: a program at 64 KiB, identity page tables, no operating system.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ebbtide_hypervisor::kvm::{self, Kvm, KvmVm, VmOptions};
use ebbtide_hypervisor::{BootState, Exit, FLAT_GDT, Vcpu, Vm};
use ebbtide_memory::{
    AddressSpace, Backing, Gpa, Memory, MemoryConfig, RamBlock, RamSpec, Reader, Region,
};
use vmm_sys_util::eventfd::EventFd;

pub const MIB: u64 = 1 << 20;
pub const PROGRAM: u64 = 0x1_0000;
/// First port of what the guests report to.
pub const PORT: u16 = 0xe0;
/// No step of any test takes longer, in a machine emulator neither.
pub const LIMIT: Duration = Duration::from_secs(60);

const GDT: u64 = 0x500;
const STACK: u64 = 0x8000;
const PAGE_TABLES: u64 = 0x9000;
const GIBS: u64 = 4;

/// Defines a function that gives the assembled program.
#[macro_export]
macro_rules! program {
    ($name:ident, $($line:literal),+ $(,)?) => {
        std::arch::global_asm!(
            concat!(".pushsection .rodata\n", stringify!($name), "_begin:\n"),
            $($line,)+
            concat!(stringify!($name), "_end:\n.popsection\n"),
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!(stringify!($name), "_begin")]
                static BEGIN: u8;
                #[link_name = concat!(stringify!($name), "_end")]
                static END: u8;
            }
            let (begin, end) = (&raw const BEGIN, &raw const END);
            // SAFETY: the assembler block above puts both symbols into one read-only section, in this order.
            unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
        }
    };
}

/// This machine's KVM. Without one, says so past the test harness's capture and gives `None`; fails if
/// `EBBTIDE_REQUIRE_KVM=1`.
pub fn kvm() -> Option<Kvm> {
    match kvm::open(kvm::DEFAULT_PATH) {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            skipped(&error.to_string());
            None
        }
    }
}

/// Says that a test cannot run here.
pub fn skipped(reason: &str) {
    let line = format!("SKIPPED-LAYER kvm: {reason}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
    let required = std::env::var("EBBTIDE_REQUIRE_KVM").is_ok_and(|value| value == "1");
    assert!(!required, "EBBTIDE_REQUIRE_KVM=1: {reason}");
}

/// An eventfd: one end to look at, one to hand out.
pub fn event() -> (EventFd, Arc<OwnedFd>) {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    // SAFETY: the descriptor is open as long as `event` lives, which is longer than this borrow.
    let borrowed = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let fd = borrowed.try_clone_to_owned().unwrap();
    (event, Arc::new(fd))
}

/// A machine with 2 MiB of RAM at 0 and processors that are about to run `program`.
pub struct Guest {
    pub memory: Arc<Memory>,
    pub system: Arc<Region>,
    pub ports: Arc<Region>,
    pub system_space: Arc<AddressSpace>,
    pub ports_space: Arc<AddressSpace>,
    pub reader: Reader,
    pub vm: Arc<KvmVm>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub boot: BootState,
}

impl Guest {
    pub fn new(kvm: &Kvm, program: &[u8]) -> Self {
        Self::with_cpus(kvm, program, 1)
    }

    pub fn with_cpus(kvm: &Kvm, program: &[u8], cpus: u8) -> Self {
        Self::with_options(kvm, program, cpus, &VmOptions::default())
    }

    pub fn with_options(kvm: &Kvm, program: &[u8], cpus: u8, options: &VmOptions) -> Self {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 34,
        })
        .unwrap();
        let system = Region::container("system", 1 << 64);
        let ports = Region::container("ports", 1 << 16);
        let system_space = memory.address_space("system", &system).unwrap();
        let ports_space = memory.address_space("ports", &ports).unwrap();
        let vm = kvm.create_vm_with(options).unwrap();
        system_space.add_listener(vm.memory_listener(), 0).unwrap();
        ports_space.add_listener(vm.port_listener(), 0).unwrap();
        let reader = memory.register();
        let boot = BootState::long_mode(PROGRAM, 0, STACK, PAGE_TABLES, GDT);
        let vcpus = (0..cpus)
            .map(|index| vm.create_vcpu(index, cpus).unwrap())
            .collect();
        let mut guest = Self {
            memory,
            system,
            ports,
            system_space,
            ports_space,
            reader,
            vm,
            vcpus,
            boot,
        };
        guest.add_ram("ram", 0, 2 * MIB);
        guest.load(program);
        guest
    }

    /// Puts tables and program into memory, and the first processor at its start.
    pub fn load(&mut self, program: &[u8]) {
        let word = |at: u64, value: u64| self.write(at, &value.to_le_bytes());
        word(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 3);
        for gib in 0..GIBS {
            let directory = PAGE_TABLES + 0x2000 + gib * 0x1000;
            word(PAGE_TABLES + 0x1000 + gib * 8, directory | 3);
            for page in 0..512 {
                word(directory + page * 8, gib << 30 | page << 21 | 0x83);
            }
        }
        for (at, descriptor) in (GDT..).step_by(8).zip(FLAT_GDT) {
            word(at, descriptor);
        }
        self.write(PROGRAM, program);
        let boot = self.boot.clone();
        self.vcpu().set_boot_state(&boot).unwrap();
    }

    pub fn vcpu(&mut self) -> &mut dyn Vcpu {
        self.vcpus[0].as_mut()
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.system_space
            .read(&self.reader)
            .write_bytes(Gpa(at), bytes)
            .unwrap();
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.system_space
            .read(&self.reader)
            .read_bytes(Gpa(at), &mut bytes)
            .unwrap();
        bytes
    }

    pub fn block(
        &self,
        name: &str,
        size_bytes: u64,
        block_size_bytes: Option<u64>,
    ) -> Arc<RamBlock> {
        self.memory
            .ram()
            .add(RamSpec {
                name: name.to_owned(),
                size_bytes,
                max_size_bytes: size_bytes,
                backing: Backing::Anon { thp: false },
                prefault: false,
                block_size_bytes,
            })
            .unwrap()
    }

    pub fn map(&self, region: &Arc<Region>, gpa: u64) {
        self.memory
            .update(|t| t.add(&self.system, region, gpa, 0))
            .unwrap();
    }

    pub fn add_ram(&self, name: &str, gpa: u64, size_bytes: u64) -> Arc<Region> {
        let region = Region::ram(name, &self.block(name, size_bytes, None));
        self.map(&region, gpa);
        region
    }

    /// Runs the first processor to its next exit; one that does not come fails the test.
    pub fn exit(&mut self) -> Exit<'_> {
        run_limited(self.vcpu())
    }

    /// Runs to the next exit, which must be a byte written to [`PORT`].
    pub fn report(&mut self) -> u8 {
        report_of(self.vcpu())
    }
}

/// As [`Guest::report`], for any processor.
pub fn report_of(vcpu: &mut dyn Vcpu) -> u8 {
    match run_limited(vcpu) {
        Exit::PortOut {
            port: PORT,
            data: &[byte],
            size: 1,
        } => byte,
        other => panic!("not a report: {other:x?}"),
    }
}

/// Runs to the next exit but kicks, at most [`LIMIT`].
pub fn run_limited(vcpu: &mut dyn Vcpu) -> Exit<'_> {
    vcpu.bind_thread().unwrap();
    let kicker = vcpu.kicker();
    let (done, over) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        let late = over.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            kicker.kick();
        }
        late
    });
    let exit = vcpu.run().unwrap();
    drop(done);
    assert!(!watch.join().unwrap(), "the guest did not exit in time");
    exit
}
