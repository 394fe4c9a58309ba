// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine around a device that comes and goes: a board with a time of its own, a root port with its driver, the tree
//! of devices, and what is left when one is gone.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use ebbtide_bus::pci::{Bus as PciBus, Devfn, EjectSink, Function, HotplugSlot};
use ebbtide_bus::pci::{Port, PortModel, PortSpec, SlotAddress};
use ebbtide_device::{
    Answer, Bus, Detached, Draining, Eject, Gone, GuestEject, GuestNotice, Holder, Identity, Model,
    NodeId, Pending, Subtree, Surroundings, Tree, remove,
};
use ebbtide_gate::Gate;
use ebbtide_iothread::ManualClock;
use ebbtide_lab_driver::{Board, PciDevice, PortDriver, block_on};

/// Each device of each cycle has it: it must be free again.
pub const ID: &str = "dev0";
/// The guest's memory.
pub const RAM_BYTES: u64 = 1 << 20;
/// A slot of bus 0 that is not the port's.
const SLOT: u8 = 9;
/// The machine's `--drain-timeout`.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A PCI function that can be taken away while it works.
pub trait Removable: Function {
    /// Ends its work for good; its gate is closed.
    fn close(self: Arc<Self>) -> Draining;

    /// Ends its work for this guest.
    fn quiesce(&self) -> Draining;

    /// The guest has ejected it.
    fn guest_let_go(&self) {}

    /// Gives up what its requests wait for.
    fn force(&self) -> bool {
        false
    }

    /// Its guest stands still, or goes on.
    fn stand_still(&self, _still: bool) {}

    /// Requests a backend works on.
    fn requests(&self) -> u64 {
        0
    }
}

/// Where a device is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Behind the root port.
    Port,
    /// On bus 0, for what needs I/O ports.
    Bus0,
}

struct PciModel {
    function: Arc<dyn Removable>,
    bus: Arc<PciBus>,
    at: Devfn,
}

impl Model for PciModel {
    fn gate(&self) -> &Arc<Gate> {
        self.function.config().gate()
    }

    fn drain(&mut self) -> Draining {
        self.bus.unmap(self.at).expect("it is on its bus");
        Arc::clone(&self.function).close()
    }

    fn holders(&self) -> Vec<Holder> {
        let requests = Holder::requests(self.function.requests(), None);
        Holder::inside(self.gate())
            .into_iter()
            .chain(requests)
            .collect()
    }

    fn force(&mut self) -> bool {
        self.function.force()
    }
}

/// What the guest's eject write reaches.
#[derive(Default)]
struct Sink(Mutex<(Option<Arc<Eject>>, Vec<Answer>)>);

impl EjectSink for Sink {
    fn eject(&self, _slot: &SlotAddress) {
        self.now();
    }
}

impl Sink {
    fn now(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = state.0.as_ref().map(|eject| eject.eject());
        state.1.extend(answer);
    }

    fn set(&self, eject: Option<Arc<Eject>>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (eject, Vec::new());
    }

    fn answers(&self) -> Vec<Answer> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1.clone()
    }
}

/// What happened to the device of this cycle.
#[derive(Default)]
pub struct Story {
    /// A removal has begun: requests that have not may be refused.
    pub leaving: Cell<bool>,
    /// How often the guest was told that the slot is empty.
    pub told: Cell<u32>,
    /// How often management was told that the device is gone.
    pub deleted: Cell<u32>,
    /// How often a drain was reported.
    pub stalled: Cell<u32>,
    /// What the guest does when it is told, once.
    pub notice: RefCell<Option<Box<dyn FnOnce()>>>,
}

/// The machine.
pub struct World {
    pub board: Board,
    pub clock: ManualClock,
    port: Arc<Port>,
    slot: Arc<dyn HotplugSlot>,
    pub driver: PortDriver,
    sink: Arc<Sink>,
    tree: RefCell<Tree<Place>>,
    pub story: Story,
}

impl World {
    /// A machine with an empty slot behind its root port.
    pub fn new() -> Rc<World> {
        let clock = ManualClock::new();
        let board = Board::with_clock(RAM_BYTES, &clock).expect("a board");
        let sink = Arc::<Sink>::default();
        let spec = PortSpec {
            name: "rp0".into(),
            model: PortModel::RootPort,
            slot_number: 1,
            hotplug: Some(Arc::clone(&sink) as _),
            reservation: None,
        };
        let port = Port::new(board.bridge(), spec, board.interrupts()).expect("a port");
        board.attach(Arc::clone(&port) as _).expect("a slot");
        let driver = PortDriver::new(board.device(1)).expect("a port");
        Rc::new(World {
            slot: port.slot().expect("a hot-plug slot"),
            board,
            clock,
            port,
            driver,
            sink,
            tree: RefCell::default(),
            story: Story::default(),
        })
    }

    /// Returns when the thread that serves queues has done what it was at.
    pub fn serving_has_turned(&self) {
        let (turned, turn) = std::sync::mpsc::channel();
        let job = move |_| {
            let _ = turned.send(());
            std::future::ready(())
        };
        self.board.remote().spawn(job).expect("it serves");
        turn.recv().expect("it serves");
    }

    /// Plugs `function` in; the guest has an interrupt of it.
    pub fn plug(self: &Rc<Self>, function: Arc<dyn Removable>, place: Place) -> Plugged {
        let (bus, at) = match place {
            Place::Port => (Arc::clone(self.port.bus()), Devfn::from_bits(0)),
            Place::Bus0 => {
                let bus = Arc::clone(self.board.bridge().bus());
                (bus, Devfn::new(SLOT, 0).expect("a slot"))
            }
        };
        bus.attach_at(at, Arc::clone(&function) as _)
            .expect("the slot is free");
        if place == Place::Bus0 {
            self.board.bridge().assign_bars().expect("room for BARs");
        }
        let eject = Eject::new(GuestEject::Requested, function.config().gate());
        self.sink.set(Some(Arc::clone(&eject)));
        let weak = Arc::downgrade(&function);
        let model = Box::new(PciModel { function, bus, at });
        let plugged = self.tree.borrow_mut().plug(
            None,
            identity(),
            model,
            Some(eject),
            place,
            self.clock.now(),
        );
        let Ok(node) = plugged else {
            panic!("the id {ID} is taken");
        };
        self.story.leaving.set(false);
        self.story.told.set(0);
        self.story.deleted.set(0);
        self.story.stalled.set(0);
        if place == Place::Port {
            self.slot.plugged();
        }
        Plugged {
            world: Rc::clone(self),
            node,
            place,
            function: weak,
            removal: None,
        }
    }
}

fn identity() -> Identity {
    Identity {
        id: Some(ID.into()),
        path: format!("/machine/peripheral/{ID}"),
    }
}

/// The device of a cycle, as management has it.
pub struct Plugged {
    world: Rc<World>,
    node: NodeId,
    place: Place,
    function: Weak<dyn Removable>,
    removal: Option<Pin<Box<dyn Future<Output = bool>>>>,
}

impl Plugged {
    /// What the guest does about something new.
    pub fn find(&self) -> PciDevice {
        match self.place {
            Place::Port => {
                let events = self.world.driver.events();
                assert!(events.presence && events.link, "{events:?}");
                self.world.driver.turn_on().expect("a function")
            }
            Place::Bus0 => {
                let device = self.world.board.device(SLOT);
                device.write_config(4, 2, 7);
                device
            }
        }
    }

    /// `device_del`.
    pub fn ask(&self) {
        let now = self.world.clock.now();
        let asked = self.world.tree.borrow_mut().request(self.node, now);
        asked.expect("it may be asked for");
        if self.place == Place::Port {
            // A guest that is at work on the slot, or had it turned off, is not asked again.
            let _ = self.world.slot.request_removal();
        }
    }

    /// The guest's eject write, with the removal that follows; whether it was this one that isolated the device.
    pub fn guest_ejects(&mut self) -> bool {
        let before = self.world.sink.answers().len();
        self.world.story.leaving.set(true);
        match self.place {
            Place::Port => self.world.driver.turn_off().expect("completed"),
            Place::Bus0 => self.world.sink.now(),
        }
        let answers = self.world.sink.answers().split_off(before);
        assert!(!answers.contains(&Answer::Refused), "it was asked for");
        let isolated = answers.contains(&Answer::Isolated);
        self.let_go();
        if isolated {
            assert!(self.begin(), "nobody else has it");
        }
        isolated
    }

    /// Begins the removal, isolating the device if nobody has. False: another one has it.
    pub fn begin(&mut self) -> bool {
        self.world.story.leaving.set(true);
        let around = Around(Rc::clone(&self.world));
        let node = self.node;
        let mut removal: Pin<Box<dyn Future<Output = bool>>> =
            Box::pin(async move { remove(&around, node).await });
        let looked = look(&mut removal);
        self.removal = Some(removal);
        match looked {
            Some(false) => self.removal = None,
            Some(true) => self.removal = Some(Box::pin(std::future::ready(true))),
            None => {}
        }
        self.removal.is_some()
    }

    /// Whether the device is on its way out.
    pub fn is_leaving(&self) -> bool {
        self.removal.is_some()
    }

    /// Looks whether the removal is over, without waiting.
    pub fn is_gone(&mut self) -> bool {
        if let Some(removal) = &mut self.removal
            && look(removal).is_some()
        {
            self.removal = None;
            self.world.sink.set(None);
        }
        self.world.story.deleted.get() > 0
    }

    /// `x-ebbtide-device-force` in a drain.
    pub fn force(&self) -> bool {
        self.world.tree.borrow_mut().force(self.node)
    }

    /// What must not be possible while it is on its way out.
    pub fn check_leaving(&mut self) {
        assert!(!self.begin_again(), "a second removal has begun");
        let tree = self.world.tree.borrow_mut();
        let error = tree.check_id(ID).expect_err("the id is taken");
        assert!(error.to_string().contains(ID), "{error}");
        drop(tree);
        let now = self.world.clock.now();
        let asked = self.world.tree.borrow_mut().request(self.node, now);
        asked.expect_err("it is isolated");
        assert!(!self.world.tree.borrow_mut().cancel(self.node, now));
        if self.place == Place::Port {
            let _ = self.world.slot.request_removal();
            // The guest turns the slot off once more, or for the first time.
            let _ = self.world.driver.turn_off();
        }
        self.world.sink.now();
        self.let_go();
    }

    fn let_go(&self) {
        if let Some(function) = self.function.upgrade() {
            function.guest_let_go();
        }
    }

    fn begin_again(&self) -> bool {
        let now = self.world.clock.now();
        self.world.tree.borrow_mut().take(self.node, now).is_some()
    }

    /// Whether something is said to keep it from draining.
    pub fn is_held(&self) -> bool {
        let tree = self.world.tree.borrow();
        let node = tree.get(self.node);
        node.is_some_and(|node| !node.holders().is_empty())
    }

    /// How far it is, for reports.
    pub fn report(&self) -> String {
        let tree = self.world.tree.borrow();
        let node = tree.get(self.node);
        node.map_or("gone".into(), |it| {
            format!("{:?}, held by {:?}", it.phase(), it.holders())
        })
    }
}

/// Polls a removal once.
fn look(removal: &mut Pin<Box<dyn Future<Output = bool>>>) -> Option<bool> {
    block_on(removal.as_mut(), Duration::ZERO)
}

struct Around(Rc<World>);

struct Buses(Rc<World>);

impl Bus for Buses {
    fn forget(&mut self, _identity: &Identity, device: &dyn Model) {
        let world = &self.0;
        let name = device.gate().name().to_owned();
        for bus in [world.port.bus(), world.board.bridge().bus()] {
            let found = bus.functions().into_iter();
            let mut found = found.filter(|(_, it)| it.config().gate().name() == name);
            if let Some((at, function)) = found.next() {
                drop(function);
                drop(bus.detach_at(at).expect("it has drained"));
                return;
            }
        }
        panic!("{name} is on no bus");
    }
}

impl Surroundings<Place> for Around {
    type Bus = Buses;

    fn tree(&self) -> &RefCell<Tree<Place>> {
        &self.0.tree
    }

    fn now(&self) -> Instant {
        self.0.clock.now()
    }

    /// Whoever waits on the board's time looks again after each turn of the clock.
    fn sleep(&self, duration: Duration) -> Pending<()> {
        let clock = self.0.clock.clone();
        let end = clock.now() + duration;
        Box::pin(poll_fn(move |_| {
            if clock.now() >= end {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }))
    }

    fn patience(&self) -> Duration {
        PATIENCE
    }

    fn bus(&self) -> Buses {
        Buses(Rc::clone(&self.0))
    }

    fn stalled(&self, _top: &Identity, _age: Duration, _undrained: &[(Identity, Vec<Holder>)]) {
        self.0.story.stalled.set(self.0.story.stalled.get() + 1);
    }

    fn tell_guest(&self, top: NodeId, _notice: GuestNotice) {
        let story = &self.0.story;
        let place = self.0.tree.borrow().get(top).map(|node| node.info);
        assert_eq!(story.deleted.get(), 0, "management was told first");
        story.told.set(story.told.get() + 1);
        if place == Some(Place::Port) {
            self.0.slot.detached();
        }
        if let Some(notice) = story.notice.take() {
            notice();
        }
    }

    fn destroy(&self, subtree: Subtree<Detached>) -> Pending<Vec<Gone>> {
        Box::pin(async move { subtree.destroy_here() })
    }

    fn deleted(&self, _gone: Gone, _place: Place) {
        let story = &self.0.story;
        assert_eq!(story.told.get(), 1, "the guest was not told before");
        story.deleted.set(story.deleted.get() + 1);
    }
}
