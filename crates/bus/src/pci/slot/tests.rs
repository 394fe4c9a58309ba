// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The controller by itself: what a driver like Linux's does, and what any guest may do.

use proptest::prelude::*;

use super::*;

const ABP: u16 = 1;
const PDC: u16 = 1 << 3;
const CC: u16 = 1 << 4;
const PDS: u16 = 1 << 6;
const DLLSC: u16 = 1 << 8;
/// All events of Linux's driver on: button, presence, command completed, hot-plug interrupt, link.
const ENABLES: u16 = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 12;

/// A driver that remembers what it has turned on.
struct Driver {
    slot: Controller,
    ejects: usize,
    interrupts: usize,
}

impl Driver {
    fn new(present: bool) -> Self {
        let mut this = Self {
            slot: Controller::new(present),
            ejects: 0,
            interrupts: 0,
        };
        this.command(0, 0x103f, ENABLES);
        this.acknowledge();
        this.interrupts = 0;
        this
    }

    fn count(&mut self, effects: Effects) {
        self.ejects += usize::from(effects.eject);
        self.interrupts += usize::from(effects.interrupt);
    }

    /// Changes the bits of `mask`, as the driver's read-modify-write does; `base` is ored in.
    fn command(&mut self, base: u16, mask: u16, value: u16) {
        let next = self.slot.control() & !mask | value & mask | base;
        let effects = self.slot.write_control(next);
        self.count(effects);
    }

    /// Clears all events and returns them.
    fn acknowledge(&mut self) -> u16 {
        let events = self.slot.status() & !PDS;
        let effects = self.slot.write_status(events);
        self.count(effects);
        events
    }

    fn blink(&mut self) {
        self.command(0, 3 << 8, 2 << 8);
        self.acknowledge();
    }

    fn power_on(&mut self) {
        self.command(0, 1 << 10, 0);
        self.blink();
        self.command(0, 3 << 8, 1 << 8);
        self.acknowledge();
    }

    fn power_off(&mut self) {
        self.command(0, 1 << 10, 1 << 10);
        assert_eq!(self.ejects, 0, "the power goes a second before the eject");
        self.command(0, 3 << 8, 3 << 8);
        self.acknowledge();
    }
}

#[test]
fn power_on_follows_presence() {
    let full = Controller::new(true);
    assert_eq!((full.control(), full.status()), (3 << 6 | 1 << 8, PDS));
    assert!(full.link_active() && full.state().powered);
    let empty = Controller::new(false);
    assert_eq!(
        (empty.control(), empty.status()),
        (3 << 6 | 3 << 8 | 1 << 10, 0)
    );
    assert!(!empty.link_active() && !empty.state().powered);
}

#[test]
fn plug_is_presence_and_link_at_once() {
    let mut driver = Driver::new(false);
    let effects = driver.slot.plug();
    assert_eq!(
        effects,
        Effects {
            interrupt: true,
            eject: false
        }
    );
    assert_eq!(
        driver.acknowledge(),
        PDC | DLLSC,
        "and no button: that may be read as a wish to remove"
    );
    assert!(driver.slot.link_active());
    driver.power_on();
    assert_eq!(driver.slot.plug(), Effects::default(), "known already");
    assert_eq!(driver.slot.status(), PDS);
    assert_eq!(driver.slot.state().power_indicator, Indicator::On);
}

#[test]
fn removal_as_linux_does_it() {
    let mut driver = Driver::new(true);
    let (asked, effects) = driver.slot.request();
    assert_eq!(asked, Ok(Removal::Asked));
    assert!(effects.interrupt && driver.slot.state().requested);
    assert_eq!(driver.acknowledge(), ABP);
    driver.blink();
    assert!(driver.slot.state().guest_is_busy());
    assert_eq!(driver.slot.request().0, Err(HotplugError::GuestBusy));
    driver.power_off();
    assert_eq!(driver.ejects, 1);
    let state = driver.slot.state();
    assert!(state.ejected && state.occupied && !state.requested && !state.powered);
    assert!(!driver.slot.link_active());
    assert_eq!(
        driver.slot.status(),
        PDS,
        "nothing that could be taken for something new"
    );
    assert_eq!(driver.slot.request().0, Ok(Removal::Unused));
    assert!(driver.slot.detach().interrupt);
    assert_eq!(driver.acknowledge(), PDC | DLLSC);
    assert!(!driver.slot.state().occupied);
    assert_eq!(driver.slot.request().0, Err(HotplugError::Empty));
}

#[test]
fn a_second_press_cancels() {
    let mut driver = Driver::new(true);
    let _ = driver.slot.request();
    driver.acknowledge();
    driver.blink();
    assert!(driver.slot.cancel().interrupt);
    assert_eq!(driver.acknowledge(), ABP);
    assert!(!driver.slot.state().requested);
    assert_eq!(driver.slot.cancel(), Effects::default(), "once");
    driver.command(0, 3 << 8, 1 << 8);
    driver.acknowledge();
    assert_eq!(driver.slot.request().0, Ok(Removal::Asked));
    assert_eq!((driver.ejects, driver.slot.status()), (0, PDS | ABP));
}

#[test]
fn a_press_nobody_saw_is_taken_back_and_can_be_repeated() {
    let mut slot = Controller::new(true);
    assert_eq!(slot.request(), (Ok(Removal::Asked), Effects::default()));
    let _ = slot.cancel();
    assert_eq!(slot.status(), PDS);
    // A driver that starts clears all events: what was asked before is lost, and asked again.
    let _ = slot.request();
    let _ = slot.write_status(0xffff);
    assert!(slot.state().requested);
    assert_eq!(slot.request().0, Ok(Removal::Asked));
    assert_eq!(slot.status(), PDS | ABP);
}

/// However far the driver has come with the press, it hears of another only when it has begun to blink.
#[test]
fn a_press_that_was_taken_back_is_followed_by_another_when_the_guest_blinks() {
    for heard_before in [false, true] {
        let mut driver = Driver::new(true);
        let _ = driver.slot.request();
        if heard_before {
            assert_eq!(driver.acknowledge(), ABP);
            assert_eq!(driver.slot.cancel(), Effects::default());
        } else {
            // It may have been read, and not cleared yet.
            assert_eq!(driver.slot.cancel(), Effects::default());
            assert_eq!(driver.acknowledge(), ABP);
        }
        assert_eq!(driver.slot.status(), PDS, "the second would be the first");
        driver.command(0, 3 << 8, 2 << 8);
        assert_eq!(driver.acknowledge(), ABP | CC);
        driver.command(0, 3 << 8, 1 << 8);
        assert_eq!(driver.acknowledge(), CC);
        assert_eq!((driver.ejects, driver.slot.state().requested), (0, false));
        // That is over: the next time it blinks for another reason.
        driver.blink();
        assert_eq!(driver.slot.status(), PDS);
    }
    // One that blinks first and clears then.
    let mut driver = Driver::new(true);
    let _ = driver.slot.request();
    driver.command(0, 3 << 8, 2 << 8);
    assert_eq!(driver.slot.cancel(), Effects::default());
    driver.interrupts = 0;
    assert_eq!(driver.acknowledge(), ABP | CC);
    assert_eq!((driver.slot.status(), driver.interrupts), (PDS | ABP, 1));
}

/// A second press would cancel the first.
#[test]
fn a_request_is_repeated_without_a_press_while_the_driver_has_the_first() {
    for withdraw in [false, true] {
        let mut driver = Driver::new(true);
        let _ = driver.slot.request();
        driver.acknowledge();
        if withdraw {
            let _ = driver.slot.cancel();
        }
        let (asked, effects) = driver.slot.request();
        assert_eq!(asked, Ok(Removal::Asked));
        assert_eq!((effects.interrupt, driver.slot.status()), (false, PDS));
        driver.blink();
        assert_eq!(driver.slot.status(), PDS, "wanted after all: {withdraw}");
        driver.power_off();
        assert_eq!(driver.ejects, 1);
    }
}

#[test]
fn a_driver_that_ends_takes_with_it_what_it_has_heard() {
    let mut driver = Driver::new(true);
    let _ = driver.slot.request();
    let _ = driver.slot.cancel();
    driver.command(0, 1 << 5, 0);
    assert_eq!(driver.slot.status() & ABP, 0, "nobody is to hear of it");
    let _ = driver.slot.request();
    driver.command(0, 1 << 5, 1 << 5);
    driver.acknowledge();
    driver.command(0, 1 << 5, 0);
    let _ = driver.slot.request();
    assert_eq!(driver.slot.status() & ABP, ABP, "the next driver has not");
}

#[test]
fn an_eject_that_is_not_wanted_is_something_new_in_the_slot() {
    let mut driver = Driver::new(true);
    driver.power_off();
    assert_eq!(driver.ejects, 1);
    assert!(driver.slot.plug().interrupt);
    assert_eq!(driver.acknowledge(), PDC | DLLSC);
    assert!(driver.slot.link_active() && !driver.slot.state().ejected);
    driver.power_on();
    driver.ejects = 0;
    driver.power_off();
    assert_eq!(driver.ejects, 1, "and may be ejected again");
}

#[test]
fn what_was_never_turned_on_needs_no_asking() {
    let mut slot = Controller::new(false);
    let _ = slot.plug();
    assert_eq!(slot.request().0, Ok(Removal::Unused));
    assert_eq!(slot.status() & ABP, 0, "a press would turn it on");
    // Writing "off" again is no eject: nobody turned it on.
    assert!(!slot.write_control(slot.control()).eject);
}

/// Before a driver listens. Linux's takes for on what its scan has found, and only turns on what is off.
#[test]
fn a_scan_turns_on_what_it_finds_and_a_driver_the_rest() {
    let mut slot = Controller::new(false);
    assert!(!slot.reach(), "empty");
    let _ = slot.plug();
    assert!(!slot.state().powered);
    assert!(slot.reach() && !slot.reach(), "once");
    assert_eq!(slot.control(), Controller::new(true).control());
    assert_eq!(slot.request().0, Ok(Removal::Asked));
    // It goes, and something else comes before there is a driver.
    let _ = slot.detach();
    let _ = slot.plug();
    assert!(!slot.state().powered);
    let mut driver = Driver::new(false);
    let _ = driver.slot.plug();
    assert!(!driver.slot.reach(), "the driver will");
    driver.power_on();
    driver.power_off();
    assert!(!driver.slot.reach());
    // A surprise while a driver listens is for the driver to clean up.
    let mut driver = Driver::new(true);
    let _ = driver.slot.detach();
    let _ = driver.slot.plug();
    assert!(driver.slot.state().powered);
}

#[test]
fn a_surprise_is_seen() {
    let mut driver = Driver::new(true);
    let _ = driver.slot.request();
    assert!(driver.slot.detach().interrupt || driver.slot.asserted);
    assert_eq!(driver.acknowledge(), PDC | DLLSC, "without the press");
}

#[test]
fn a_message_for_each_time_the_condition_becomes_true() {
    let mut slot = Controller::new(false);
    assert!(!slot.plug().interrupt, "not enabled");
    assert!(
        !slot.write_control(1 << 3).interrupt,
        "hot-plug interrupts are off"
    );
    assert!(
        slot.write_control(1 << 3 | 1 << 5).interrupt,
        "an event was pending"
    );
    assert!(!slot.detach().interrupt, "still true");
    assert!(!slot.write_status(PDC).interrupt);
    assert!(slot.plug().interrupt);
    let _ = slot.write_status(0xffff);
    assert!(
        slot.write_control(1 << 4 | 1 << 5).interrupt,
        "command completed"
    );
    assert_eq!(slot.status(), PDS | CC);
}

#[test]
fn an_indicator_keeps_its_state_when_zero_is_written() {
    let mut slot = Controller::new(true);
    let _ = slot.write_control(2 << 8 | 1 << 6);
    let _ = slot.write_control(0);
    assert_eq!(slot.control(), 2 << 8 | 1 << 6);
    let _ = slot.write_control(0xffff);
    assert_eq!(slot.control(), 0x17ff, "no interlock, no reserved bits");
}

#[derive(Clone, Debug)]
enum Step {
    Control(u16),
    Status(u16),
    Plug,
    Request,
    Cancel,
    Detach,
    Reach,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any::<u16>().prop_map(Step::Control),
        // Power and its indicator, in all their states.
        4 => (0u16..8).prop_map(|bits| Step::Control(bits << 8 | ENABLES)),
        3 => any::<u16>().prop_map(Step::Status),
        2 => Just(Step::Plug),
        2 => Just(Step::Request),
        1 => Just(Step::Cancel),
        1 => Just(Step::Detach),
        1 => Just(Step::Reach),
    ]
}

proptest! {
    /// Whatever happens: the link is up exactly for what is there and not ejected; an eject is told once for each time
    /// something is plugged, and only of what is there; a message means that something enabled is pending.
    #[test]
    fn invariants(present: bool, steps in prop::collection::vec(step(), 1..60)) {
        let mut slot = Controller::new(present);
        let mut may_eject = present;
        for step in steps {
            let before = slot.state();
            let effects = match step {
                Step::Control(value) => slot.write_control(value),
                Step::Status(value) => slot.write_status(value),
                Step::Plug => { may_eject = true; slot.plug() }
                Step::Request => slot.request().1,
                Step::Cancel => slot.cancel(),
                Step::Reach => {
                    slot.reach();
                    Effects::default()
                }
                Step::Detach => { may_eject = false; slot.detach() }
            };
            let after = slot.state();
            prop_assert_eq!(slot.link_active(), after.occupied && !after.ejected);
            prop_assert!(after.occupied || !after.ejected && !after.requested);
            prop_assert!(!(after.ejected && after.requested));
            if effects.eject {
                prop_assert!(may_eject && before.occupied && after.ejected);
                prop_assert!(!after.powered && after.power_indicator == Indicator::Off);
                may_eject = false;
            }
            if effects.interrupt {
                let mut enabled = slot.control() & 0x1f;
                if slot.control() & 1 << 12 != 0 {
                    enabled |= DLLSC;
                }
                prop_assert!(slot.control() & 1 << 5 != 0 && slot.status() & enabled != 0);
            }
            prop_assert_eq!(slot.status() & !(ABP | PDC | CC | PDS | DLLSC), 0);
            prop_assert_ne!(slot.control() & 3 << 8, 0);
            prop_assert_ne!(slot.control() & 3 << 6, 0);
        }
    }
}
