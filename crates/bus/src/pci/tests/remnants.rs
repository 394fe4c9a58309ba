// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What functions that were taken from their drivers show until they are detached, and what they leave behind.

use ebbtide_memory::Region;

use super::*;
use crate::pci::fakes::Signature;
use crate::pci::{Bus, Config, Devfn, Remnant};

const PORT: At = At(0, 1 << 3);
const ZERO: Devfn = Devfn::from_bits(0);
/// What the remnant reads as, and where in BAR 0 it is.
const LEFT: u64 = 0x1e;
const OFFSET: u64 = 0x20;

/// A device that leaves something behind if its driver had not let go of it.
struct Pulled {
    device: Arc<Device>,
    by_surprise: bool,
}

impl Pulled {
    fn new(controller: &FakeController, by_surprise: bool) -> Arc<Self> {
        Arc::new(Self {
            device: Device::new("disk", controller),
            by_surprise,
        })
    }
}

impl Function for Pulled {
    fn config(&self) -> &Config {
        self.device.config()
    }

    fn remnant(&self) -> Option<Remnant> {
        self.by_surprise.then(|| Remnant {
            bar: 0,
            offset: OFFSET,
            region: Region::mmio("left", 4, Arc::new(Signature(LEFT))),
        })
    }
}

/// Closes what is at `at` and takes it away.
fn pull(bus: &Bus, at: Devfn) {
    bus.function(at).unwrap().config().gate().close();
    bus.unmap(at).unwrap();
    drop(bus.detach_at(at).unwrap());
}

fn address(machine: &Machine, at: At) -> u64 {
    at.write(machine, COMMAND, 2, 6);
    u64::from(at.read(machine, 0x10, 4)) & !0xf
}

#[test]
fn it_is_there_until_the_next_one_has_left_the_place() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let (slot, at) = (Devfn::new(3, 0).unwrap(), At(0, 3 << 3));
    let plug = |by_surprise| {
        let device = Pulled::new(&controller, by_surprise);
        machine.bridge.attach_at(slot, device).unwrap();
        machine.bridge.assign_bars().unwrap();
        address(&machine, at)
    };
    let bar = plug(true);
    assert_eq!(machine.load(bar + OFFSET, 1), 0xb0, "the device is there");
    pull(machine.bridge.bus(), slot);
    assert_eq!(machine.load(bar + OFFSET, 1), LEFT);
    assert_eq!(machine.load(bar, 4), 0xffff_ffff, "nothing else is left");
    assert_eq!(machine.load(bar + OFFSET + 4, 4), 0xffff_ffff);
    assert_eq!(at.read(&machine, 0, 4), u32::MAX);

    // Plugged, but not seen by the guest yet, which may still be about the first one; also when it goes again.
    let device = Pulled::new(&controller, true);
    machine.bridge.attach_at(slot, device).unwrap();
    pull(machine.bridge.bus(), slot);
    assert_eq!(machine.load(bar + OFFSET, 1), LEFT);
    let device = Pulled::new(&controller, false);
    machine.bridge.attach_at(slot, device).unwrap();
    assert_eq!(machine.load(bar + OFFSET, 1), LEFT);
    machine.bridge.assign_bars().unwrap();
    assert_eq!(address(&machine, at), bar);
    assert_eq!(machine.load(bar + OFFSET, 1), 0xb0, "whose address it is");
    pull(machine.bridge.bus(), slot);
    assert_eq!(machine.load(bar + OFFSET, 1), 0xff, "it had let go");

    for _ in 0..100 {
        let bar = plug(true);
        pull(machine.bridge.bus(), slot);
        assert_eq!(machine.load(bar + OFFSET, 1), LEFT);
    }
    plug(true);
    let map = machine.memory.mtree(false).to_string();
    assert_eq!(map.matches("left").count(), 1, "one for a place: {map}");
}

#[test]
fn what_was_never_mapped_leaves_nothing() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let slot = Devfn::new(3, 0).unwrap();
    let device = Pulled::new(&controller, true);
    machine.bridge.attach_at(slot, device).unwrap();
    pull(machine.bridge.bus(), slot);
    assert!(!machine.memory.mtree(false).to_string().contains("left"));
}

#[test]
fn it_survives_the_bridge_above_and_goes_with_a_reset() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let ejects = Arc::new(Ejects::default());
    let new = |name, model| port(&machine, name, model, Some(&ejects), &controller);
    let root = new("rp0", PortModel::RootPort);
    let up = new("up0", PortModel::X3130Upstream);
    let down = new("down0", PortModel::Xio3130Downstream);
    let slot = Devfn::new(1, 0).unwrap();
    machine.bridge.attach_at(slot, root.clone()).unwrap();
    root.bus().attach(None, up.clone()).unwrap();
    up.bus().attach(None, down.clone()).unwrap();
    let device = Pulled::new(&controller, true);
    down.bus().attach(None, device).unwrap();
    machine.bridge.assign_bars().unwrap();
    let bar = address(&machine, At(3, 0));
    assert_eq!(machine.load(bar + OFFSET, 1), 0xb0);

    pull(down.bus(), ZERO);
    assert_eq!(
        machine.load(bar + OFFSET, 1),
        LEFT,
        "through three windows with nothing in them"
    );
    pull(up.bus(), ZERO);
    pull(root.bus(), ZERO);
    drop((up, down));
    assert_eq!(machine.load(bar + OFFSET, 1), LEFT);
    pull(machine.bridge.bus(), slot);
    drop(root);
    assert_eq!(machine.load(bar + OFFSET, 1), LEFT, "at the root's place");
    machine.bridge.reset();
    assert_eq!(machine.load(bar + OFFSET, 1), 0xff);
    assert!(!machine.memory.mtree(false).to_string().contains("left"));
}

#[test]
fn a_reset_reaches_behind_bridges() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let root = port(&machine, "rp0", PortModel::RootPort, None, &controller);
    machine.bridge.attach(Some(1), root.clone()).unwrap();
    let device = Pulled::new(&controller, true);
    root.bus().attach(None, device).unwrap();
    machine.bridge.assign_bars().unwrap();
    let bar = address(&machine, At(1, 0));
    pull(root.bus(), ZERO);
    assert_eq!(machine.load(bar + OFFSET, 1), LEFT);
    machine.bridge.reset();
    assert_eq!(machine.load(bar + OFFSET, 1), 0xff);
}

/// Until it is detached it is there, to whoever asks for that, and nothing else of it.
#[test]
fn one_that_is_taken_away_is_found_until_it_is_detached() {
    let (machine, controller) = (Machine::new(), FakeController::default());
    let root = port(&machine, "rp0", PortModel::RootPort, None, &controller);
    let slot = Devfn::new(1, 0).unwrap();
    machine.bridge.attach_at(slot, root.clone()).unwrap();
    let device = Pulled::new(&controller, true);
    root.bus().attach(None, device.clone()).unwrap();
    machine.bridge.assign_bars().unwrap();
    let at = At(1, 0);
    let ids = 0x5678_1234;
    let config = Function::config(&*device);
    config.keep_identity(true);
    assert_eq!((at.read(&machine, 0, 4), at.read(&machine, 8, 1)), (ids, 9));
    config.gate().close();
    let parts = [(0, 4, ids), (0, 2, 0x1234), (2, 2, 0x5678), (3, 1, 0x56)];
    for (offset, size, value) in parts {
        assert_eq!(at.read(&machine, offset, size), value, "{size} at {offset}");
    }
    for offset in (4..256).step_by(4) {
        assert_eq!(at.read(&machine, offset, 4), u32::MAX, "{offset:#x}");
    }
    at.write(&machine, 0, 4, 0);
    assert_eq!(at.read(&machine, 0, 4), ids);

    // With the port, unless that keeps it, too.
    root.config().gate().close();
    assert_eq!(at.read(&machine, 0, 4), u32::MAX);
    root.config().keep_identity(true);
    assert_eq!(at.read(&machine, 0, 4), ids);
    assert_eq!(At(1, 8).read(&machine, 0, 4), u32::MAX);
    assert_eq!(At(2, 0).read(&machine, 0, 4), u32::MAX);
    config.keep_identity(false);
    assert_eq!(at.read(&machine, 0, 4), u32::MAX);
    assert_eq!(at.read(&machine, 0, 1), 0xff);
    config.keep_identity(true);
    pull(root.bus(), ZERO);
    assert_eq!(at.read(&machine, 0, 4), u32::MAX, "it is detached");
    assert_ne!(PORT.read(&machine, 0, 4), u32::MAX);
    pull(machine.bridge.bus(), slot);
    assert_eq!(PORT.read(&machine, 0, 4), u32::MAX);
}
