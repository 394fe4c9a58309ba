// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The scripted hypervisor does what KVM does, as far as a monitor can tell.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use ebbtide_bus::irq::MsiMessage;
use ebbtide_hypervisor::sim::{DEFAULT_LIMITS, SimSlot, SimVm, Step};
use ebbtide_hypervisor::{BootState, Error, Exit, Limits, SystemEventKind, Vcpu, Vm};
use ebbtide_memory::{Backing, Ioeventfd, Memory, MemoryConfig, Mmio, RamSpec, Region};
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

struct Map {
    memory: Arc<Memory>,
    system: Arc<Region>,
    ports: Arc<Region>,
    vm: Arc<SimVm>,
    // They end with their spaces.
    _spaces: [Arc<ebbtide_memory::AddressSpace>; 2],
}

fn map(limits: Limits) -> Map {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 34,
    })
    .unwrap();
    let system = Region::container("system", 1 << 64);
    let ports = Region::container("ports", 1 << 16);
    let vm = SimVm::with_limits(limits);
    let system_space = memory.address_space("system", &system).unwrap();
    let ports_space = memory.address_space("ports", &ports).unwrap();
    system_space.add_listener(vm.memory_listener(), 0).unwrap();
    ports_space.add_listener(vm.port_listener(), 0).unwrap();
    Map {
        memory,
        system,
        ports,
        vm,
        _spaces: [system_space, ports_space],
    }
}

impl Map {
    fn ram(&self, name: &str, size_bytes: u64) -> Arc<Region> {
        let spec = RamSpec {
            name: name.to_owned(),
            size_bytes,
            max_size_bytes: size_bytes,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        Region::ram(name, &self.memory.ram().add(spec).unwrap())
    }

    fn add(&self, region: &Arc<Region>, gpa: u64) -> Result<(), ebbtide_memory::Error> {
        self.memory.update(|t| t.add(&self.system, region, gpa, 0))
    }
}

#[test]
fn slots_follow_the_map() {
    let map = map(DEFAULT_LIMITS);
    let low = map.ram("low", 2 * MIB);
    map.add(&low, 0).unwrap();
    let slot = SimSlot {
        gpa: 0,
        size_bytes: 2 * MIB,
        block: "low".to_owned(),
        block_offset: 0,
        readonly: false,
    };
    assert_eq!(map.vm.slots(), [slot]);
    map.memory.update(|t| t.set_offset(&low, 4 * MIB)).unwrap();
    assert_eq!(map.vm.slots()[0].gpa, 4 * MIB);
    map.memory.update(|t| t.remove(&low)).unwrap();
    assert_eq!(map.vm.slots(), []);
}

#[test]
fn refused_slots_leave_the_map_as_it_was() {
    let map = map(Limits {
        slots: 2,
        phys_bits: 36,
        ..DEFAULT_LIMITS
    });
    let [a, b, c] = ["a", "b", "c"].map(|name| map.ram(name, MIB));
    map.add(&a, 0).unwrap();
    let beyond = map.add(&b, (1 << 36) - 4096).unwrap_err().to_string();
    assert!(beyond.contains("36 physical address bits"), "{beyond}");
    map.vm.refuse_slots(1);
    assert!(map.add(&b, MIB).is_err());
    map.add(&b, MIB).unwrap();
    let full = map.add(&c, 2 * MIB).unwrap_err().to_string();
    assert!(full.contains("all 2 slots"), "{full}");
    assert_eq!(map.vm.slots().len(), 2);
}

struct Nobody;

impl Mmio for Nobody {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }
    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

fn count(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

fn descriptor(event: &EventFd) -> Arc<OwnedFd> {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the copy's descriptor was just given up by its owner.
    let fd = unsafe { OwnedFd::from_raw_fd(event.try_clone().unwrap().into_raw_fd()) };
    Arc::new(fd)
}

#[test]
fn doorbells_ring_instead_of_exiting() {
    let map = map(DEFAULT_LIMITS);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let registers = Region::mmio("registers", 0x100, Arc::new(Nobody));
    let port = Region::mmio("port", 4, Arc::new(Nobody));
    let bell = |size, datamatch| Ioeventfd {
        offset: 0,
        size,
        datamatch,
        fd: descriptor(&event),
    };
    map.memory
        .update(|t| {
            t.add(&map.system, &registers, 0x1000, 0)?;
            t.add(&map.ports, &port, 0x510, 0)?;
            t.add_ioeventfd(&registers, bell(2, Some(5)))?;
            t.add_ioeventfd(&port, bell(0, None))
        })
        .unwrap();
    assert_eq!(map.vm.memory_ioeventfds().len(), 1);
    assert_eq!(map.vm.port_ioeventfds()[0].address, 0x510);
    assert!(map.vm.ring_memory(0x1000, &[5, 0]));
    assert!(!map.vm.ring_memory(0x1000, &[6, 0]));
    assert!(!map.vm.ring_memory(0x1000, &[5]));
    assert!(map.vm.ring_port(0x510, &[1]));
    assert_eq!(count(&event), 2);

    let mut vcpu = map.vm.create_vcpu(0, 1).unwrap();
    let script = map.vm.script(0);
    let store = |data: &[u8]| Step::Store {
        gpa: 0x1000,
        data: data.to_vec(),
    };
    script.push(store(&[5, 0]));
    script.push(store(&[6, 0]));
    let exit = Exit::MmioWrite {
        gpa: 0x1000,
        data: &[6, 0],
    };
    assert_eq!(vcpu.run().unwrap(), exit);
    assert_eq!(count(&event), 1);
    map.memory
        .update(|t| {
            t.remove(&registers)?;
            t.remove(&port)
        })
        .unwrap();
    assert!(map.vm.memory_ioeventfds().is_empty() && map.vm.port_ioeventfds().is_empty());
    let mut event = File::from(Arc::into_inner(descriptor(&event)).unwrap());
    assert!(event.read(&mut [0; 8]).is_err());
}

/// Serves a vCPU until it shuts down: reads give the low byte of what is asked for.
fn serve(mut vcpu: Box<dyn Vcpu>) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            Exit::MmioRead { gpa, data } => data.fill(gpa as u8),
            Exit::PortIn { port, data, .. } => data.fill(port as u8),
            Exit::Shutdown => return seen,
            other => seen.push(format!("{other:x?}")),
        }
    }
}

#[test]
fn a_script_plays_every_exit() {
    let vm = SimVm::new();
    let vcpu = vm.create_vcpu(0, 1).unwrap();
    let script = vm.script(0);
    let kicker = vcpu.kicker();
    let thread = thread::spawn(move || serve(vcpu));
    let load = Step::Load { gpa: 0x42, size: 4 };
    assert_eq!(script.perform(load, LIMIT), Some(vec![0x42; 4]));
    let read = Step::In {
        port: 0x51,
        size: 2,
        count: 3,
    };
    assert_eq!(script.perform(read, LIMIT), Some(vec![0x51; 6]));
    let write = Step::Out {
        port: 7,
        size: 1,
        data: vec![1, 2],
    };
    assert_eq!(script.perform(write, LIMIT), Some(vec![1, 2]));
    kicker.kick();
    script.push(Step::Halt);
    script.push(Step::SystemEvent(SystemEventKind::Reset));
    script.push(Step::MemoryFault { gpa: Some(1) });
    script.push(Step::InternalError {
        detail: "odd".to_owned(),
    });
    script.push(Step::Shutdown);
    let seen = thread.join().unwrap();
    let text = seen.join(" ");
    for part in [
        "PortOut",
        "Interrupted",
        "Halt",
        "Reset",
        "gpa: Some(1)",
        "odd",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(script.answers().len(), 7);
}

#[test]
fn a_kick_before_the_run_is_not_lost() {
    let vm = SimVm::new();
    let mut vcpu = vm.create_vcpu(0, 1).unwrap();
    let kicker = vcpu.kicker();
    kicker.kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        kicker.kick();
    });
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    other.join().unwrap();
}

#[test]
fn states_are_saved_between_instructions_and_restored() {
    let vm = SimVm::new();
    let mut vcpu = vm.create_vcpu(0, 1).unwrap();
    let script = vm.script(0);
    let power_on = vcpu.save().unwrap();
    let boot = BootState::long_mode(1, 2, 3, 4, 5);
    vcpu.set_boot_state(&boot).unwrap();
    assert_eq!(script.boot_state(), Some(boot));
    script.push(Step::Load { gpa: 0, size: 1 });
    assert!(matches!(vcpu.run().unwrap(), Exit::MmioRead { .. }));
    assert!(matches!(vcpu.save(), Err(Error::AnswerDue { vcpu: 0 })));
    vcpu.restore(&power_on).unwrap();
    assert_eq!(script.boot_state(), None);
    vcpu.mark_paused().unwrap();
    assert_eq!(script.paused_marks(), 1);
    vm.restore_chips(&vm.save_chips().unwrap()).unwrap();
    vm.set_clock_ns(9).unwrap();
    assert_eq!(vm.clock_ns().unwrap(), 9);
}

#[test]
fn a_vcpu_exists_once() {
    let vm = SimVm::new();
    let first = vm.create_vcpu(1, 2).unwrap();
    assert!(vm.create_vcpu(1, 2).is_err());
    assert!(vm.create_vcpu(2, 2).is_err());
    drop(first);
    assert!(vm.create_vcpu(1, 2).is_ok());
}

struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park_timeout(LIMIT),
        }
    }
}

#[test]
fn messages_are_recorded_and_awaited() {
    let vm = SimVm::new();
    let route = vm.msi().route().unwrap();
    let message = |data| MsiMessage {
        address: 0xfee0_0000,
        data,
    };
    route.signal();
    assert_eq!(vm.wait_message(Duration::ZERO), None);
    route.program(Some(message(1))).unwrap();
    let device = {
        let route = Arc::clone(&route);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            route.signal();
        })
    };
    assert_eq!(wait(vm.next_message()), message(1));
    device.join().unwrap();
    route.program(Some(message(2))).unwrap();
    route.signal();
    route.signal();
    assert_eq!(vm.wait_message(LIMIT), Some(message(2)));
    assert_eq!(vm.take_messages(), [message(2)]);
    route.program(None).unwrap();
    route.signal();
    assert_eq!(vm.take_messages(), []);
    assert_eq!(vm.routes_in_use(), 1);
    drop(route);
    assert_eq!(vm.routes_in_use(), 0);
}

#[test]
fn lines_are_recorded_and_have_one_holder() {
    let vm = SimVm::new();
    let line = vm.irq_line(4).unwrap();
    assert!(matches!(vm.irq_line(4), Err(Error::LineTaken { gsi: 4 })));
    assert!(matches!(
        vm.irq_line(24),
        Err(Error::NoSuchLine { gsi: 24, last: 23 })
    ));
    line.set(true);
    line.set(true);
    line.set(false);
    line.set(true);
    let record = vm.line(4);
    assert_eq!((record.high, record.rises, record.taken), (true, 2, true));
    drop(line);
    let record = vm.line(4);
    assert_eq!((record.high, record.taken), (false, false));
}
