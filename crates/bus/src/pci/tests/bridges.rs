// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bridges: what is found behind them, what they forward, what is kept free.

use std::ops::Range;

use super::enumerator::{check_resources, flat, place, scan};
use super::*;
use crate::pci::fakes::windows;
use crate::pci::{BusKind, Devfn, PciError, Reservation, Windows};

const ROOT_PORT: u32 = 0x000c_1b36;
const UPSTREAM: u32 = 0x8232_104c;
const DOWNSTREAM: u32 = 0x8233_104c;
const DEVICE: u32 = 0x5678_1234;

/// Root port rp0 in slot 1, a switch with two ports behind it, a device behind each; a device in slot 3.
struct Switch {
    machine: Machine,
    root_port: Arc<Port>,
    upstream: Arc<Port>,
    downstream: Vec<Arc<Port>>,
    devices: Vec<Arc<Device>>,
    ejects: Arc<Ejects>,
    controller: FakeController,
}

fn switch() -> Switch {
    let (machine, _, controller) = machine();
    let ejects = Arc::new(Ejects::default());
    let new = |name, model| port(&machine, name, model, Some(&ejects), &controller);
    let root_port = new("rp0", PortModel::RootPort);
    machine.bridge.attach(Some(1), root_port.clone()).unwrap();
    let upstream = new("up0", PortModel::X3130Upstream);
    root_port.bus().attach(None, upstream.clone()).unwrap();
    let (mut downstream, mut devices) = (Vec::new(), Vec::new());
    for name in ["down0", "down1"] {
        let port = new(name, PortModel::Xio3130Downstream);
        upstream.bus().attach(None, port.clone()).unwrap();
        let device = Device::new(&format!("{name}-disk"), &controller);
        port.bus().attach(None, device.clone()).unwrap();
        downstream.push(port);
        devices.push(device);
    }
    Switch {
        machine,
        root_port,
        upstream,
        downstream,
        devices,
        ejects,
        controller,
    }
}

fn root_windows() -> [Range<u64>; 2] {
    [windows().mmio32, windows().mmio64]
}

#[test]
fn a_switch_is_found_with_all_that_is_behind_it() {
    let switch = switch();
    switch.machine.bridge.assign_bars().unwrap();
    let found = scan(&switch.machine, 0, 255);
    check_resources(&found, &root_windows());
    let all: Vec<_> = flat(&found).iter().map(|it| (it.at, it.ids)).collect();
    let expected = [
        (At(0, 0), 0x0008_1b36),
        (At(0, 1 << 3), ROOT_PORT),
        (At(1, 0), UPSTREAM),
        (At(2, 0), DOWNSTREAM),
        (At(3, 0), DEVICE),
        (At(2, 1 << 3), DOWNSTREAM),
        // Eight numbers are kept for each downstream port.
        (At(11, 0), DEVICE),
        (At(0, 3 << 3), DEVICE),
    ];
    assert_eq!(all, expected);
    assert_eq!(switch.machine.bridge.highest_bus_in_use(), 18);
    // The guest changed nothing, and every BAR answers where it says.
    for function in flat(&found).iter().filter(|it| it.ids == DEVICE) {
        let values: Vec<_> = function
            .bars
            .iter()
            .map(|bar| switch.machine.load(bar.end - 8, 4))
            .collect();
        assert_eq!((values[0], values[2]), (0xb0, 0xb2), "{function:?}");
    }
}

#[test]
fn ports_lead_behind_bridges_too() {
    let switch = switch();
    switch.machine.bridge.assign_bars().unwrap();
    let ports = &switch.machine.ports;
    ports.write(0, 4, 0x8000_0000 | 11 << 16);
    assert_eq!(ports.read(4, 4), u64::from(DEVICE));
    ports.write(0, 4, 0x8000_0000 | 11 << 16 | 0x3c);
    ports.write(4, 1, 0x5a);
    assert_eq!(At(11, 0).read(&switch.machine, 0x3c, 1), 0x5a);
    for nowhere in [At(11, 1 << 3), At(12, 0), At(19, 0), At(255, 0)] {
        assert_eq!(nowhere.read(&switch.machine, 0, 4), u32::MAX, "{nowhere:?}");
    }
}

#[test]
fn bus_numbers_are_the_guests_to_choose() {
    let switch = switch();
    let machine = &switch.machine;
    assert_eq!(At(1, 0).read(machine, 0, 4), u32::MAX, "no numbers yet");
    let rp = At(0, 1 << 3);
    rp.write(machine, 0x18, 4, 0x00f0_8000);
    assert_eq!(At(0x80, 0).read(machine, 0, 4), UPSTREAM);
    At(0x80, 0).write(machine, 0x18, 4, 0x00c0_b080);
    assert_eq!(At(0xb0, 1 << 3).read(machine, 0, 4), DOWNSTREAM);
    assert_eq!(At(0xb0, 2 << 3).read(machine, 0, 4), u32::MAX);
    // Numbers beyond those of the bridge above are out of reach.
    At(0xb0, 0).write(machine, 0x18, 4, 0x00ff_f1b0);
    assert_eq!(At(0xf1, 0).read(machine, 0, 4), u32::MAX);
    // Any numbers at all do no harm, also those that name the bus above.
    for numbers in [
        0,
        0x0000_0080,
        0x00ff_0000,
        0x0000_ff00,
        u32::MAX,
        0x0080_8080,
    ] {
        At(0x80, 0).write(machine, 0x18, 4, numbers);
        (0..=255).for_each(|bus| {
            At(bus, 0).read(machine, 0, 4);
        });
    }
}

#[test]
fn a_bar_answers_only_inside_of_every_window_above() {
    let switch = switch();
    let machine = &switch.machine;
    machine.bridge.assign_bars().unwrap();
    let bars = switch.devices[0].config().bars();
    let (narrow, wide) = (bars[0].address, bars[2].address);
    let answers = || (machine.load(narrow, 4), machine.load(wide, 4));
    assert_eq!(answers(), (0xb0, 0xb2));
    let nothing = 0xffff_ffff;
    // Each of the three bridges on the way: memory off, then the windows closed one by one.
    for bridge in [At(0, 1 << 3), At(1, 0), At(2, 0)] {
        let (memory, prefetchable) = (bridge.read(machine, 0x20, 4), bridge.read(machine, 0x24, 4));
        bridge.write(machine, COMMAND, 2, 0);
        assert_eq!(answers(), (nothing, nothing), "{bridge:?}");
        bridge.write(machine, COMMAND, 2, 6);
        assert_eq!(answers(), (0xb0, 0xb2), "{bridge:?}");
        bridge.write(machine, 0x20, 4, 0x0000_fff0);
        assert_eq!(answers(), (nothing, 0xb2), "{bridge:?}");
        bridge.write(machine, 0x20, 4, memory);
        bridge.write(machine, 0x24, 4, 0x0000_fff0);
        bridge.write(machine, 0x2c, 4, 0);
        assert_eq!(answers(), (0xb0, nothing), "{bridge:?}");
        bridge.write(machine, 0x24, 4, prefetchable);
        bridge.write(machine, 0x2c, 4, (wide >> 32) as u32);
        assert_eq!(answers(), (0xb0, 0xb2), "{bridge:?}");
    }
    // Just above a window's limit, and just below.
    At(3, 0).write(machine, 0x18, 4, (wide as u32 & !0x1f_ffff) | 0x10_0000);
    let moved = switch.devices[0].config().bars()[2].address;
    At(2, 0).write(machine, 0x26, 2, (moved >> 16) as u32 - 0x10);
    assert_eq!(machine.load(moved, 4), nothing);
    At(2, 0).write(machine, 0x26, 2, (moved >> 16) as u32);
    assert_eq!(machine.load(moved, 4), 0xb2);
    // Outside of the windows of the host bridge nothing is decoded, whatever a bridge forwards.
    let rp = At(0, 1 << 3);
    rp.write(machine, 0x20, 4, 0xfff0_0000);
    At(1, 0).write(machine, 0x20, 4, 0xfff0_0000);
    At(2, 0).write(machine, 0x20, 4, 0xfff0_0000);
    At(3, 0).write(machine, 0x10, 4, 0x9000_0000);
    assert_eq!(machine.load(0x9000_0000, 4), nothing);
    At(3, 0).write(machine, 0x10, 4, 0xd000_0000);
    assert_eq!(machine.load(0xd000_0000, 4), 0xb0);
}

#[test]
fn addresses_are_kept_over_a_reset() {
    let switch = switch();
    let machine = &switch.machine;
    let power_on = scan(machine, 0, 255);
    machine.bridge.reset();
    machine.bridge.assign_bars().unwrap();
    let assigned = scan(machine, 0, 255);
    assert_ne!(power_on, assigned);
    machine.bridge.reset();
    assert!(
        switch
            .devices
            .iter()
            .all(|it| it.config().bars().iter().all(|bar| !bar.mapped))
    );
    assert_eq!(At(1, 0).read(machine, 0, 4), u32::MAX);
    machine.bridge.assign_bars().unwrap();
    assert_eq!(scan(machine, 0, 255), assigned);
}

#[test]
fn what_comes_later_finds_room_behind_its_port() {
    let switch = switch();
    let machine = &switch.machine;
    let empty = port(
        machine,
        "rp1",
        PortModel::Ioh3420,
        Some(&switch.ejects),
        &switch.controller,
    );
    machine.bridge.attach(Some(2), empty.clone()).unwrap();
    machine.bridge.assign_bars().unwrap();
    let before = scan(machine, 0, 255);
    let behind = before
        .iter()
        .find(|it| it.at == At(0, 2 << 3))
        .unwrap()
        .behind
        .clone()
        .unwrap();
    assert_eq!(behind.buses.1 - behind.buses.0, 7);
    let size = |window: &Option<Range<u64>>| window.as_ref().map(|it| it.end - it.start);
    assert_eq!(
        behind.windows.each_ref().map(size),
        [Some(16 << 20), Some(1 << 30)]
    );
    let device = Device::new("late", &switch.controller);
    empty.bus().attach(None, device).unwrap();
    let at = At(behind.buses.0, 0);
    assert_eq!(at.read(machine, 0, 4), DEVICE);
    let placed = place(machine, at, &behind.windows);
    assert_eq!(machine.load(placed[0], 4), 0xb0);
    assert_eq!(machine.load(placed[2], 4), 0xb2);
    check_resources(&scan(machine, 0, 255), &root_windows());
}

#[test]
fn a_whole_switch_may_come_later() {
    let (machine, _, controller) = machine();
    let ejects = Arc::new(Ejects::default());
    let new = |name, model| port(&machine, name, model, Some(&ejects), &controller);
    let root_port = new("rp0", PortModel::RootPort);
    machine.bridge.attach(Some(1), root_port.clone()).unwrap();
    machine.bridge.assign_bars().unwrap();
    let upstream = new("up0", PortModel::X3130Upstream);
    root_port.bus().attach(None, upstream.clone()).unwrap();
    for name in ["down0", "down1", "down2"] {
        let down = new(name, PortModel::Xio3130Downstream);
        upstream.bus().attach(None, down.clone()).unwrap();
        down.bus()
            .attach(None, Device::new(name, &controller))
            .unwrap();
    }
    root_port.slot().unwrap().plugged();
    let ids: Vec<_> = flat(&scan(&machine, 0, 255))
        .iter()
        .map(|it| (it.at, it.ids))
        .collect();
    let expected = [
        (At(0, 0), 0x0008_1b36),
        (At(0, 1 << 3), ROOT_PORT),
        (At(1, 0), UPSTREAM),
        (At(2, 0), DOWNSTREAM),
        (At(3, 0), DEVICE),
        (At(2, 1 << 3), DOWNSTREAM),
        (At(4, 0), DEVICE),
        (At(2, 2 << 3), DOWNSTREAM),
        (At(5, 0), DEVICE),
        (At(0, 3 << 3), DEVICE),
    ];
    assert_eq!(ids, expected);
}

/// What is inside of something that is plugged is on, and no event: it came with it.
#[test]
fn slots_of_what_is_plugged_are_as_at_power_on() {
    let switch = switch();
    let states = |switch: &Switch| {
        let ports = switch.downstream.iter();
        let all: Vec<_> = ports.map(|it| it.slot().unwrap().state()).collect();
        all.iter()
            .map(|it| (it.occupied, it.powered))
            .collect::<Vec<_>>()
    };
    assert_eq!(states(&switch), [(false, false); 2]);
    switch.root_port.slot().unwrap().plugged();
    assert_eq!(states(&switch), [(true, true); 2]);
    for port in &switch.downstream {
        let express = port.config().express.unwrap();
        assert_eq!(
            port.config().read(express + 0x1a, 2),
            1 << 6,
            "present, no event"
        );
    }
}

#[test]
fn a_closed_gate_hides_everything_behind_it() {
    let switch = switch();
    let machine = &switch.machine;
    machine.bridge.assign_bars().unwrap();
    let below = switch.upstream.bus().functions_below();
    let names: Vec<_> = below
        .iter()
        .map(|it| it.config().gate().name().to_owned())
        .collect();
    assert_eq!(
        names,
        ["down0-disk", "down0", "down1-disk", "down1"],
        "children first"
    );
    let address = switch.devices[1].config().bars()[0].address;
    switch.upstream.config().gate().close();
    assert_eq!(At(1, 0).read(machine, 0, 4), u32::MAX);
    assert_eq!(At(2, 0).read(machine, 0, 4), u32::MAX, "no way through");
    assert_eq!(At(11, 0).read(machine, 0, 4), u32::MAX);
    assert!(!switch.root_port.bus().is_occupied(0));
    below.iter().for_each(|it| {
        it.config().gate().close();
    });
    assert_eq!(machine.load(address, 4), 0xffff_ffff);
}

#[test]
fn a_subtree_is_taken_apart_from_below() {
    let switch = switch();
    let machine = &switch.machine;
    machine.bridge.assign_bars().unwrap();
    let empty_map = {
        let bare = Switch {
            machine: Machine::new(),
            ..self::switch()
        };
        bare.machine.memory.mtree(true)
    };
    let zero = Devfn::new(0, 0).unwrap();
    for function in switch.root_port.bus().functions_below() {
        function.config().gate().close();
    }
    let refused = switch.root_port.bus().detach_at(zero);
    assert!(
        matches!(refused, Err(PciError::NotEmpty { .. })),
        "{:?}",
        refused.err()
    );
    for (slot, port) in switch.downstream.iter().enumerate() {
        port.bus().detach_at(zero).unwrap();
        switch
            .upstream
            .bus()
            .detach_at(Devfn::new(slot as u8, 0).unwrap())
            .unwrap();
    }
    switch.root_port.bus().detach_at(zero).unwrap();
    assert!(switch.root_port.bus().is_empty());
    switch.root_port.config().gate().close();
    machine.bridge.detach(1).unwrap();
    // Slot 3 is the only one left.
    let device = machine
        .bridge
        .bus()
        .function(Devfn::new(3, 0).unwrap())
        .unwrap();
    device.config().gate().close();
    machine.bridge.detach(3).unwrap();
    assert_eq!(machine.memory.mtree(true), empty_map);
    for port in switch
        .downstream
        .iter()
        .chain([&switch.upstream, &switch.root_port])
    {
        assert_eq!(
            Arc::strong_count(port),
            1,
            "{}",
            port.config().gate().name()
        );
    }
}

#[test]
fn only_what_belongs_there_is_on_a_bus() {
    let switch = switch();
    let new = |model| port(&switch.machine, "p", model, None, &switch.controller);
    let refused = |bus: &crate::pci::Bus, function: Arc<dyn Function>| {
        let error = bus.attach(None, function).unwrap_err();
        assert!(matches!(error, PciError::WrongBus { .. }), "{error}");
    };
    let root = switch.machine.bridge.bus();
    refused(root, new(PortModel::X3130Upstream));
    refused(root, new(PortModel::Xio3130Downstream));
    refused(
        switch.upstream.bus(),
        Device::new("disk", &switch.controller),
    );
    refused(switch.upstream.bus(), new(PortModel::RootPort));
    let empty = new(PortModel::RootPort);
    refused(empty.bus(), new(PortModel::Ioh3420));
    refused(empty.bus(), new(PortModel::Xio3130Downstream));
    let error = empty
        .bus()
        .attach(Some(1), Device::new("disk", &switch.controller))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "pci slot 1 does not exist on p: a link has slot 0 only"
    );
    for model in PortModel::ALL {
        assert_eq!(PortModel::from_name(model.name()), Some(model));
    }
    assert_eq!(PortModel::from_name("pcie-pci-bridge"), None);
}

#[test]
fn conventional_buses_have_many_slots_and_little_configuration_space() {
    let (machine, _, controller) = machine();
    let outer = port(&machine, "dmi", PortModel::I82801b11, None, &controller);
    machine.bridge.attach(Some(30), outer.clone()).unwrap();
    let inner = port(&machine, "pci.1", PortModel::PciBridge, None, &controller);
    outer.bus().attach(Some(7), inner.clone()).unwrap();
    assert_eq!(inner.bus().kind(), BusKind::Conventional);
    for slot in [0, 31] {
        inner
            .bus()
            .attach(Some(slot), Device::new("disk", &controller))
            .unwrap();
    }
    machine.bridge.assign_bars().unwrap();
    let found = scan(&machine, 0, 255);
    check_resources(&found, &root_windows());
    let all: Vec<_> = flat(&found).iter().map(|it| it.at).collect();
    let expected = [
        At(0, 0),
        At(0, 3 << 3),
        At(0, 30 << 3),
        At(1, 7 << 3),
        At(2, 0),
        At(2, 31 << 3),
    ];
    assert_eq!(all, expected);
    assert_eq!(At(2, 0).read(&machine, 0x100, 4), u32::MAX);
    assert_eq!(At(1, 7 << 3).read(&machine, 0x100, 4), u32::MAX);
    assert_eq!(
        At(0, 30 << 3).read(&machine, 0x100, 4),
        0,
        "no extended capability"
    );
    assert_eq!(machine.load(flat(&found)[5].bars[0].start, 4), 0xb0);
}

#[test]
fn requests_reach_memory_only_through_masters() {
    let switch = switch();
    let machine = &switch.machine;
    let device = &switch.devices[0];
    machine.bridge.assign_bars().unwrap();
    assert!(
        !device.config().reaches_memory(),
        "its driver has not turned it on"
    );
    At(3, 0).write(machine, COMMAND, 2, 6);
    assert!(device.config().reaches_memory());
    for bridge in [At(0, 1 << 3), At(1, 0), At(2, 0)] {
        bridge.write(machine, COMMAND, 2, 2);
        assert!(!device.config().reaches_memory(), "{bridge:?}");
        bridge.write(machine, COMMAND, 2, 6);
    }
    assert!(device.config().reaches_memory());
    // A bridge that is on no bus any more leads nowhere.
    switch.root_port.config().gate().close();
    machine.bridge.unmap(Devfn::new(1, 0).unwrap()).unwrap();
    assert!(!device.config().reaches_memory());
    let zero = Devfn::new(0, 0).unwrap();
    device.config().gate().close();
    switch.downstream[0].bus().detach_at(zero).unwrap();
    assert!(!device.config().reaches_memory());
}

/// As many ports as bus 0 has slots for, in windows that are too small for all reservations.
#[test]
fn reservations_shrink_until_all_fit() {
    let small = Windows {
        mmio32: 0xc000_0000..0xc000_0000 + (64 << 20),
        mmio64: 1 << 36..(1 << 36) + (1 << 30),
        io: 0..0,
    };
    let ranges = [small.mmio32.clone(), small.mmio64.clone()];
    let (machine, controller) = (Machine::with(small), FakeController::default());
    let ejects = Arc::new(Ejects::default());
    for slot in 1..32 {
        let port = port(
            &machine,
            &format!("rp{slot}"),
            PortModel::RootPort,
            Some(&ejects),
            &controller,
        );
        machine.bridge.attach(Some(slot), port).unwrap();
    }
    machine.bridge.set_last_bus(127);
    machine.bridge.assign_bars().unwrap();
    let found = scan(&machine, 0, 127);
    check_resources(&found, &ranges);
    for behind in found.iter().filter_map(|it| it.behind.as_ref()) {
        assert_eq!(behind.buses.1 - behind.buses.0, 3, "{behind:?}");
        assert!(
            behind
                .windows
                .iter()
                .flatten()
                .all(|it| it.end - it.start >= 1 << 20),
            "{behind:?}"
        );
        assert!(behind.windows.iter().all(Option::is_some));
    }
}

#[test]
fn what_has_no_room_is_named_and_the_rest_is_there() {
    let small = Windows {
        mmio32: 0xc000_0000..0xc040_0000,
        mmio64: 1 << 36..(1 << 36) + (64 << 20),
        io: 0..0,
    };
    let (machine, controller) = (Machine::with(small), FakeController::default());
    let new = |name: &str, reservation| {
        let spec = PortSpec {
            name: name.to_owned(),
            model: PortModel::RootPort,
            slot_number: 1,
            hotplug: None,
            reservation,
        };
        Port::new(&machine.bridge, spec, &controller).unwrap()
    };
    let greedy = Reservation {
        buses: 0,
        memory_bytes: u64::MAX,
        prefetchable_bytes: 0,
    };
    machine
        .bridge
        .attach(Some(1), new("rp1", Some(greedy)))
        .unwrap();
    machine
        .bridge
        .attach(Some(2), Device::new("disk", &controller))
        .unwrap();
    let error = machine.bridge.assign_bars().unwrap_err();
    assert!(matches!(error, PciError::NoRoomBehind { .. }), "{error}");
    assert_eq!(machine.config(2, COMMAND, 2), MEMORY);
    machine.bridge.attach(Some(3), new("rp3", None)).unwrap();
    machine.bridge.set_last_bus(1);
    let (one, three) = (At(0, 1 << 3), At(0, 3 << 3));
    assert!(machine.bridge.assign_bars().is_err());
    assert_eq!(one.read(&machine, 0x18, 4), 0x0001_0100);
    assert_eq!(three.read(&machine, 0x18, 4), 0, "no number is left for it");
}
