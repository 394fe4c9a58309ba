// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ports as their drivers see them: slots, interrupts, errors.

use super::enumerator::{flat, scan};
use super::hostile::Random;
use super::*;
use crate::irq::MsiMessage;
use crate::pci::{
    CorrectableError, Devfn, HotplugError, HotplugSlot, InjectedError, Removal, UncorrectableError,
};

const EXPRESS: u32 = 0x10;
const PRESENT: u32 = 1 << 6;
const LINK: u32 = 1 << 13;

/// A root port with an empty slot, in slot 1, found and turned on by its driver.
struct Rig {
    machine: Machine,
    port: Arc<Port>,
    slot: Arc<dyn HotplugSlot>,
    ejects: Arc<Ejects>,
    controller: FakeController,
    express: u64,
    interrupts: usize,
}

const PORT: At = At(0, 1 << 3);

fn rig() -> Rig {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let ejects = Arc::new(Ejects::default());
    let port = port(
        &machine,
        "rp0",
        PortModel::RootPort,
        Some(&ejects),
        &controller,
    );
    machine.bridge.attach(Some(1), port.clone()).unwrap();
    machine.bridge.assign_bars().unwrap();
    // One vector, unmasked.
    let msix = PORT.capability(&machine, 0x11);
    let table = u64::from(PORT.read(&machine, 0x10, 4));
    machine.store(table, 8, 0xfee0_0000);
    machine.store(table + 8, 4, 0x31);
    machine.store(table + 12, 4, 0);
    PORT.write(&machine, msix + 2, 2, 0x8000);
    let express = PORT.capability(&machine, EXPRESS);
    let mut rig = Rig {
        slot: port.slot().unwrap(),
        port,
        ejects,
        controller,
        express,
        machine,
        interrupts: 0,
    };
    let enables = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 12;
    let control = rig.control();
    rig.command(control | enables);
    rig.acknowledge();
    rig
}

impl Rig {
    fn control(&self) -> u32 {
        PORT.read(&self.machine, self.express + 0x18, 2)
    }

    fn status(&self) -> u32 {
        PORT.read(&self.machine, self.express + 0x1a, 2)
    }

    fn link(&self) -> bool {
        PORT.read(&self.machine, self.express + 0x12, 2) & LINK != 0
    }

    fn command(&self, value: u32) {
        PORT.write(&self.machine, self.express + 0x18, 2, value);
    }

    /// Reads and clears events.
    fn acknowledge(&mut self) -> u32 {
        self.interrupts += self.messages();
        let events = self.status() & !PRESENT;
        PORT.write(&self.machine, self.express + 0x1a, 2, events);
        events
    }

    fn messages(&self) -> usize {
        let delivered = self.controller.route_of(0).delivered();
        let expected = MsiMessage {
            address: 0xfee0_0000,
            data: 0x31,
        };
        assert!(delivered.iter().all(|it| *it == expected));
        delivered.len()
    }

    fn plug(&self) -> Arc<Device> {
        let device = Device::new("disk", &self.controller);
        self.port.bus().attach(None, device.clone()).unwrap();
        self.slot.plugged();
        device
    }
}

#[test]
fn registers_say_what_the_port_is() {
    let rig = rig();
    let read = |offset, size| PORT.read(&rig.machine, rig.express + offset, size);
    assert_eq!(PORT.read(&rig.machine, 0x0e, 1), 1, "type 1");
    assert_eq!(PORT.read(&rig.machine, 8, 4) >> 8, 0x06_04_00);
    assert_eq!(
        read(2, 2),
        2 | 4 << 4 | 1 << 8,
        "version 2, root port, slot, message 0"
    );
    assert_eq!(
        read(0x0c, 4),
        0x0010_0104,
        "link: 16 GT/s, 16 lanes, activity is reported"
    );
    assert_eq!(
        read(0x14, 4) & 0x7ffff,
        0x5b,
        "button, power, indicators, hot-plug; no surprise"
    );
    assert_eq!(
        PORT.read(&rig.machine, 0x100, 4),
        0x0002_0001,
        "advanced error reporting"
    );
    for (model, kind) in [
        (PortModel::Ioh3420, 4),
        (PortModel::X3130Upstream, 5),
        (PortModel::Xio3130Downstream, 6),
    ] {
        let port = port(&rig.machine, "p", model, Some(&rig.ejects), &rig.controller);
        let express = port.config().express.unwrap();
        let slot = u32::from(model.has_slot());
        assert_eq!(
            port.config().read(express + 2, 2),
            2 | kind << 4 | slot << 8,
            "{model:?}"
        );
        assert_eq!(port.slot().is_some(), model.has_slot());
    }
    let quiet = port(
        &rig.machine,
        "p",
        PortModel::RootPort,
        None,
        &rig.controller,
    );
    let express = quiet.config().express.unwrap();
    assert_eq!(quiet.config().read(express + 0x14, 4) & 0x7ffff, 0);
    assert!(quiet.slot().is_none());
    assert_eq!(quiet.request_removal(), Err(HotplugError::NotHotpluggable));
}

/// The whole life of a device in a slot, by the guest's registers and the control thread's handle only.
#[test]
fn a_device_comes_and_goes() {
    let mut rig = rig();
    assert_eq!((rig.status(), rig.link(), rig.messages()), (0, false, 0));
    let device = rig.plug();
    assert_eq!(rig.messages(), 1);
    assert_eq!(rig.acknowledge(), 1 << 3 | 1 << 8);
    assert_eq!((rig.status(), rig.link()), (PRESENT, true));
    rig.command(rig.control() & !(1 << 10));
    rig.command(rig.control() & !(3 << 8) | 1 << 8);
    rig.acknowledge();
    rig.interrupts = 0;
    assert_eq!(At(1, 0).read(&rig.machine, 0, 4), 0x5678_1234);

    assert_eq!(rig.slot.request_removal(), Ok(Removal::Asked));
    assert_eq!(rig.acknowledge(), 1);
    rig.command(rig.control() & !(3 << 8) | 2 << 8);
    rig.acknowledge();
    assert_eq!(rig.slot.request_removal(), Err(HotplugError::GuestBusy));
    rig.command(rig.control() | 1 << 10);
    rig.acknowledge();
    assert!(rig.ejects.take().is_empty());
    rig.command(rig.control() | 3 << 8);
    assert_eq!(rig.ejects.take(), ["rp0 slot 0"]);
    assert_eq!(rig.status(), PRESENT | 1 << 4, "completed at once");
    assert!(!rig.link());
    rig.acknowledge();

    device.config().gate().close();
    let zero = Devfn::new(0, 0).unwrap();
    rig.port.bus().detach_at(zero).unwrap();
    rig.slot.detached();
    assert_eq!(rig.acknowledge(), 1 << 3 | 1 << 8);
    assert_eq!((rig.status(), rig.link()), (0, false));
    assert_eq!(rig.interrupts, 5, "button, three commands, gone");
    assert!(rig.ejects.take().is_empty());
}

/// What one port sees come and go ten thousand times is the same each time, and nothing of it is left.
#[test]
fn ten_thousand_devices_come_and_go() {
    const CYCLES: usize = 10_000;
    let mut rig = rig();
    let memory_base = u64::from(PORT.read(&rig.machine, 0x20, 2) & 0xfff0) << 16;
    let zero = Devfn::new(0, 0).unwrap();
    let empty = rig.machine.memory.mtree(true);
    let mut devices = Vec::new();
    for cycle in 0..CYCLES {
        let device = Device::new("disk", &FakeController::default());
        rig.port.bus().attach(None, device.clone()).unwrap();
        rig.slot.plugged();
        assert_eq!(rig.acknowledge(), 1 << 3 | 1 << 8, "cycle {cycle}");
        rig.command(rig.control() & !(1 << 10));
        rig.command(rig.control() & !(3 << 8) | 1 << 8);
        At(1, 0).write(&rig.machine, 0x10, 4, memory_base as u32);
        At(1, 0).write(&rig.machine, COMMAND, 2, MEMORY);
        assert_eq!(rig.machine.load(memory_base, 4), 0xb0, "cycle {cycle}");

        assert_eq!(rig.slot.request_removal(), Ok(Removal::Asked));
        rig.command(rig.control() | 1 << 10);
        rig.command(rig.control() | 3 << 8);
        assert_eq!(rig.ejects.take(), ["rp0 slot 0"], "cycle {cycle}");
        device.config().gate().close();
        assert_eq!(rig.machine.load(memory_base, 4), 0xffff_ffff);
        rig.port.bus().unmap(zero).unwrap();
        drop(rig.port.bus().detach_at(zero).unwrap());
        rig.slot.detached();
        rig.acknowledge();
        assert_eq!((rig.status(), rig.link()), (0, false), "cycle {cycle}");
        devices.push(Arc::downgrade(&device));
    }
    assert_eq!(rig.machine.memory.mtree(true), empty);
    let left = devices.iter().filter(|it| it.strong_count() > 0).count();
    assert_eq!(left, 0, "functions that nobody lets go of");
}

/// Whole switches come and go in one port; nothing of them is left.
#[test]
fn switches_come_and_go() {
    const CYCLES: usize = 200;
    let mut rig = rig();
    let zero = Devfn::new(0, 0).unwrap();
    let empty = rig.machine.memory.mtree(true);
    let (mut ports, mut devices) = (Vec::new(), Vec::new());
    for cycle in 0..CYCLES {
        let controller = FakeController::default();
        let new = |name, model| port(&rig.machine, name, model, Some(&rig.ejects), &controller);
        let up = new("up0", PortModel::X3130Upstream);
        let down = new("down0", PortModel::Xio3130Downstream);
        let device = Device::new("disk", &controller);
        down.bus().attach(None, device.clone()).unwrap();
        up.bus().attach(None, down.clone()).unwrap();
        rig.port.bus().attach(None, up.clone()).unwrap();
        rig.slot.plugged();
        assert_eq!(rig.acknowledge(), 1 << 3 | 1 << 8, "cycle {cycle}");
        rig.command(rig.control() & !(1 << 10));
        rig.command(rig.control() & !(3 << 8) | 1 << 8);
        let found = scan(&rig.machine, 0, 255);
        assert_eq!(flat(&found).len(), 5, "cycle {cycle}: up to the disk");

        assert_eq!(rig.slot.request_removal(), Ok(Removal::Asked));
        rig.command(rig.control() | 1 << 10);
        rig.command(rig.control() | 3 << 8);
        assert_eq!(rig.ejects.take(), ["rp0 slot 0"], "of the top only");
        for below in rig.port.bus().functions_below() {
            below.config().gate().close();
        }
        for bus in [down.bus(), up.bus(), rig.port.bus()] {
            bus.unmap(zero).unwrap();
            drop(bus.detach_at(zero).unwrap());
        }
        rig.slot.detached();
        rig.acknowledge();
        ports.extend([Arc::downgrade(&up), Arc::downgrade(&down)]);
        devices.push(Arc::downgrade(&device));
    }
    assert_eq!(rig.machine.memory.mtree(true), empty);
    let ports = ports.iter().filter(|it| it.strong_count() > 0).count();
    let devices = devices.iter().filter(|it| it.strong_count() > 0).count();
    assert_eq!((ports, devices), (0, 0), "nobody lets go of them");
}

/// A switch that is put together in its slot is not there, for a scan, firmware or the slot, until it is shown; then all of
/// it is, and ready for more.
#[test]
fn a_switch_is_put_together_out_of_sight() {
    let mut rig = rig();
    let zero = Devfn::new(0, 0).unwrap();
    let controller = FakeController::default();
    let new = |name, model| port(&rig.machine, name, model, Some(&rig.ejects), &controller);
    let before = flat(&scan(&rig.machine, 0, 255)).len();
    let up = new("up0", PortModel::X3130Upstream);
    rig.port.bus().attach_hidden_at(zero, up.clone()).unwrap();
    let downstream = ["down0", "down1"].map(|name| new(name, PortModel::Xio3130Downstream));
    for down in &downstream {
        up.bus().attach(None, down.clone()).unwrap();
    }
    let device = Device::new("disk", &controller);
    downstream[0].bus().attach(None, device.clone()).unwrap();
    downstream[0].slot().unwrap().plugged();

    assert_eq!(flat(&scan(&rig.machine, 0, 255)).len(), before);
    assert!(!rig.slot.state().occupied && rig.port.bus().shown().is_empty());
    rig.machine.bridge.assign_bars().unwrap();
    assert_eq!(rig.acknowledge(), 0, "nothing has happened");
    assert_eq!(up.config().bridge().unwrap().secondary(), 0);
    assert_eq!(rig.slot.request_removal(), Err(HotplugError::Empty));

    rig.port.bus().show(zero);
    rig.slot.plugged();
    assert_eq!(rig.acknowledge(), 1 << 3 | 1 << 8);
    rig.command(rig.control() & !(1 << 10));
    rig.command(rig.control() & !(3 << 8) | 1 << 8);
    assert_eq!(flat(&scan(&rig.machine, 0, 255)).len(), before + 4);
    let state = |port: &Arc<Port>| port.slot().unwrap().state();
    assert!(state(&downstream[0]).powered && state(&downstream[0]).occupied);
    assert!(!state(&downstream[1]).powered && !state(&downstream[1]).occupied);
}

#[test]
fn what_was_there_at_boot_is_no_event() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let ejects = Arc::new(Ejects::default());
    let port = port(
        &machine,
        "rp0",
        PortModel::RootPort,
        Some(&ejects),
        &controller,
    );
    machine.bridge.attach(Some(1), port.clone()).unwrap();
    let device = Device::new("disk", &controller);
    port.bus().attach(None, device.clone()).unwrap();
    port.slot().unwrap().plugged();
    machine.bridge.assign_bars().unwrap();
    let express = PORT.capability(&machine, EXPRESS);
    let look = || {
        (
            PORT.read(&machine, express + 0x18, 4),
            port.slot().unwrap().state().powered,
        )
    };
    assert_eq!(look(), (PRESENT << 16 | 3 << 6 | 1 << 8, true));
    // The next guest, after what was there has gone.
    PORT.write(&machine, express + 0x18, 2, 0);
    device.config().gate().close();
    machine.bridge.reset();
    machine.bridge.assign_bars().unwrap();
    assert_eq!(look(), (3 << 6 | 3 << 8 | 1 << 10, false));
    assert!(ejects.take().is_empty());
}

#[test]
fn a_port_that_is_removed_itself_says_so() {
    let rig = rig();
    rig.plug();
    rig.port.config().gate().close();
    let before = rig.slot.state();
    assert_eq!(rig.slot.request_removal(), Err(HotplugError::PortRemoved));
    rig.slot.detached();
    rig.slot.cancel();
    assert_eq!(rig.slot.state(), before);
}

#[test]
fn status_and_control_written_together_and_byte_by_byte() {
    let rig = rig();
    rig.plug();
    let at = rig.express + 0x18;
    PORT.write(&rig.machine, at, 4, 0xffff_0000 | 1 << 8);
    assert_eq!(
        rig.status(),
        PRESENT | 1 << 4,
        "old events cleared, the command's own is new"
    );
    assert_eq!(rig.control(), 3 << 6 | 1 << 8);
    PORT.write(&rig.machine, at + 2, 1, 1 << 4);
    assert_eq!(rig.status(), PRESENT);
    PORT.write(&rig.machine, at + 1, 1, 3 | 4);
    assert_eq!(
        rig.ejects.take(),
        ["rp0 slot 0"],
        "power and indicator in one write"
    );
    assert_eq!(rig.control(), 3 << 6 | 3 << 8 | 1 << 10);
}

#[test]
fn errors_reach_the_root_port_and_interrupt() {
    let rig = rig();
    let machine = &rig.machine;
    let upstream = port(
        machine,
        "up0",
        PortModel::X3130Upstream,
        None,
        &rig.controller,
    );
    rig.port.bus().attach(None, upstream).unwrap();
    scan(machine, 0, 255);
    let (root, inner) = (PORT, At(1, 0));
    let express = inner.capability(machine, EXPRESS);
    let bad = InjectedError::Correctable(CorrectableError::BadTlp);
    let malformed =
        InjectedError::Uncorrectable(UncorrectableError::MalformedTlp, [1, 2, 3, 0x0405_0607]);
    let zero = Devfn::new(0, 0).unwrap();
    let inject = |error| machine.bridge.inject_error(1, zero, error).unwrap();
    let aer = |at: At, offset| at.read(machine, 0x100 + offset, 4);

    // Nothing is enabled: status only.
    inject(bad);
    assert_eq!((aer(inner, 0x10), aer(root, 0x30)), (1 << 6, 0));
    assert_eq!(inner.read(machine, express + 0x0a, 2), 1);
    // Reported, but the bridge above does not forward.
    inner.write(machine, express + 8, 2, 0x0f);
    inject(bad);
    assert_eq!(aer(root, 0x30), 0);
    assert_eq!(
        root.read(machine, 0x1e, 2),
        1 << 14,
        "received on the secondary side"
    );
    root.write(machine, 0x3e, 2, 2);
    inject(bad);
    assert_eq!((aer(root, 0x30), aer(root, 0x34)), (1, 0x0100));
    assert_eq!(rig.messages(), 0, "no interrupt was asked for");
    root.write(machine, 0x100 + 0x2c, 4, 7);
    inject(bad);
    assert_eq!((aer(root, 0x30), rig.messages()), (3, 1), "several");
    inject(malformed);
    assert_eq!(aer(inner, 0x04), 1 << 18);
    assert_eq!(aer(inner, 0x18) & 0x1f, 18, "the first error");
    assert_eq!(
        [0x1c, 0x20, 0x24, 0x28].map(|at| aer(inner, at)),
        [1, 2, 3, 0x0405_0607]
    );
    assert_eq!(aer(root, 0x30), 3 | 1 << 2 | 1 << 4 | 1 << 6, "fatal");
    assert_eq!((aer(root, 0x34), rig.messages()), (0x0100_0100, 1));
    // A second one does not overwrite the first one's header; masked, it is not reported.
    inner.write(machine, 0x108, 4, 1 << 20);
    inject(InjectedError::Uncorrectable(
        UncorrectableError::UnsupportedRequest,
        [9; 4],
    ));
    assert_eq!(
        (aer(inner, 0x04), aer(inner, 0x1c), rig.messages()),
        (1 << 18 | 1 << 20, 1, 0)
    );
    // The guest clears everything.
    for (at, offset) in [(inner, 4), (inner, 0x10), (root, 0x30)] {
        at.write(machine, 0x100 + offset, 4, u32::MAX);
        assert_eq!(aer(at, offset), 0);
    }
    // The root port's own.
    let express = rig.express;
    root.write(machine, express + 8, 2, 0x0f);
    machine
        .bridge
        .inject_error(0, Devfn::new(1, 0).unwrap(), bad)
        .unwrap();
    assert_eq!(
        (aer(root, 0x10), aer(root, 0x30), aer(root, 0x34) & 0xffff),
        (1 << 6, 1, 0x0008)
    );
    assert_eq!(rig.messages(), 1);
    // What cannot report, or is not there.
    assert!(machine.bridge.inject_error(0, zero, bad).is_err());
    let error = machine.bridge.inject_error(7, zero, bad).unwrap_err();
    assert_eq!(
        error.to_string(),
        "07:00.0 has no advanced error reporting, or there is no such function"
    );
}

/// Every register of every model, every width, any value: nothing panics, and power-on is as it was.
#[test]
fn any_write_is_harmless() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let ejects = Arc::new(Ejects::default());
    let new = |name, model| port(&machine, name, model, Some(&ejects), &controller);
    let root = new("rp0", PortModel::RootPort);
    machine.bridge.attach(Some(1), root.clone()).unwrap();
    let up = new("up0", PortModel::X3130Upstream);
    root.bus().attach(None, up.clone()).unwrap();
    let down = new("down0", PortModel::Xio3130Downstream);
    up.bus().attach(None, down.clone()).unwrap();
    down.bus()
        .attach(None, Device::new("disk", &controller))
        .unwrap();
    let conventional = new("pci.1", PortModel::PciBridge);
    machine
        .bridge
        .attach(Some(2), conventional.clone())
        .unwrap();
    conventional
        .bus()
        .attach(None, Device::new("disk1", &controller))
        .unwrap();
    machine.bridge.reset();
    machine.bridge.assign_bars().unwrap();
    let all = [PORT, At(1, 0), At(2, 0), At(3, 0), At(0, 2 << 3)];
    let snapshot = || -> Vec<u32> {
        let registers = (0..4096).step_by(4);
        all.iter()
            .flat_map(|at| registers.clone().map(|it| at.read(&machine, it, 4)))
            .collect()
    };
    let start = snapshot();
    let ports: Vec<Arc<dyn Function>> = vec![root.clone(), up, down.clone(), conventional];
    for function in &ports {
        for register in 0..4096 {
            for size in [1, 2, 4] {
                if register % 4 + u16::from(size) > 4 {
                    continue;
                }
                for value in [0, u32::MAX, 0x5555_5555, 0xaaaa_aaaa, 0xc000_d000] {
                    function.write_config(register, size, value);
                    function.read_config(register, size);
                }
            }
        }
    }
    let mut random = Random(7);
    let slots = [root.slot().unwrap(), down.slot().unwrap()];
    for _ in 0..20_000 {
        let (choice, value) = (random.next(), random.next());
        let slot = &slots[choice as usize >> 3 & 1];
        match choice & 31 {
            0 => slot.plugged(),
            1 => drop(slot.request_removal()),
            2 => slot.cancel(),
            3 => slot.detached(),
            _ => {
                let function = &ports[choice as usize >> 5 & 3];
                let register = match choice >> 8 & 3 {
                    0 => choice >> 16 & 0xfff,
                    _ => choice >> 16 & 0xff,
                } as u16;
                let size = [1, 2, 4, 4][choice as usize >> 12 & 3];
                let register = register & !(u16::from(size) - 1);
                function.write_config(register, size, value as u32);
                machine.ecam.write(value & 0x0fff_fffc, 4, choice);
                machine.load(value & 0x1f_ffff_fffc, 4);
            }
        }
    }
    assert!(
        ejects
            .take()
            .iter()
            .all(|it| it == "rp0 slot 0" || it == "down0 slot 0")
    );
    machine.bridge.reset();
    machine.bridge.assign_bars().unwrap();
    assert_eq!(snapshot(), start);
}
