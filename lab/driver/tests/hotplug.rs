// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtio devices behind root ports: they work there as on bus 0, come while the driver is running, and go while requests
//! are in flight.

mod support;

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ebbtide_block::{Disk, DiskSpec};
use ebbtide_bus::pci::{
    Devfn, EjectSink, Function, HotplugError, HotplugSlot, Port, PortModel, PortSpec, Removal,
    SlotAddress,
};
use ebbtide_gate::Gate;
use ebbtide_lab_driver::{
    Board, DriverQueue, LIMIT, Layout, Part, PciDevice, PortDriver, SlotEvents, VirtioDriver, blk,
    block_on, poll,
};
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::{VirtioPci, features};
use support::{Echo, lock};

/// The BAR of a virtio device's registers.
const BAR: u8 = 0;

/// Closes the gate of what is in the slot, as whoever owns it would.
#[derive(Default)]
struct Owner {
    inside: Mutex<Option<Arc<Gate>>>,
    ejected: Mutex<Vec<SlotAddress>>,
}

impl EjectSink for Owner {
    fn eject(&self, slot: &SlotAddress) {
        if let Some(gate) = lock(&self.inside).as_ref() {
            gate.close();
        }
        lock(&self.ejected).push(slot.clone());
    }
}

/// A board with a root port in slot 1, empty, its driver ready.
struct Rig {
    board: Board,
    port: Arc<Port>,
    slot: Arc<dyn HotplugSlot>,
    owner: Arc<Owner>,
    driver: PortDriver,
}

impl Rig {
    fn new() -> Rig {
        let board = Board::new(32 << 20).expect("a board");
        let owner = Arc::new(Owner::default());
        let port = root_port(&board, &owner);
        board.attach(Arc::clone(&port) as _).expect("a slot");
        let driver = PortDriver::new(board.device(1)).expect("a port");
        Rig {
            slot: port.slot().expect("a hot-plug slot"),
            board,
            port,
            owner,
            driver,
        }
    }

    /// Puts `function` into the slot and tells the guest.
    fn plug(&self, function: &Arc<VirtioPci>) {
        *lock(&self.owner.inside) = Some(Arc::clone(function.gate()));
        let function = Arc::clone(function) as Arc<dyn Function>;
        self.port.bus().attach(None, function).expect("it is empty");
        self.slot.plugged();
    }

    /// What the guest does about something new.
    fn find(&self) -> PciDevice {
        let events = self.driver.events();
        assert!(
            events.presence && events.link && !events.button,
            "{events:?}"
        );
        let device = self.driver.turn_on().expect("a function");
        device.enable_msix();
        device
    }

    fn interrupts(&self) -> u64 {
        self.board.interrupts().count(self.driver.message())
    }

    /// The end of a removal, after the guest's eject.
    fn detach(&self, function: &Arc<VirtioPci>) {
        let zero = Devfn::from_bits(0);
        let closed = function.close();
        self.port.bus().unmap(zero).expect("it is there");
        block_on(closed, LIMIT).expect("it drains");
        drop(self.port.bus().detach_at(zero).expect("it has drained"));
        self.slot.detached();
    }
}

fn root_port(board: &Board, owner: &Arc<Owner>) -> Arc<Port> {
    port(board, owner, "rp0", PortModel::RootPort)
}

fn port(board: &Board, owner: &Arc<Owner>, name: &str, model: PortModel) -> Arc<Port> {
    let spec = PortSpec {
        name: name.into(),
        model,
        slot_number: 1,
        hotplug: Some(Arc::clone(owner) as _),
        reservation: None,
    };
    Port::new(board.bridge(), spec, board.interrupts()).expect("a port")
}

fn echo(board: &Board) -> (Arc<Echo>, Arc<VirtioPci>) {
    let echo = Echo::new(board.remote());
    let device = Arc::clone(&echo) as _;
    let function = VirtioPci::new(
        "echo0",
        device,
        board.space(),
        board.interrupts(),
        &board.remote(),
    );
    (echo, function.expect("a function"))
}

fn start(driver: &mut VirtioDriver) -> DriverQueue {
    driver.negotiate(features::TRANSPORT).expect("features");
    let queue = driver.add_queue(0, 16);
    driver.driver_ok().expect("activation");
    queue
}

fn disk(board: &Board, image: &tempfile::NamedTempFile) -> Arc<VirtioPci> {
    let disk = Disk::open(&DiskSpec::new(image.path())).unwrap();
    let blk = VirtioBlk::new(BlkSpec::new("disk0"), Arc::new(disk), board.remote());
    VirtioPci::new(
        "disk0",
        blk as _,
        board.space(),
        board.interrupts(),
        &board.remote(),
    )
    .unwrap()
}

fn image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|at| (at >> 9) as u8 ^ at as u8).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}

fn check_disk(board: &Board, device: PciDevice) {
    let mut driver = VirtioDriver::new(board, device).unwrap();
    let mut queue = start(&mut driver);
    let request = blk::Request::read(board.ram(), 8, 4096);
    let before = driver.interrupts(driver.queue_message(0));
    driver
        .roundtrip(0, &mut queue, &request.parts(), Layout::Direct)
        .unwrap();
    assert_eq!(request.status(), blk::status::OK);
    let expected: Vec<u8> = (4096..8192)
        .map(|at: i32| (at >> 9) as u8 ^ at as u8)
        .collect();
    assert_eq!(request.data(), expected);
    assert!(driver.wait_interrupt(driver.queue_message(0), before + 1));
    driver.reset().unwrap();
}

#[test]
fn a_disk_behind_a_port_is_there_from_the_beginning() {
    let board = Board::new(32 << 20).unwrap();
    let owner = Arc::new(Owner::default());
    let port = root_port(&board, &owner);
    let image = image();
    port.bus().attach(None, disk(&board, &image) as _).unwrap();
    board.attach(Arc::clone(&port) as _).unwrap();
    let driver = PortDriver::new(board.device(1)).unwrap();
    assert_eq!(driver.events(), SlotEvents::default());
    assert!(driver.is_present() && driver.link_is_active());
    let device = driver.behind();
    assert_eq!(device.bus(), 1);
    device.enable();
    device.enable_msix();
    check_disk(&board, device);
}

#[test]
fn a_disk_comes_goes_and_another_comes() {
    let rig = Rig::new();
    let mut addresses = Vec::new();
    for round in 0..3 {
        let (image, before) = (image(), rig.interrupts());
        let function = disk(&rig.board, &image);
        rig.plug(&function);
        assert_eq!(rig.interrupts(), before + 1);
        let device = rig.find();
        addresses.push(device.bar(BAR));
        check_disk(&rig.board, device.clone());

        assert_eq!(rig.slot.request_removal(), Ok(Removal::Asked));
        assert!(rig.driver.events().button);
        rig.driver.blink().unwrap();
        assert_eq!(rig.slot.request_removal(), Err(HotplugError::GuestBusy));
        rig.driver.turn_off().unwrap();
        assert_eq!(lock(&rig.owner.ejected).len(), round + 1);
        assert!(!device.is_there());
        assert_eq!(device.load(addresses[round], 4), 0xffff_ffff);
        assert_eq!(rig.driver.events(), SlotEvents::default(), "not yet");
        rig.detach(&function);
        let events = rig.driver.events();
        assert!(events.presence && events.link && !rig.driver.is_present());
        assert_eq!(Arc::strong_count(&function), 1);
    }
    assert!(
        addresses.iter().all(|it| *it == addresses[0]),
        "{addresses:#x?}"
    );
    assert!(rig.driver.windows()[1].contains(&addresses[0]));
}

/// The guest ejects while a request is in flight that takes its time: its write returns at once, and it sees the slot
/// empty only when the request has ended.
#[test]
fn an_eject_does_not_wait_for_requests_and_the_guest_does_not_see_it_early() {
    let rig = Rig::new();
    let (echo, function) = echo(&rig.board);
    rig.plug(&function);
    let mut driver = VirtioDriver::new(&rig.board, rig.find()).unwrap();
    let mut queue = start(&mut driver);
    echo.hold.store(true, Ordering::SeqCst);
    let gpa = rig.board.ram().alloc(2, 1);
    let parts = [Part::readable(gpa, 1), Part::writable(gpa, 1)];
    queue.add(&parts, Layout::Direct).unwrap();
    driver.kick(0);
    assert!(poll(|| echo.held() == 1));
    // It returns while the request is in flight.
    rig.driver.turn_off().unwrap();
    assert_eq!(echo.held(), 1);
    assert!(!driver.pci().is_there());
    let zero = Devfn::from_bits(0);
    let mut closed = Box::pin(function.close());
    rig.port.bus().unmap(zero).unwrap();
    assert!(
        block_on(&mut closed, Duration::from_millis(50)).is_none(),
        "in flight"
    );
    assert!(rig.driver.is_present());
    assert_eq!(rig.driver.events(), SlotEvents::default());
    echo.release();
    block_on(closed, LIMIT).expect("nothing is in flight any more");
    drop(rig.port.bus().detach_at(zero).unwrap());
    rig.slot.detached();
    assert!(rig.driver.events().presence && !rig.driver.is_present());
    queue.free();
}

/// A switch goes while a device below it is served by its ioeventfd and has a request in flight: all gates shut at once,
/// what is below has to go first, and no ioeventfd is left to ring.
#[test]
fn a_switch_goes_with_a_device_below_that_is_at_work() {
    let board = Board::new(32 << 20).unwrap();
    let owner = Arc::new(Owner::default());
    let root = root_port(&board, &owner);
    let up = port(&board, &owner, "up0", PortModel::X3130Upstream);
    let down = port(&board, &owner, "down0", PortModel::Xio3130Downstream);
    let (echo, function) = echo(&board);
    root.bus().attach(None, Arc::clone(&up) as _).unwrap();
    up.bus().attach(None, Arc::clone(&down) as _).unwrap();
    down.bus().attach(None, Arc::clone(&function) as _).unwrap();
    board.attach(Arc::clone(&root) as _).unwrap();
    let zero = Devfn::from_bits(0);
    let device = board.device(1).other(3, zero);
    assert!(device.is_there());
    for bus in [1, 2, 3] {
        device.other(bus, zero).enable();
    }
    device.enable_msix();
    let address = device.bar(BAR);
    let mut driver = VirtioDriver::new(&board, device).unwrap();
    let mut queue = start(&mut driver);
    let armed = || board.memory().mtree(true).matches("ioeventfd").count();
    assert!(armed() > 0);
    echo.hold.store(true, Ordering::SeqCst);
    let gpa = board.ram().alloc(2, 1);
    let parts = [Part::readable(gpa, 1), Part::writable(gpa, 1)];
    queue.add(&parts, Layout::Direct).unwrap();
    driver.kick(0);
    assert!(poll(|| echo.held() == 1));

    // The root port's slot is ejected: everything below shuts in one go.
    for below in root.bus().functions_below() {
        below.config().gate().close();
    }
    assert!(!driver.pci().is_there());
    assert_eq!(driver.pci().load(address, 4), 0xffff_ffff);
    driver.kick(0);
    let mut closed = Box::pin(function.close());
    for bus in [down.bus(), up.bus(), root.bus()] {
        bus.unmap(zero).unwrap();
    }
    assert_eq!(armed(), 0, "{}", board.memory().mtree(true));
    assert!(
        block_on(&mut closed, Duration::from_millis(50)).is_none(),
        "in flight"
    );
    assert!(up.bus().detach_at(zero).is_err(), "something is behind it");
    echo.release();
    block_on(closed, LIMIT).expect("nothing is in flight any more");
    for bus in [down.bus(), up.bus(), root.bus()] {
        drop(bus.detach_at(zero).expect("what is below has gone"));
    }
    assert_eq!(queue.device_used_idx(), 0, "the driver's rings are its own");
    assert!(poll(|| Arc::strong_count(&function) == 1));
    queue.free();
}

/// A driver at work whose device is taken away resets it on its way out, and waits until the status reads 0.
#[test]
fn a_driver_that_was_taken_by_surprise_can_end() {
    let rig = Rig::new();
    for by_surprise in [true, false, true] {
        let (_, function) = echo(&rig.board);
        rig.plug(&function);
        let mut driver = VirtioDriver::new(&rig.board, rig.find()).unwrap();
        let queue = start(&mut driver);
        assert_ne!(driver.status(), 0);
        function.gate().close();
        if !by_surprise {
            function.guest_let_go();
        }
        assert_eq!(driver.status(), 0xff, "as long as something is in flight");
        rig.detach(&function);
        assert!(rig.driver.events().presence && !driver.pci().is_there());
        if by_surprise {
            driver.reset().unwrap();
            driver.set_status(1);
            assert_eq!(driver.status(), 0);
            let fields = [(0x10, 2), (0x1a, 2), (0x12, 2), (0x15, 1), (0x1c, 2)];
            for (field, size) in fields {
                let read = driver.read_common(field, size);
                assert_eq!(read, (1 << (8 * size)) - 1, "{field:#x}");
            }
            assert_eq!(driver.take_isr(), 0xff);
        } else {
            assert_eq!(driver.status(), 0xff);
        }
        rig.driver.turn_off().unwrap();
        rig.driver.events();
        assert!(poll(|| Arc::strong_count(&function) == 1));
        queue.free();
    }
    rig.board.bridge().reset();
    let map = rig.board.memory().mtree(false).to_string();
    assert!(!map.contains("detached"), "{map}");
}
