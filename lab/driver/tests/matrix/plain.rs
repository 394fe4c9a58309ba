// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI functions that are not virtio.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ebbtide_bus::pci::{Function, Port, PortModel, PortSpec};
use ebbtide_device::Draining;
use ebbtide_devices::chardev::Wire;
use ebbtide_devices::i6300esb::I6300Esb;
use ebbtide_devices::ivshmem::IvshmemPlain;
use ebbtide_devices::serial_pci::SerialPci;
use ebbtide_devices::testdev::TestDevice;
use ebbtide_lab_driver::PciDevice;
use ebbtide_memory::{Access, Backing, Gpa, Memory, Pin, RamSpec};

use crate::cycle::{Behaviour, Step, Subject};
use crate::streams::full_wire;
use crate::world::{ID, Place, Removable, World};

fn at_once() -> Draining {
    Box::pin(std::future::ready(()))
}

impl Removable for SerialPci {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(SerialPci::close(&self))
    }

    fn quiesce(&self) -> Draining {
        Box::pin(SerialPci::quiesce(self))
    }
}

impl Removable for I6300Esb {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(I6300Esb::close(&self))
    }

    fn quiesce(&self) -> Draining {
        Box::pin(I6300Esb::quiesce(self))
    }

    fn stand_still(&self, still: bool) {
        match still {
            true => self.pause(),
            false => self.resume(),
        }
    }
}

impl Removable for TestDevice {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(self.config().gate().drained())
    }

    fn quiesce(&self) -> Draining {
        at_once()
    }
}

impl Removable for Port {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(self.config().gate().drained())
    }

    fn quiesce(&self) -> Draining {
        at_once()
    }
}

/// Its memory goes with it, when the last who uses it is through.
impl Removable for IvshmemPlain {
    fn close(self: Arc<Self>) -> Draining {
        let closed = IvshmemPlain::close(&self);
        Box::pin(async move {
            closed.await;
            let ticket = self.retire().expect("its BAR is not mapped");
            ticket.drained().await;
            if let Err((_, error)) = ticket.destroy() {
                panic!("{error}");
            }
        })
    }

    fn quiesce(&self) -> Draining {
        at_once()
    }

    fn force(&self) -> bool {
        true
    }

    fn requests(&self) -> u64 {
        u64::from(!self.block().name().is_empty())
    }
}

/// What a driver does with a function when it uses it, and what its other end does.
trait Use {
    fn begin(&mut self, world: &World, device: &PciDevice);
    fn holds(&self) -> bool {
        false
    }
    fn let_go(&mut self) {}
    fn late(&mut self) {}
    fn verify(&self) {}
}

struct Plain<F> {
    world: Rc<World>,
    /// Until it is released.
    function: Option<Arc<F>>,
    place: Place,
    usage: Box<dyn Use>,
}

impl<F: Removable + 'static> Subject for Plain<F> {
    fn function(&self) -> Arc<dyn Removable> {
        Arc::clone(self.function.as_ref().expect("not released")) as _
    }

    fn release(&mut self) -> usize {
        self.function.take().map_or(0, |it| Arc::strong_count(&it))
    }

    fn place(&self) -> Place {
        self.place
    }

    fn step(&mut self, step: Step, device: &PciDevice) {
        match step {
            Step::Kicked => self.usage.begin(&self.world, device),
            Step::Completing | Step::Answered => self.usage.let_go(),
            _ => {}
        }
    }

    fn holds(&self) -> bool {
        self.usage.holds()
    }

    /// Whoever uses shared memory goes on with it.
    fn holds_reset(&self) -> bool {
        false
    }

    fn let_go(&mut self) {
        self.usage.let_go();
    }

    /// A driver has no reset but that of the function, which forgets its BARs.
    fn begin_reset(&mut self) {
        self.usage.let_go();
    }

    fn late(&mut self) {
        self.usage.let_go();
        self.usage.late();
    }

    fn verify(&mut self) {
        self.usage.verify();
    }
}

fn plain<F: Removable + 'static>(
    world: &Rc<World>,
    function: Arc<F>,
    place: Place,
    usage: impl Use + 'static,
) -> Box<dyn Subject> {
    Box::new(Plain {
        world: Rc::clone(world),
        function: Some(function),
        place,
        usage: Box::new(usage),
    })
}

struct Line {
    wire: Arc<Wire>,
}

/// pci-serial
pub fn serial(world: &Rc<World>, behaviour: Behaviour) -> Box<dyn Subject> {
    let wire = full_wire(behaviour);
    let function = SerialPci::new(ID, &wire).expect("a function");
    plain(world, function, Place::Bus0, Line { wire })
}

impl Use for Line {
    fn begin(&mut self, world: &World, device: &PciDevice) {
        let ports = world.board.ports();
        let reader = ports.memory().register();
        let base = device.bar(0) & !3;
        // Both interrupts, and a byte.
        ports.store(&reader, base + 1, 1, 3);
        ports.store(&reader, base, 1, b'x'.into());
        self.wire.receive(b"typed");
    }

    fn let_go(&mut self) {
        self.wire.take();
    }

    fn late(&mut self) {
        self.wire.receive(b"late");
    }

    fn verify(&self) {
        assert!(!self.wire.has_input_listener());
        assert_eq!(Arc::strong_count(&self.wire), 1);
    }
}

/// A watchdog whose time of two stages is less than a slow backend's.
struct Time {
    barks: Arc<AtomicUsize>,
    heard: Option<usize>,
}

/// i6300esb
pub fn watchdog(world: &Rc<World>, _: Behaviour) -> Box<dyn Subject> {
    let barks = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&barks);
    let bark = Box::new(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let remote = world.board.remote();
    let function = I6300Esb::new(ID, &remote, &Arc::default(), bark).expect("a function");
    let usage = Time { barks, heard: None };
    plain(world, function, Place::Port, usage)
}

impl Use for Time {
    /// Two stages of about eight seconds.
    fn begin(&mut self, _: &World, device: &PciDevice) {
        let bar = device.bar(0);
        for timer in [0, 4] {
            device.store(bar + 12, 2, 0x80);
            device.store(bar + 12, 2, 0x86);
            device.store(bar + timer, 4, 0x2000);
        }
        device.store(bar + 12, 2, 0x80);
        device.store(bar + 12, 2, 0x86);
        device.store(bar + 12, 2, 0x100);
        device.write_config(0x68, 1, 2);
    }

    /// From the end on it is silent.
    fn late(&mut self) {
        let barks = self.barks.load(Ordering::SeqCst);
        assert_eq!(*self.heard.get_or_insert(barks), barks, "it barks");
    }

    fn verify(&self) {
        assert_eq!(Arc::strong_count(&self.barks), 1, "who would bark");
    }
}

/// A request of another device in the shared memory.
struct Shared {
    behaviour: Behaviour,
    memory: Arc<Memory>,
    pin: Option<Pin>,
}

/// ivshmem-plain
pub fn shared_memory(world: &Rc<World>, behaviour: Behaviour) -> Box<dyn Subject> {
    let size_bytes = 1 << 16;
    let spec = RamSpec {
        backing: Backing::Memfd { thp: false },
        ..RamSpec::anon("shm0", size_bytes)
    };
    let memory = world.board.memory();
    let block = memory.ram().add(spec).expect("memory");
    let function = IvshmemPlain::new(ID, memory, &block).expect("a function");
    let usage = Shared {
        behaviour,
        memory: Arc::clone(memory),
        pin: None,
    };
    plain(world, function, Place::Port, usage)
}

impl Use for Shared {
    fn begin(&mut self, world: &World, device: &PciDevice) {
        device.store(device.bar(2), 8, 1);
        if self.behaviour == Behaviour::Never {
            let reader = self.memory.register();
            let guard = world.board.space().read(&reader);
            let pin = guard.pin(Gpa(device.bar(2) + 4096), 512, Access::Write);
            self.pin = Some(pin.expect("it is memory"));
        }
    }

    fn holds(&self) -> bool {
        self.pin.is_some()
    }

    /// It comes late, into memory that is still there.
    fn let_go(&mut self) {
        if let Some(pin) = self.pin.take() {
            pin.write_at(0, b"late but fine").expect("its memory");
        }
    }

    fn verify(&self) {
        assert!(self.memory.ram().by_name("shm0").is_none());
    }
}

struct Counter;

/// pci-testdev
pub fn testdev(world: &Rc<World>, _: Behaviour) -> Box<dyn Subject> {
    let memory = world.board.memory();
    let function = TestDevice::new(ID, memory, Some(1 << 16)).expect("a function");
    plain(world, function, Place::Port, Counter)
}

impl Use for Counter {
    /// A test with an ioeventfd, begun.
    fn begin(&mut self, _: &World, device: &PciDevice) {
        for bar in [0, 1] {
            let bar = device.bar(bar);
            device.store(bar, 1, 1);
            let offset = device.load(bar + 4, 4);
            device.store(bar + offset, 1, 1);
        }
    }
}

struct Nothing;

impl Use for Nothing {
    fn begin(&mut self, _: &World, _: &PciDevice) {}
}

/// pcie-root-port, with nothing in its slot.
pub fn root_port(world: &Rc<World>, _: Behaviour) -> Box<dyn Subject> {
    let spec = PortSpec {
        name: ID.into(),
        model: PortModel::RootPort,
        slot_number: 2,
        hotplug: None,
        reservation: None,
    };
    let board = &world.board;
    let function = Port::new(board.bridge(), spec, board.interrupts()).expect("a port");
    plain(world, function, Place::Bus0, Nothing)
}
