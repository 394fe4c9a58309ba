// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The watchdog of the Intel 6300ESB (data sheet 300641-004, 16): two stages, the first of which can interrupt.
//!
//! ```text
//! guest ── BAR 0, configuration space ── gate ──▶ Watchdog ── registers.rs ──┬─▶ Orders ──▶ task (timer.rs)
//!                                                     ▲                      └─▶ InterruptPin   │
//!                                                     └────────────── Handle ◀──────────────────┘
//!                                                     └─▶ bark(Action): WDT_TOUT#
//! ```
//!
//! The task that keeps the time has a handle to the device only: a timer of a watchdog that is being removed finds a
//! shut gate, and the removal ends when the task has ended. While the machine is stopped, so is the time
//! ([`I6300Esb::pause`]).
//!
//! Locks: the registers, then the orders, the interrupt pin or what the bark takes.
//!
//! Linux: `i6300esb` (a module in Debian).

mod action;
mod registers;
#[doc(hidden)] // for the models only
pub mod timer;

use std::future::Future;
use std::sync::Arc;

use ebbtide_bus::gated::{self, all_ones};
use ebbtide_bus::irq::IrqLine;
use ebbtide_bus::pci::{BarKind, BarSpec, Config, Function, Ids, InterruptPin, IntxPin};
use ebbtide_gate::{Entry, Gate, Owned};
use ebbtide_iothread::Remote;
use ebbtide_memory::{Mmio, Region};

pub use self::action::{Action, SharedAction};
use self::registers::{CONFIG_DWORDS, Registers, Timer};
use self::timer::{Orders, Runs};
use crate::Error;
use crate::sync::{Mutex, lock};

const IDS: Ids = Ids {
    vendor: 0x8086,
    device: 0x25ab,
    revision: 0,
    class: 0x08_80_00,
    subsystem_vendor: 0,
    subsystem: 0,
};
const BAR: u8 = 0;
/// The registers are the first 16 bytes; a BAR is a page.
const BAR_BYTES: u64 = 4096;

/// What is called when WDT_TOUT# falls, on the iothread, with the registers locked: after a reset of them nothing that was
/// due before is heard of. It must only post a message.
pub type Bark = Box<dyn Fn(Action) + Send + Sync>;

/// The watchdog on the PCI bus.
///
/// [`close`](Self::close) shuts its gate, which is the one of its [`Config`].
pub struct I6300Esb {
    watchdog: Owned<Watchdog>,
    config: Config,
    orders: Arc<Orders>,
    /// Held by the task that keeps the time.
    clock: Arc<Gate>,
}

struct Watchdog {
    pin: Arc<InterruptPin>,
    orders: Arc<Orders>,
    action: Arc<SharedAction>,
    bark: Bark,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    registers: Registers,
    runs: Runs,
}

impl I6300Esb {
    /// A watchdog on a function called `name`, with its time from the executor behind `remote`. When the guest has
    /// not answered it calls `bark` with what `action` is then.
    ///
    /// # Errors
    /// The function cannot be made, or the executor is stopping.
    pub fn new(
        name: &str,
        remote: &Remote,
        action: &Arc<SharedAction>,
        bark: Bark,
    ) -> Result<Arc<I6300Esb>, Error> {
        let (pin, orders) = (InterruptPin::new(IntxPin::A), Arc::<Orders>::default());
        let watchdog = Owned::new(
            name,
            Watchdog {
                pin: Arc::clone(&pin),
                orders: Arc::clone(&orders),
                action: Arc::clone(action),
                bark,
                state: Mutex::default(),
            },
        );
        let mut config = Config::new(watchdog.gate(), IDS);
        config.add_interrupt_pin(&pin);
        let spec = BarSpec {
            size_bytes: BAR_BYTES,
            kind: BarKind::Mem32,
        };
        let region = Region::mmio(name, BAR_BYTES, gated::registers(watchdog.handle()));
        config.add_bar(BAR, spec, region)?;
        let clock = Gate::new(format!("{name}-clock"));
        let device = I6300Esb {
            watchdog,
            config,
            orders,
            clock,
        };
        device.start_clock(remote)?;
        Ok(Arc::new(device))
    }

    fn start_clock(&self, remote: &Remote) -> Result<(), Error> {
        let (orders, handle) = (Arc::clone(&self.orders), self.watchdog.handle());
        let lease = self.clock.enter(Entry::Io);
        let task = remote.spawn(move |local| async move {
            let expired = |run| {
                if let Some(watchdog) = handle.enter(Entry::Io) {
                    watchdog.expired(run);
                }
            };
            timer::serve(&local, &orders, expired).await;
            drop(lease);
        });
        task.map_err(|source| Error::Stopped {
            name: self.gate().name().to_owned(),
            thread: remote.name().to_owned(),
            source,
        })
    }

    /// The gate of the function; [`close`](Self::close) shuts it.
    pub fn gate(&self) -> &Arc<Gate> {
        self.watchdog.gate()
    }

    /// Stops its time, for a machine that is stopped. Idempotent.
    pub fn pause(&self) {
        self.orders.set(|order| order.paused = true);
    }

    /// Its time goes on.
    pub fn resume(&self) {
        self.orders.set(|order| order.paused = false);
    }

    /// Ends the driver's use of the watchdog as a reset does, at once: a timer that has run off does nothing any more, so
    /// the future is ready. For a reset of the machine, with the vCPUs stopped.
    pub fn quiesce(&self) -> impl Future<Output = ()> + Send + 'static {
        self.watchdog.get().change(|registers| {
            registers.reset();
            (Timer::Stop, ())
        });
        std::future::ready(())
    }

    /// Takes the function away from the guest: from now on its registers read all ones and take no writes, and no timer
    /// of it does anything. The future is ready when nothing of it is in use any more and its task has ended.
    /// Idempotent.
    pub fn close(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        self.watchdog.close();
        self.orders.close();
        self.clock.close();
        let this = Arc::clone(self);
        async move {
            this.gate().drained().await;
            this.clock.drained().await;
            this.watchdog.get().pin.set(false);
        }
    }
}

impl Function for I6300Esb {
    fn config(&self) -> &Config {
        &self.config
    }

    fn read_config(&self, offset: u16, size: u8) -> u32 {
        if !CONFIG_DWORDS.contains(&offset) {
            return self.config.read(offset, size);
        }
        let dword = lock(&self.watchdog.get().state)
            .registers
            .config(offset & !3);
        // Within a dword: the bus lets nothing else through.
        dword >> (8 * (offset & 3)) & all_ones(size) as u32
    }

    fn write_config(&self, offset: u16, size: u8, value: u32) {
        if !CONFIG_DWORDS.contains(&offset) {
            return self.config.write(offset, size, value);
        }
        let shift = 8 * (offset & 3);
        let mask = (all_ones(size) as u32) << shift;
        self.watchdog.get().change(|registers| {
            let timer = registers.set_config(offset & !3, mask, value << shift);
            (timer, ())
        });
    }

    fn reset(&self) {
        drop(self.quiesce());
        self.config.reset();
    }
}

impl Drop for I6300Esb {
    fn drop(&mut self) {
        self.orders.close();
    }
}

impl Watchdog {
    /// Changes the registers, and what follows from them: the pin and the timer.
    fn change<T>(&self, change: impl FnOnce(&mut Registers) -> (Timer, T)) -> T {
        let mut state = lock(&self.state);
        let (timer, result) = change(&mut state.registers);
        self.follow(&mut state, timer);
        result
    }

    /// The run numbered `run` has come to its end, unless the guest has ordered something else meanwhile.
    fn expired(&self, run: u64) {
        let mut state = lock(&self.state);
        if !state.runs.is_latest(run) {
            return;
        }
        let (timer, barks) = state.registers.expire();
        self.follow(&mut state, timer);
        if barks {
            (self.bark)(self.action.get());
        }
    }

    /// Under the lock of the state: orders and levels follow in the order of the changes.
    fn follow(&self, state: &mut State, timer: Timer) {
        self.pin.set(state.registers.interrupt());
        match timer {
            Timer::Keep => {}
            Timer::Stop => state.runs.order(&self.orders, None),
            Timer::Run(length) => state.runs.order(&self.orders, Some(length)),
        }
    }
}

impl Mmio for Watchdog {
    fn read(&self, offset: u64, size: u8) -> u64 {
        lock(&self.state).registers.read(offset, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.change(|registers| (registers.write(offset, size, value), ()));
    }
}
