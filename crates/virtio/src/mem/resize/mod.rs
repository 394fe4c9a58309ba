// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A resize as a transaction: from a target to "reached" or to the reason why not.
//!
//! A pure state machine: it is told what happens and when, and says what to do ([`Resize::poll`]) and when to ask again
//! ([`Resize::wake_at`]). It has no clock, no lock and no thread.
//!
//! ```text
//!             target set, driver at work             plugged = target
//!            ┌──────────────────────────► Working ─────────────────────► Reached
//!            │                            │     ▲                           │
//!            │   idle or gone for too long│     │ it moves again            │ new target
//!            │                            ▼     │                           │
//!            └───────────────────── Partial(why), Stalled(why) ◄────────────┘
//! ```
//!
//! A driver that has stopped short of its target is told again that there is one, by a configuration interrupt. Linux
//! itself sleeps 50 to 300 s after a failure, or for good. But every configuration interrupt makes it drop what it is
//! doing: a driver that is working must be left alone, or it never gets anything done. So only a driver that has been
//! silent is told, after a pause that doubles as long as nothing comes of it. How long a driver is silent when it works
//! depends on the guest, so the pauses grow with the longest silence that something came of.

use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::request::{Answer, RequestKind};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The biggest unit in which a Linux that can give back parts of a memory block does so.
const SUB_BLOCK_MAX_BYTES: u64 = 4 * MIB;
/// The smallest memory block of Linux on x86: below it a driver that has never sent a request may see nothing to do.
const MEMORY_BLOCK_BYTES: u64 = 128 * MIB;
/// How much memory Linux adds before it waits for some to be brought online: the larger of 1 GiB and two memory blocks
/// (of at most 2 GiB).
const OFFLINE_LIMITS_BYTES: [u64; 3] = [GIB, 2 * GIB, 4 * GIB];

/// When a silent driver is told again, and when the wait is called a stall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pacing {
    /// Silence before a driver that should grow is told again.
    pub grow_pause: Duration,
    /// The same for one that should shrink; longer, for it may be moving pages between two requests.
    pub shrink_pause: Duration,
    /// Pauses double up to this.
    pub pause_max: Duration,
    /// After so many times without effect the driver is left alone.
    pub kicks_max: u32,
    /// A driver that has got nowhere for so long is stalled.
    pub patience: Duration,
    /// A guest without a driver for so long will not get one by waiting.
    pub absent_patience: Duration,
}

impl Default for Pacing {
    fn default() -> Pacing {
        Pacing {
            grow_pause: Duration::from_secs(1),
            shrink_pause: Duration::from_secs(2),
            pause_max: Duration::from_secs(30),
            kicks_max: 12,
            patience: Duration::from_secs(10),
            absent_patience: Duration::from_secs(60),
        }
    }
}

/// What is known of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverState {
    /// None has started the device since the last reset.
    Absent,
    /// One has.
    Ready,
    /// It broke the rules so that the device has stopped, or was told an error it does not recover from.
    Broken,
}

/// Why a target is not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No driver has started the device.
    NoDriver,
    /// The driver or its queue is in a state only a guest reboot mends.
    DriverBroken,
    /// The guest does not bring new memory online.
    NotOnlined,
    /// The rest is smaller than what the driver moves at a time.
    Granularity,
    /// The guest cannot free the memory that is left.
    Unmovable,
    /// The host did not give or take the memory.
    HostMemory,
    /// Something that maps the memory for a device (VFIO, vhost-user) refuses it.
    MapperRefused,
    /// Devices still transfer data to or from memory the guest gives back.
    IoInFlight,
    /// The driver does not go on and gives no sign why; a guest that lacks memory to manage more memory does that.
    DriverIdle,
}

impl Reason {
    /// One word, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Reason::NoDriver => "no-driver",
            Reason::DriverBroken => "driver-broken",
            Reason::NotOnlined => "not-onlined",
            Reason::Granularity => "granularity",
            Reason::Unmovable => "unmovable",
            Reason::HostMemory => "host-memory",
            Reason::MapperRefused => "mapper-refused",
            Reason::IoInFlight => "io-in-flight",
            Reason::DriverIdle => "driver-idle",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::NoDriver => "the guest has no virtio-mem driver running",
            Reason::DriverBroken => "the guest's virtio-mem driver has failed; a reboot of the guest mends it",
            Reason::NotOnlined => "the guest does not bring new memory online (memhp_default_state=online_movable does)",
            Reason::Granularity => "the rest is smaller than the unit the guest plugs and unplugs memory in",
            Reason::Unmovable => "the guest cannot free the memory that is left",
            Reason::HostMemory => "the host cannot provide or release the memory",
            Reason::MapperRefused => "what maps the memory for a device refuses it",
            Reason::IoInFlight => "devices are still transferring data in memory the guest gives back",
            Reason::DriverIdle => "the guest does not go on and does not say why",
        })
    }
}

/// Where a resize stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Plugged is what was requested.
    Reached,
    /// The driver is at it, or is expected to be.
    Working,
    /// It went some way and stopped.
    Partial(Reason),
    /// It did not get anywhere.
    Stalled(Reason),
}

/// What prevented a request from being fulfilled, on this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setback {
    HostMemory,
    MapperRefused,
    IoInFlight,
}

/// A request the driver got an answer to.
#[derive(Debug, Clone)]
pub(crate) struct Answered {
    pub kind: RequestKind,
    /// The blocks it named, as offsets.
    pub range: Option<Range<u64>>,
    pub answer: Answer,
    pub setback: Option<Setback>,
    /// What is plugged now.
    pub plugged: u64,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Interrupt the driver because of its configuration.
    Kick,
    /// Tell the operator.
    Report(Progress),
}

#[derive(Debug)]
pub(crate) struct Resize {
    pacing: Pacing,
    target: u64,
    plugged: u64,
    /// What was plugged when this target, or this driver, came.
    from: u64,
    driver: DriverState,
    /// A request is being worked on since.
    begun: Option<Instant>,
    /// The driver has been silent since, or was told again then.
    quiet_from: Instant,
    /// How long it had been silent when it sent its last request.
    silence: Duration,
    /// The longest silence of this driver that progress came of: so long it works between two requests.
    works_for: Duration,
    /// When something last went forward, or was given a new chance.
    hope: Instant,
    /// Kicks since then.
    fruitless: u32,
    /// Why the last request that failed did, until one succeeds.
    setback: Option<Setback>,
    /// The driver was told an error since its last request.
    erred: bool,
    /// Greatest common divisor of all blocks this driver has named; 0: none so far.
    granule: u64,
    /// The most this driver has had plugged.
    most: u64,
    /// What the operator was told.
    reported: Option<Progress>,
    /// When the driver last sent a request.
    last_request: Option<Instant>,
    /// The guest does not run since: nothing can be expected of its driver.
    stopped: Option<Instant>,
}

impl Resize {
    pub(crate) fn new(pacing: Pacing, target: u64, now: Instant) -> Resize {
        Resize {
            pacing,
            target,
            plugged: 0,
            from: 0,
            driver: DriverState::Absent,
            begun: None,
            quiet_from: now,
            silence: Duration::ZERO,
            works_for: Duration::ZERO,
            hope: now,
            fruitless: 0,
            setback: None,
            erred: false,
            granule: 0,
            most: 0,
            // Before a driver came, that a target is not reached is no news.
            reported: Some(if target == 0 {
                Progress::Reached
            } else {
                Progress::Working
            }),
            last_request: None,
            stopped: None,
        }
    }

    /// The guest does not run any more: no time passes until it does.
    pub(crate) fn guest_stopped(&mut self, now: Instant) {
        self.stopped.get_or_insert(now);
    }

    /// The guest runs again.
    pub(crate) fn guest_runs(&mut self, now: Instant) {
        let Some(stopped) = self.stopped.take() else {
            return;
        };
        let stood = now.saturating_duration_since(stopped);
        // What happened meanwhile happened at this moment, by the guest's time.
        let later = |at: Instant| (at + stood).min(now);
        self.quiet_from = later(self.quiet_from);
        self.hope = later(self.hope);
        self.begun = self.begun.map(later);
    }

    pub(crate) fn driver(&self) -> DriverState {
        if self.erred {
            DriverState::Broken
        } else {
            self.driver
        }
    }

    /// When the driver last sent a request.
    pub(crate) fn last_request(&self) -> Option<Instant> {
        self.last_request
    }

    /// Where the resize stands, for who asks.
    pub(crate) fn progress(&self) -> Progress {
        match self.reported {
            _ if self.plugged == self.target => Progress::Reached,
            Some(Progress::Partial(_) | Progress::Stalled(_)) => self.shortfall(),
            _ => Progress::Working,
        }
    }

    /// The operator wants `target`, the old one or another: the driver gets an interrupt for it.
    pub(crate) fn target_set(&mut self, now: Instant, target: u64) {
        self.target = target;
        self.from = self.plugged;
        self.setback = None;
        self.reported = None;
        self.new_chance(now);
    }

    /// The operator wants the driver told again.
    pub(crate) fn retried(&mut self, now: Instant) {
        self.new_chance(now);
        self.stall_over();
    }

    /// A driver has started the device.
    pub(crate) fn driver_ready(&mut self, now: Instant) {
        self.driver = DriverState::Ready;
        self.driver_changed(now);
    }

    /// The device was reset.
    pub(crate) fn driver_gone(&mut self, now: Instant) {
        self.driver = DriverState::Absent;
        self.driver_changed(now);
    }

    /// The device was stopped by what the driver did.
    pub(crate) fn driver_broken(&mut self, now: Instant) {
        self.driver = DriverState::Broken;
        self.driver_changed(now);
    }

    /// A system reset took all memory back.
    pub(crate) fn emptied(&mut self, now: Instant, plugged: u64) {
        self.plugged = plugged;
        self.from = plugged;
        self.new_chance(now);
        self.stall_over();
    }

    /// A request has arrived.
    pub(crate) fn request_begun(&mut self, now: Instant) {
        self.begun = Some(now);
        self.silence = now.saturating_duration_since(self.quiet_from);
        self.last_request = Some(now);
        self.erred = false;
    }

    /// It will not be answered, for the driver has gone.
    pub(crate) fn request_dropped(&mut self, now: Instant, plugged: u64) {
        self.begun = None;
        self.plugged = plugged;
        self.quiet_from = now;
    }

    /// It was answered.
    pub(crate) fn request_answered(&mut self, now: Instant, answered: &Answered) {
        let Answered {
            kind,
            range,
            answer,
            setback,
            plugged,
        } = answered;
        self.begun = None;
        self.quiet_from = now;
        let changes = matches!(kind, RequestKind::Plug | RequestKind::Unplug);
        if let (true, Some(range)) = (changes, range) {
            self.granule = gcd(self.granule, gcd(range.start, range.end));
        }
        match answer {
            Answer::Ack => self.setback = None,
            Answer::Busy => self.setback = *setback,
            // Linux does not mind an error about a state.
            Answer::Error => self.erred = changes,
            Answer::Nack | Answer::State(_) => {}
        }
        let before = self.distance();
        self.plugged = *plugged;
        self.most = self.most.max(*plugged);
        if self.distance() < before {
            self.works_for = self.works_for.max(self.silence);
            self.hope = now;
            self.fruitless = 0;
            self.stall_over();
        }
    }

    /// What to do now; to be asked until there is nothing.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Action> {
        if self.plugged == self.target {
            return self.report(Progress::Reached);
        }
        if self.reported.is_none_or(|told| told == Progress::Reached) {
            // Nobody waits to be told that work goes on, unless they were told otherwise.
            self.reported = Some(Progress::Working);
        }
        if self.stall_at().is_some_and(|at| at <= now) {
            return self.report(self.shortfall());
        }
        if self.kick_at().is_some_and(|at| at <= now) {
            self.quiet_from = now;
            self.fruitless += 1;
            return Some(Action::Kick);
        }
        None
    }

    /// When to ask again, if nothing happens before.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        [self.stall_at(), self.kick_at()]
            .into_iter()
            .flatten()
            .min()
    }

    fn report(&mut self, progress: Progress) -> Option<Action> {
        let news = self.reported != Some(progress);
        self.reported = Some(progress);
        news.then_some(Action::Report(progress))
    }

    fn kick_at(&self) -> Option<Instant> {
        let idle =
            self.stopped.is_none() && self.driver() == DriverState::Ready && self.begun.is_none();
        if !idle || self.distance() == 0 || self.fruitless >= self.pacing.kicks_max {
            return None;
        }
        Some(self.quiet_from + self.pause())
    }

    fn pause(&self) -> Duration {
        let first = if self.grows() {
            self.pacing.grow_pause
        } else {
            self.pacing.shrink_pause
        };
        // Twice what it takes when it works; but what lasts longer than patience counts as a stall.
        let first = first.max(self.works_for.saturating_mul(2).min(self.pacing.patience));
        let factor = 1_u32.checked_shl(self.fruitless).unwrap_or(u32::MAX);
        first.saturating_mul(factor).min(self.pacing.pause_max)
    }

    /// When the wait is to be called a stall; `None` when that has been said, or there is nothing to wait for.
    fn stall_at(&self) -> Option<Instant> {
        if self.stopped.is_some()
            || self.distance() == 0
            || matches!(
                self.reported,
                Some(Progress::Partial(_) | Progress::Stalled(_))
            )
        {
            return None;
        }
        Some(match (self.driver(), self.begun) {
            (DriverState::Broken, _) => self.quiet_from,
            (DriverState::Absent, _) => self.hope + self.pacing.absent_patience,
            (DriverState::Ready, Some(begun)) => begun + self.pacing.patience,
            (DriverState::Ready, None) => {
                let patience = self.hope + self.pacing.patience;
                // Told twice more and still silent: what is evident needs less patience.
                if self.fruitless > 1 && self.is_evident() {
                    patience.min(self.quiet_from + self.pacing.shrink_pause)
                } else {
                    patience
                }
            }
        })
    }

    /// The reason follows from what was seen rather than from the lack of another.
    fn is_evident(&self) -> bool {
        matches!(self.reason(), Reason::Granularity | Reason::NotOnlined)
    }

    fn shortfall(&self) -> Progress {
        let reason = self.reason();
        let driverless = matches!(reason, Reason::NoDriver | Reason::DriverBroken);
        if self.plugged.abs_diff(self.from) > 0
            && self.distance() < self.target.abs_diff(self.from)
            && !driverless
        {
            Progress::Partial(reason)
        } else {
            Progress::Stalled(reason)
        }
    }

    fn reason(&self) -> Reason {
        match self.driver() {
            DriverState::Absent => return Reason::NoDriver,
            DriverState::Broken => return Reason::DriverBroken,
            DriverState::Ready => {}
        }
        match self.setback {
            Some(Setback::HostMemory) => return Reason::HostMemory,
            Some(Setback::MapperRefused) => return Reason::MapperRefused,
            Some(Setback::IoInFlight) => return Reason::IoInFlight,
            None if self.begun.is_some() && !self.grows() => return Reason::IoInFlight,
            None if self.begun.is_some() => return Reason::HostMemory,
            None => {}
        }
        if self.grows() {
            self.reason_not_to_grow()
        } else {
            self.reason_not_to_shrink()
        }
    }

    fn reason_not_to_grow(&self) -> Reason {
        let rest = self.distance();
        let unit = if self.granule == 0 {
            MEMORY_BLOCK_BYTES
        } else {
            self.granule
        };
        if rest < unit {
            return Reason::Granularity;
        }
        let waits_for_online = OFFLINE_LIMITS_BYTES.iter().any(|limit| {
            let near = limit - MEMORY_BLOCK_BYTES..=limit + MEMORY_BLOCK_BYTES;
            near.contains(&self.plugged) && self.most <= *near.end()
        });
        if waits_for_online {
            Reason::NotOnlined
        } else {
            Reason::DriverIdle
        }
    }

    /// A driver that gives back only whole memory blocks and one that cannot free parts of the last one look alike;
    /// the latter is what happens.
    fn reason_not_to_shrink(&self) -> Reason {
        let unit = if self.granule == 0 {
            SUB_BLOCK_MAX_BYTES
        } else {
            self.granule.min(SUB_BLOCK_MAX_BYTES)
        };
        if self.distance() < unit {
            Reason::Granularity
        } else {
            Reason::Unmovable
        }
    }

    fn grows(&self) -> bool {
        self.target > self.plugged
    }

    fn distance(&self) -> u64 {
        self.target.abs_diff(self.plugged)
    }

    fn new_chance(&mut self, now: Instant) {
        self.hope = now;
        self.quiet_from = now;
        self.fruitless = 0;
    }

    fn stall_over(&mut self) {
        if matches!(
            self.reported,
            Some(Progress::Partial(_) | Progress::Stalled(_))
        ) {
            self.reported = Some(Progress::Working);
        }
    }

    fn driver_changed(&mut self, now: Instant) {
        self.begun = None;
        self.erred = false;
        self.works_for = Duration::ZERO;
        self.granule = 0;
        self.most = self.plugged;
        self.from = self.plugged;
        self.setback = None;
        self.new_chance(now);
        self.stall_over();
    }
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;
