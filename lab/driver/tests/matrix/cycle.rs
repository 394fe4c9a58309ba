// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of one device: it comes, its driver gets as far as a step, something happens, it goes.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_lab_driver::{PciDevice, block_on};

use crate::world::{PATIENCE, Place, Plugged, Removable, World};

/// What a slow backend takes.
pub const DELAY: Duration = Duration::from_secs(20);

/// A list of names, each of a value.
macro_rules! named {
    ($(#[$doc:meta])* $type:ident { $($(#[$what:meta])* $value:ident = $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $type {
            $($(#[$what])* $value,)*
        }

        impl $type {
            /// All of them, in order.
            pub const ALL: &[$type] = &[$($type::$value),*];

            /// As the line of a cycle says it.
            pub fn name(self) -> &'static str {
                match self {
                    $($type::$value => $name,)*
                }
            }
        }
    };
}

named! {
    /// What the other end of a device does with what it is asked.
    Behaviour {
        /// It answers at once.
        Prompt = "prompt",
        /// It answers after [`DELAY`].
        Delay = "delay",
        /// It fails.
        Fail = "fail",
        /// It answers some time within [`DELAY`], the last first perhaps.
        Reorder = "reorder",
        /// It answers only when it is killed.
        Never = "never",
    }
}

named! {
    /// How far driver and device are when something happens.
    Step {
        /// The guest has not looked into the slot.
        BeforeSeen = "before-seen",
        /// It has turned the slot on and found the device.
        Found = "found",
        /// Its driver reads features.
        Negotiating = "negotiating",
        /// The queues are programmed.
        QueuesSetUp = "queues-set-up",
        /// The driver is ready.
        Idle = "idle",
        /// Requests are available, and nobody was told.
        Posted = "posted",
        /// The device was told just now.
        Kicked = "kicked",
        /// The backend has requests.
        InBackend = "in-backend",
        /// The backend answers just now.
        Completing = "completing",
        /// All is answered.
        Answered = "answered",
        /// The driver has reset the device, and waits.
        InReset = "in-reset",
        /// Management has taken the device away, and it drains.
        InRemoval = "in-removal",
    }
}

named! {
    /// What happens.
    Event {
        /// The driver resets the device, waits, and begins anew.
        Reset = "reset",
        /// The machine is reset.
        MachineReset = "machine-reset",
        /// Management asks, the guest ejects.
        Unplug = "unplug",
        /// The same, and everything that can be asked for once more is.
        UnplugAgain = "unplug-again",
        /// Management takes the device from a guest that knows nothing.
        Force = "force",
        /// The machine is stopped for [`DELAY`], and goes on.
        Stop = "stop",
        /// The process ends.
        Quit = "quit",
    }
}

/// A device with its backend and its driver.
pub trait Subject {
    fn function(&self) -> Arc<dyn Removable>;

    /// Lets go of the function; how many references there were, this one among them.
    fn release(&mut self) -> usize;

    fn place(&self) -> Place {
        Place::Port
    }

    /// Does what the driver does between the step before and this one.
    fn step(&mut self, step: Step, device: &PciDevice);

    /// Whether it cannot drain before the backend has answered.
    fn holds(&self) -> bool {
        false
    }

    /// Whether a reset has to wait for the same.
    fn holds_reset(&self) -> bool {
        self.holds()
    }

    /// The backend goes on.
    fn turn(&mut self) {}

    /// The backend answers all it has kept, or dies.
    fn let_go(&mut self) {}

    /// The driver resets the device, and does not wait.
    fn begin_reset(&mut self) {}

    /// Whether the driver sees the reset's end.
    fn is_reset(&self) -> bool {
        true
    }

    /// The reset has ended: nothing of the driver's is touched any more.
    fn after_reset(&mut self) {}

    /// The driver sets the device up and uses it.
    fn begin_again(&mut self) {}

    /// What the guest does when its slot is empty: it uses what the device had for something else.
    fn notice(&self) -> Box<dyn FnOnce()> {
        Box::new(|| ())
    }

    /// A reset has begun amid a removal: from now on no queue is touched.
    fn take_back(&mut self) {}

    /// Something comes for a device that is gone.
    fn late(&mut self) {}

    /// Nothing was touched that was not the device's, nobody uses the backend.
    fn verify(&mut self) {}
}

/// One line of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    pub behaviour: Behaviour,
    pub step: Step,
    pub event: Event,
}

struct Cycle<'a> {
    world: &'a Rc<World>,
    subject: Box<dyn Subject>,
    plugged: Plugged,
    line: Line,
}

/// Lives through one line. With [`Event::Quit`] the world ends with it, when it is dropped.
pub fn run(world: &Rc<World>, subject: Box<dyn Subject>, line: Line) {
    *world.story.notice.borrow_mut() = Some(subject.notice());
    let plugged = world.plug(subject.function(), subject.place());
    let mut cycle = Cycle {
        world,
        subject,
        plugged,
        line,
    };
    cycle.advance();
    cycle.happen();
    match line.event {
        // The guest is no more, and is told nothing.
        Event::Quit => drop(world.story.notice.take()),
        _ => cycle.leave(),
    }
}

impl Cycle<'_> {
    fn advance(&mut self) {
        if self.line.step == Step::BeforeSeen {
            return;
        }
        let device = self.plugged.find();
        let last = self.line.step;
        for &step in Step::ALL.iter().filter(|step| **step <= last) {
            let on_the_way = match step {
                // Each is a state of its own and no way to others.
                Step::BeforeSeen | Step::Completing | Step::Answered => step == last,
                // The latest states have requests in flight.
                Step::InReset => step == last,
                Step::InRemoval => step == last,
                _ => true,
            };
            if on_the_way {
                self.subject.step(step, &device);
            }
        }
        match last {
            Step::InReset => self.subject.begin_reset(),
            Step::InRemoval => assert!(self.plugged.begin(), "nobody else has it"),
            _ => {}
        }
    }

    fn happen(&mut self) {
        match self.line.event {
            Event::Reset => self.reset_by_driver(),
            Event::MachineReset => self.reset_by_machine(),
            Event::Unplug => self.unplug(),
            Event::UnplugAgain => {
                if !self.plugged.is_leaving() {
                    self.plugged.ask();
                }
                self.unplug();
                if self.world.story.deleted.get() == 0 && !self.plugged.is_gone() {
                    self.plugged.check_leaving();
                }
            }
            Event::Force => {
                if !self.plugged.is_leaving() {
                    assert!(self.plugged.begin(), "nobody else has it");
                }
            }
            Event::Stop => {
                let function = self.subject.function();
                function.stand_still(true);
                self.world.board.pass(DELAY);
                function.stand_still(false);
            }
            Event::Quit => self.quit(),
        }
    }

    fn unplug(&mut self) {
        if self.plugged.is_leaving() {
            return;
        }
        // An empty-looking slot is not ejected by anybody: nobody uses what is in it.
        if self.line.step == Step::BeforeSeen {
            assert!(self.plugged.begin(), "nobody else has it");
            return;
        }
        self.plugged.ask();
        assert!(self.plugged.guest_ejects(), "nobody else has isolated it");
    }

    /// A driver that cannot reach its device any more does not reset it.
    fn reset_by_driver(&mut self) {
        if self.plugged.is_leaving() {
            return;
        }
        self.subject.begin_reset();
        self.wait_for_reset(|subject| subject.is_reset());
    }

    /// As the machine does: all gates, then the wait, then registers.
    fn reset_by_machine(&mut self) {
        let mut quiet = self.subject.function().quiesce();
        if self.plugged.is_leaving() {
            // The removal goes on and waits for the same.
            self.subject.take_back();
            return;
        }
        let mut over = false;
        self.wait_for_reset(|_| {
            over = over || block_on(quiet.as_mut(), Duration::ZERO).is_some();
            over
        });
    }

    /// Waits until the reset is over, as long as it takes; then the driver begins again.
    fn wait_for_reset(&mut self, mut is_over: impl FnMut(&dyn Subject) -> bool) {
        let board = &self.world.board;
        loop {
            let subject = &mut *self.subject;
            let looked = board.poll(|| {
                subject.turn();
                is_over(subject) || subject.holds_reset()
            });
            assert!(looked, "the reset never ends");
            if is_over(&*self.subject) {
                break;
            }
            board.pass(3 * DELAY);
            assert!(!is_over(&*self.subject), "a reset amid requests");
            self.subject.let_go();
        }
        self.subject.after_reset();
        self.subject.begin_again();
    }

    /// The end of the process: the drain has its time, then everything is dropped whatever is in flight.
    fn quit(&mut self) {
        let mut quiet = self.subject.function().quiesce();
        self.world.board.pass(PATIENCE);
        let done = block_on(quiet.as_mut(), Duration::ZERO).is_some();
        assert!(
            !(done && self.subject.holds_reset()),
            "drained amid requests"
        );
    }

    /// The removal, to its end and beyond.
    fn leave(&mut self) {
        if self.world.story.deleted.get() == 0 {
            if self.line.event == Event::Stop || self.line.event == Event::Reset {
                self.unplug();
            } else if !self.plugged.is_leaving() {
                assert!(self.plugged.begin(), "nobody else has it");
            }
        }
        loop {
            let (subject, plugged) = (&mut self.subject, &mut self.plugged);
            let over = self.world.board.poll(|| {
                subject.turn();
                plugged.is_gone() || subject.holds()
            });
            assert!(over, "the removal never ends: {}", plugged.report());
            if plugged.is_gone() {
                break;
            }
            self.stay();
        }
        let story = &self.world.story;
        assert_eq!((story.told.get(), story.deleted.get()), (1, 1));
        // Now, a while after, and long after.
        self.subject.late();
        self.world.board.pass(2 * DELAY);
        self.subject.turn();
        self.subject.late();
        assert_eq!(self.subject.release(), 1, "references are left");
        self.subject.verify();
    }

    /// A backend that does not answer: the guest is not told, nothing is freed, also not when it was given up.
    fn stay(&mut self) {
        let story = &self.world.story;
        let stays = |plugged: &mut Plugged| {
            self.world.board.pass(3 * PATIENCE);
            assert!(!plugged.is_gone(), "it is gone with requests in flight");
            assert_eq!(story.told.get(), 0, "the guest was told too early");
        };
        stays(&mut self.plugged);
        assert!(story.stalled.get() > 0, "nobody hears of it");
        assert!(self.plugged.is_held(), "nobody is said to hold it");
        assert!(self.plugged.force(), "it can be given up");
        stays(&mut self.plugged);
        assert!(!self.plugged.force(), "it was given up before");
        self.subject.let_go();
    }
}
