// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Any virtio device with its backend and its driver, for one cycle.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use ebbtide_device::Draining;
use ebbtide_lab_driver::{
    DriverQueue, GuestRam, Layout, Part, PciDevice, Random, VirtioDriver, common, poll,
};
use ebbtide_memory::Gpa;
use ebbtide_virtio::{VirtioDevice, VirtioPci, status};

use crate::cycle::{Step, Subject};
use crate::world::{ID, RAM_BYTES, Removable, World};

/// What memory is filled with that is the guest's to use for something else.
const POISON: u8 = 0xa5;
const QUEUE_SIZE: u16 = 32;

impl Removable for VirtioPci {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(VirtioPci::close(&self))
    }

    fn quiesce(&self) -> Draining {
        Box::pin(VirtioPci::quiesce(self))
    }

    fn guest_let_go(&self) {
        VirtioPci::guest_let_go(self);
    }

    fn force(&self) -> bool {
        self.abandon()
    }

    fn requests(&self) -> u64 {
        self.in_flight().requests
    }
}

/// A device and what is at its other end.
pub struct Made {
    pub device: Arc<dyn VirtioDevice>,
    pub queues: u16,
    pub backend: Box<dyn Backend>,
}

/// The other end of a device.
pub trait Backend {
    /// What the driver does once it is ready.
    fn ready(&mut self, _guest: &mut Guest) {}

    /// What the driver asks for.
    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request>;

    /// Whether a request waits for it.
    fn is_busy(&self, function: &VirtioPci) -> bool {
        function.in_flight().requests > 0
    }

    /// Whether a request waits for it that keeps the device from draining.
    fn holds(&self) -> bool {
        false
    }

    /// Whether it answers what it was asked, in time or when it is let go.
    fn answers(&self) -> bool {
        true
    }

    /// Does what it does by itself.
    fn turn(&mut self) {}

    /// Answers what it has kept, or dies.
    fn let_go(&mut self);

    /// Does what it would do for a device that is there.
    fn late(&mut self) {}

    /// Whether nobody uses it.
    fn is_free(&self) -> bool {
        true
    }
}

/// What a driver asks a device for.
pub struct Request {
    pub queue: u16,
    pub parts: Vec<Part>,
    /// A driver waits for it.
    pub owed: bool,
    /// What is wrong about an answer of so many bytes.
    pub check: Box<dyn Fn(u32) -> Result<(), String>>,
}

struct Posted {
    request: Request,
    head: u16,
    answered: bool,
}

/// Rings and buffers the driver has taken back.
struct Retired {
    queues: Vec<DriverQueue>,
    posted: Vec<Posted>,
}

/// The driver.
pub struct Guest {
    ram: GuestRam,
    pub driver: Option<VirtioDriver>,
    pub queues: Vec<DriverQueue>,
    posted: Vec<Posted>,
    retired: Vec<Retired>,
    /// The driver waits for nothing.
    was_reset: bool,
    /// The device is no more: the guest uses all of its memory for something else.
    all_poisoned: bool,
    /// Where the queues stood that are not touched any more.
    frozen: Vec<u16>,
}

impl Guest {
    fn driver(&mut self) -> &mut VirtioDriver {
        self.driver.as_mut().expect("it was found")
    }

    fn set_up(&mut self, queues: u16) {
        let driver = self.driver.as_ref().expect("it was found");
        self.queues = (0..queues)
            .map(|at| driver.add_queue(at, QUEUE_SIZE))
            .collect();
    }

    fn post(&mut self, request: Request, layout: Layout) {
        let queue = &mut self.queues[usize::from(request.queue)];
        let head = queue.add(&request.parts, layout).expect("descriptors");
        self.posted.push(Posted {
            request,
            head,
            answered: false,
        });
    }

    /// Kicks every queue with something in it.
    fn kick(&mut self) {
        let driver = self.driver.as_ref().expect("it was found");
        for (index, queue) in (0..).zip(&mut self.queues) {
            if queue.in_flight() > 0 && queue.needs_kick() {
                driver.kick(index);
            }
        }
    }

    /// Takes the answers there are. Those that came twice, or to nobody, are found by the queue.
    pub fn collect(&mut self) {
        for (index, queue) in (0..).zip(&mut self.queues) {
            while let Some(used) = queue.poll_used() {
                let posted = self
                    .posted
                    .iter_mut()
                    .find(|it| it.request.queue == index && it.head == used.head && !it.answered);
                let Some(posted) = posted else { continue };
                posted.answered = true;
                let room: u32 = (posted.request.parts.iter().filter(|part| part.writable))
                    .map(|part| part.len)
                    .sum();
                assert!(used.written <= room, "{} bytes of {room}", used.written);
                if let Err(wrong) = (posted.request.check)(used.written) {
                    panic!("queue {index}, chain {}: {wrong}", used.head);
                }
            }
        }
    }

    /// How much the device has used of each queue.
    fn used(&self) -> Vec<u16> {
        let queues = self.queues.iter();
        queues.map(DriverQueue::device_used_idx).collect()
    }

    fn unanswered(&self) -> usize {
        let mut owed = self.posted.iter().filter(|it| it.request.owed);
        owed.by_ref().filter(|it| !it.answered).count()
    }

    /// Rings and buffers are the driver's again: it fills them with something else.
    fn retire(&mut self) {
        self.collect();
        let retired = Retired {
            queues: std::mem::take(&mut self.queues),
            posted: std::mem::take(&mut self.posted),
        };
        for (gpa, len) in retired.ranges() {
            self.ram.write(gpa, &vec![POISON; len]);
        }
        self.retired.push(retired);
    }

    /// All memory is.
    fn poison_all(&mut self) {
        self.all_poisoned = true;
        self.ram.write(Gpa(0), &vec![POISON; RAM_BYTES as usize]);
    }

    fn check_poison(&self) {
        if self.all_poisoned {
            let bytes = self.ram.read(Gpa(0), RAM_BYTES as usize);
            let touched = bytes.iter().position(|byte| *byte != POISON);
            assert_eq!(touched, None, "memory was written to after the end");
        }
        for (gpa, len) in self.retired.iter().flat_map(Retired::ranges) {
            let bytes = self.ram.read(gpa, len);
            let touched = bytes.iter().position(|byte| *byte != POISON);
            assert_eq!(touched, None, "{len} bytes at {gpa:?} were written to");
        }
    }
}

impl Retired {
    fn ranges(&self) -> Vec<(Gpa, usize)> {
        let rings = self.queues.iter().map(DriverQueue::config).flat_map(|it| {
            [
                (it.desc, it.desc_len()),
                (it.avail, it.avail_len()),
                (it.used, it.used_len()),
            ]
        });
        let parts = self.posted.iter().flat_map(|it| &it.request.parts);
        let parts = parts.map(|part| (part.gpa, part.len as usize));
        rings.chain(parts).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let queues = self.retired.drain(..).flat_map(|it| it.queues);
        queues
            .chain(self.queues.drain(..))
            .for_each(DriverQueue::free);
    }
}

/// A virtio device on the bench.
pub struct Virtio {
    world: Rc<World>,
    /// Until it is released.
    function: Option<Arc<VirtioPci>>,
    guest: Rc<RefCell<Guest>>,
    backend: Box<dyn Backend>,
    queues: u16,
    random: Random,
}

impl Virtio {
    pub fn on_bench(world: &Rc<World>, made: Made, random: &mut Random) -> Box<dyn Subject> {
        let Made {
            device,
            queues,
            backend,
        } = made;
        let board = &world.board;
        let (space, interrupts) = (board.space(), board.interrupts());
        let function = VirtioPci::new(ID, device, space, interrupts, &board.remote());
        Box::new(Virtio {
            world: Rc::clone(world),
            function: Some(function.expect("a function")),
            guest: Rc::new(RefCell::new(Guest {
                ram: board.ram().clone(),
                driver: None,
                queues: Vec::new(),
                posted: Vec::new(),
                retired: Vec::new(),
                was_reset: false,
                all_poisoned: false,
                frozen: Vec::new(),
            })),
            backend,
            queues,
            random: Random(random.next()),
        })
    }

    fn post(&mut self) {
        let mut guest = self.guest.borrow_mut();
        let ram = guest.ram.clone();
        for request in self.backend.requests(&ram, &mut self.random) {
            let layout = match self.random.below(3) {
                0 => Layout::Indirect,
                _ => Layout::Direct,
            };
            guest.post(request, layout);
        }
    }

    fn unanswered(&self) -> usize {
        let mut guest = self.guest.borrow_mut();
        guest.collect();
        guest.unanswered()
    }

    /// Until nothing is owed any more; by the board's time.
    fn all_answered(&mut self) -> bool {
        let world = Rc::clone(&self.world);
        world.board.poll(|| {
            self.backend.turn();
            self.unanswered() == 0
        })
    }
}

impl Subject for Virtio {
    fn function(&self) -> Arc<dyn Removable> {
        Arc::clone(self.function.as_ref().expect("not released")) as _
    }

    fn release(&mut self) -> usize {
        self.function.take().map_or(0, |it| Arc::strong_count(&it))
    }

    fn step(&mut self, step: Step, device: &PciDevice) {
        let mut guest = self.guest.borrow_mut();
        match step {
            Step::Found => {
                device.enable_msix();
                let driver = VirtioDriver::new(&self.world.board, device.clone());
                guest.driver = Some(driver.expect("a virtio device"));
            }
            Step::Negotiating => {
                let driver = guest.driver();
                driver.set_status(status::ACKNOWLEDGE);
                driver.set_status(status::DRIVER);
                driver.set_features(driver.offered());
            }
            Step::QueuesSetUp => {
                guest.driver().negotiate(u64::MAX).expect("features");
                guest.set_up(self.queues);
            }
            Step::Idle => {
                guest.driver().driver_ok().expect("activation");
                self.backend.ready(&mut guest);
            }
            Step::Posted => {
                drop(guest);
                self.post();
            }
            Step::Kicked => guest.kick(),
            Step::InBackend => {
                drop(guest);
                let there = poll(|| {
                    self.backend.turn();
                    let function = self.function.as_ref().expect("not released");
                    self.backend.is_busy(function) || self.unanswered() == 0
                });
                assert!(there, "the backend never hears of it");
            }
            Step::Completing => {
                drop(guest);
                self.backend.let_go();
                self.world.clock.advance(crate::cycle::DELAY);
            }
            Step::Answered => {
                drop(guest);
                self.backend.let_go();
                assert!(
                    !self.backend.answers() || self.all_answered(),
                    "{} requests are not answered",
                    self.unanswered()
                );
            }
            Step::BeforeSeen | Step::InReset | Step::InRemoval => {}
        }
    }

    fn holds(&self) -> bool {
        self.backend.holds()
    }

    fn turn(&mut self) {
        self.backend.turn();
    }

    fn let_go(&mut self) {
        self.backend.let_go();
    }

    fn begin_reset(&mut self) {
        let mut guest = self.guest.borrow_mut();
        guest.was_reset = true;
        if let Some(driver) = &guest.driver {
            driver.write_common(common::STATUS, 1, 0);
        }
    }

    fn is_reset(&self) -> bool {
        let guest = self.guest.borrow();
        guest.driver.as_ref().is_none_or(|it| it.status() == 0)
    }

    fn after_reset(&mut self) {
        let mut guest = self.guest.borrow_mut();
        guest.was_reset = true;
        guest.retire();
    }

    fn begin_again(&mut self) {
        let mut guest = self.guest.borrow_mut();
        guest.check_poison();
        if guest.driver.is_none() {
            return;
        }
        guest.driver().negotiate(u64::MAX).expect("features");
        guest.set_up(self.queues);
        guest.driver().driver_ok().expect("activation");
        self.backend.ready(&mut guest);
        guest.was_reset = false;
        drop(guest);
        self.post();
        self.guest.borrow_mut().kick();
    }

    fn notice(&self) -> Box<dyn FnOnce()> {
        let guest = Rc::clone(&self.guest);
        Box::new(move || {
            let mut guest = guest.borrow_mut();
            if !guest.frozen.is_empty() {
                assert_eq!(guest.used(), guest.frozen, "a reset queue was touched");
            }
            guest.collect();
            let unanswered = guest.unanswered();
            guest.driver = None;
            guest.retire();
            guest.poison_all();
            assert!(
                guest.was_reset || unanswered == 0,
                "{unanswered} requests are neither answered nor lost in a reset"
            );
        })
    }

    fn take_back(&mut self) {
        self.world.serving_has_turned();
        let mut guest = self.guest.borrow_mut();
        guest.was_reset = true;
        guest.collect();
        let live = !guest.posted.is_empty();
        guest.frozen = guest.used();
        drop(guest);
        // What nobody is to look at any more.
        if live {
            self.post();
        }
    }

    fn late(&mut self) {
        self.backend.let_go();
        self.backend.late();
    }

    fn verify(&mut self) {
        self.guest.borrow().check_poison();
        let free = poll(|| self.backend.is_free());
        assert!(free, "the backend is in use by nobody");
    }
}
