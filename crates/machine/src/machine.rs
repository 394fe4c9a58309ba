// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A built machine and what is done to all of it: power on, reset, end.
//!
//! It belongs to the control thread. Nothing here blocks that thread: what may block (loading the
//! kernel again) runs on the pool, what must be waited for is awaited.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ebbtide_bus::acpi;
use ebbtide_bus::pci::HostBridge;
use ebbtide_hypervisor::{BootState, ChipState, VcpuState, Vm};
use ebbtide_iothread::{Blocking, Local, Receiver};
use ebbtide_memory::{AddressSpace, Backing, Memory, PinnedRam};
use ebbtide_qmp::EventSink;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::events::{self, Cause};
use ebbtide_qmp::types::run_state::{RunState, ShutdownCause, Watchdog};
use ebbtide_virtio::mem::{MemError, MemStatus, VirtioMem};

use crate::Error;
use crate::boot::{self, BootImage, Entry};
use crate::build::BLOCKING_THREADS;
use crate::config::{DiskConfig, MachineConfig, MemoryDeviceConfig};
use crate::confine::Confinement;
use crate::cpus::{Cpus, Stay};
use crate::guest_ram::GuestRam;
use crate::hotplug::Devices;
use crate::layout::Layout;
use crate::lifecycle::{self, Ending, Posted, Request, Requests, Step};
use crate::platform::Platform;
use crate::provision::Provision;
use crate::reset::{Outcome, Progress};

/// Name of the RAM block the machine boots with.
pub(crate) const BOOT_RAM: &str = "ram";

/// One virtio-mem device with its place in the map.
pub struct MemorySlot {
    /// What was asked for.
    pub config: MemoryDeviceConfig,
    /// Where it lies in guest-physical memory.
    pub range: Range<u64>,
    pub(crate) device: Arc<VirtioMem>,
    pub(crate) ram: GuestRam,
    /// When the last target was set.
    asked: Cell<Instant>,
}

impl MemorySlot {
    pub(crate) fn new(
        config: MemoryDeviceConfig,
        range: Range<u64>,
        device: Arc<VirtioMem>,
        ram: GuestRam,
    ) -> MemorySlot {
        MemorySlot {
            config,
            range,
            device,
            ram,
            asked: Cell::new(Instant::now()),
        }
    }

    /// How the device is doing.
    pub fn status(&self) -> MemStatus {
        self.device.status()
    }

    /// Wants `bytes` plugged.
    ///
    /// # Errors
    /// A size that is no multiple of the block size or larger than the device.
    pub fn set_requested(&self, bytes: u64) -> Result<(), MemError> {
        self.device.set_requested(bytes)?;
        self.asked.set(Instant::now());
        Ok(())
    }

    /// Since the last target was set.
    pub fn target_age(&self) -> Duration {
        self.asked.get().elapsed()
    }

    /// QOM type of its backend.
    pub fn backend_type(&self) -> &'static str {
        match self.config.backing {
            Backing::Anon { .. } => "memory-backend-ram",
            Backing::Memfd { .. } | Backing::Hugetlb { .. } => "memory-backend-memfd",
            Backing::File { .. } => "memory-backend-file",
        }
    }
}

/// The state a reset goes back to.
pub(crate) struct PowerOn {
    pub(crate) chips: ChipState,
    pub(crate) cpus: Arc<Vec<VcpuState>>,
}

/// A virtual machine. See the module.
///
/// Fields are dropped in this order: vCPUs leave the guest first, then the devices go, then the
/// threads that served them, then memory.
pub struct Machine {
    pub(crate) cpus: Cpus,
    pub(crate) platform: Platform,
    pub(crate) bridge: Arc<HostBridge>,
    pub(crate) devices: Rc<Devices>,
    pub(crate) slots: Vec<MemorySlot>,
    pub(crate) blocking: Arc<Blocking>,
    pub(crate) confinement: Arc<Confinement>,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) system: Arc<AddressSpace>,
    /// What it boots with.
    pub(crate) ram: GuestRam,
    pub(crate) memory: Arc<Memory>,
    pub(crate) boot: Arc<BootImage>,
    pub(crate) tables: Arc<acpi::Tables>,
    pub(crate) power_on: PowerOn,
    pub(crate) layout: Arc<Layout>,
    pub(crate) config: MachineConfig,
    pub(crate) state: Cell<RunState>,
    pub(crate) resetting: Progress,
    pub(crate) requests: Requests,
    pub(crate) local: Local,
}

impl Machine {
    /// What the machine is doing.
    pub fn state(&self) -> RunState {
        self.state.get()
    }

    /// Where to ask for changes of the run state.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u64 {
        self.cpus.count() as u64
    }

    /// The host's numbers of the vCPUs' threads, by index.
    pub fn vcpu_threads(&self) -> &[i32] {
        self.cpus.thread_ids()
    }

    /// For each vCPU the longest that one exit has kept it out of the guest since this was last asked.
    pub fn take_longest_stays(&self) -> Vec<Stay> {
        self.cpus.take_longest_stays()
    }

    /// The memory core.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The virtio-mem devices in id order.
    pub fn memory_slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// The virtio-mem device with this id.
    pub fn memory_slot(&self, id: &str) -> Option<&MemorySlot> {
        self.slots.iter().find(|s| s.config.id == id)
    }

    /// The disks.
    pub fn disks(&self) -> &[DiskConfig] {
        &self.config.disks
    }

    /// Bytes of RAM at boot.
    pub fn boot_ram_bytes(&self) -> u64 {
        self.config.ram.size_bytes
    }

    /// Bytes plugged in all memory devices, DIMMs included.
    pub fn plugged_bytes(&self) -> u64 {
        let sizes = self.slots.iter().map(|s| s.status().plugged_bytes);
        let dimms = self.devices.dimm_infos().into_iter().map(|d| d.size_bytes);
        sizes.chain(dimms).sum()
    }

    /// Loads the kernel and puts the vCPUs to its entry. They must be parked.
    pub(crate) async fn load(&self) -> Result<(), Error> {
        let entry = self.load_boot_image().await?;
        let power_on = Arc::clone(&self.power_on.cpus);
        let results = self
            .cpus
            .each(move |index, vcpu| {
                let state = power_on.get(index).ok_or("no saved state".to_owned())?;
                vcpu.restore(state).map_err(|e| e.to_string())?;
                if index == 0 {
                    vcpu.set_boot_state(&boot_state(entry))
                        .map_err(|e| e.to_string())?;
                }
                Ok::<(), String>(())
            })
            .await;
        for (index, result) in results.into_iter().enumerate() {
            result.map_err(|e| Error::part(format!("vcpu{index}: power-on state"), e))?;
        }
        Ok(())
    }

    async fn load_boot_image(&self) -> Result<Entry, Error> {
        let boot = Arc::clone(&self.boot);
        let layout = Arc::clone(&self.layout);
        let tables = Arc::clone(&self.tables);
        let (system, ram) = (Arc::clone(&self.system), self.ram.block());
        self.blocking
            .run(move || {
                let reader = system.memory().register();
                let guard = system.read(&reader);
                guard
                    .write_bytes(ebbtide_memory::Gpa(tables.address), &tables.bytes)
                    .map_err(|e| Error::part("ACPI tables", e))?;
                drop(guard);
                let view =
                    PinnedRam::new(&system, &reader).map_err(|e| Error::part("boot RAM", e))?;
                let entry = boot.load(&view, &layout, tables.address);
                // Without a log the view marks nothing itself.
                ram.mark_dirty(0..ram.size_bytes());
                entry
            })
            .await
    }

    /// Starts the guest for the first time. From here on the calling thread is confined as the configuration wants it.
    ///
    /// # Errors
    /// When the kernel does not fit or a vCPU refuses its state.
    pub async fn start(&self, events: &EventSink) -> Result<(), Error> {
        self.confinement
            .seal(&self.blocking, BLOCKING_THREADS)
            .await?;
        self.devices.serve(events, self.ram_gauge());
        let provision = Provision {
            memory: Arc::downgrade(&self.memory),
            blocking: Arc::downgrade(&self.blocking),
            requests: self.requests.clone(),
            local: self.local.clone(),
        };
        self.local.spawn(provision.watch()).detach();
        self.load().await?;
        self.take(Step::Go, events).await;
        Ok(())
    }

    /// Tells how much memory the guest has when its balloon is empty. It keeps no device.
    fn ram_gauge(&self) -> impl Fn() -> u64 + 'static {
        let boot = self.boot_ram_bytes();
        let devices: Vec<_> = self
            .slots
            .iter()
            .map(|slot| Arc::downgrade(&slot.device))
            .collect();
        move || {
            let devices = devices.iter().filter_map(Weak::upgrade);
            boot + devices.map(|d| d.status().plugged_bytes).sum::<u64>()
        }
    }

    /// Serves requests that change the run state until one ends the VM.
    pub async fn run(&self, mut incoming: Receiver<Posted>, events: &EventSink) -> Ending {
        loop {
            // None: all senders are gone, which only happens when the machine falls apart.
            let cause = match incoming.recv().await {
                Some(posted) => match self.requests.receive(posted) {
                    Some(request) => self.apply(request, events).await,
                    None => None,
                },
                None => Some(ShutdownCause::HostError),
            };
            if let Some(cause) = cause {
                return self.end(cause, events).await;
            }
        }
    }

    /// Does what `request` asks for and answers who waits; Some: the VM is to end.
    async fn apply(&self, request: Request, events: &EventSink) -> Option<ShutdownCause> {
        let state = self.state();
        let no_reboot = self.config.no_reboot;
        // Who waits for an answer may have gone; nothing depends on it being heard.
        match request {
            Request::Stop(done) => {
                let cause = self.take(lifecycle::on_stop(state), events).await;
                let _ = done.send(());
                cause
            }
            Request::Continue(done) => match lifecycle::on_continue(state) {
                Ok(step) => {
                    let cause = self.take(step, events).await;
                    let _ = done.send(Ok(()));
                    cause
                }
                Err(reason) => {
                    let _ = done.send(Err(reason));
                    None
                }
            },
            Request::Reset { cause } => {
                self.take(lifecycle::on_reset(state, cause, no_reboot), events)
                    .await
            }
            Request::PowerButton => self.take(Step::Button, events).await,
            Request::Shutdown { cause } => Some(cause),
            Request::Watchdog(action) => {
                events.emit(events::WATCHDOG.with(Watchdog { action }));
                self.take(lifecycle::on_watchdog(state, action, no_reboot), events)
                    .await
            }
            Request::MemoryLost(reason) => {
                let step = lifecycle::on_memory_lost(state);
                if step != Step::Nothing {
                    tracing::error!("the guest is stopped: {reason}");
                }
                self.take(step, events).await
            }
            Request::Cpu(event) => {
                event.log();
                self.take(lifecycle::on_cpu(state, &event, no_reboot), events)
                    .await
            }
        }
    }

    /// Takes one step; Some: the VM is to end.
    async fn take(&self, step: Step, events: &EventSink) -> Option<ShutdownCause> {
        match step {
            Step::Nothing => {}
            Step::Halt(state) => {
                self.cpus.park().await;
                self.halted(state, events);
            }
            Step::Go => {
                self.mark_paused().await;
                self.set_running();
                events.emit(events::RESUME.with(Empty {}));
            }
            Step::Reset { cause, then_run } => {
                match self.reset(cause).await {
                    Ok(Outcome::Fresh) => {}
                    Ok(Outcome::Ended(cause)) => return Some(cause),
                    Err(e) => {
                        tracing::error!("reset failed: {e}");
                        self.halted(RunState::InternalError, events);
                        return None;
                    }
                }
                events.emit(events::RESET.with(Cause::new(cause)));
                if then_run {
                    self.set_running();
                } else {
                    self.state.set(RunState::Paused);
                }
            }
            Step::Button => {
                self.platform.press_power_button();
                events.emit(events::POWERDOWN.with(Empty {}));
            }
            Step::End(cause) => return Some(cause),
        }
        None
    }

    /// The guest runs.
    fn set_running(&self) {
        self.state.set(RunState::Running);
        self.stand_still(false);
        self.cpus.run();
    }

    /// Time that devices measure for the guest, or of it, stands still, or goes on.
    fn stand_still(&self, still: bool) {
        self.devices.stand_still(still);
        for slot in &self.slots {
            match still {
                true => slot.device.guest_stopped(),
                false => slot.device.guest_runs(),
            }
        }
    }

    /// The vCPUs are parked and stay so, because of `state`.
    fn halted(&self, state: RunState, events: &EventSink) {
        self.stand_still(true);
        let before = self.state.replace(state);
        if lifecycle::halt_is_news(before) {
            events.emit(events::STOP.with(Empty {}));
        }
    }

    /// After a stop, tells the guest's lock-up detectors that its time stood still on purpose.
    async fn mark_paused(&self) {
        if !matches!(self.state(), RunState::Paused | RunState::Watchdog) {
            return;
        }
        for result in self.cpus.each(|_, vcpu| vcpu.mark_paused()).await {
            if let Err(e) = result {
                tracing::debug!("the guest can't be told of the pause: {e}");
            }
        }
    }

    async fn end(&self, cause: ShutdownCause, events: &EventSink) -> Ending {
        self.cpus.park().await;
        self.state.set(RunState::Shutdown);
        events.emit(events::SHUTDOWN.with(Cause::new(cause)));
        let undrained = self.devices.end().await;
        self.devices.flush_chardevs().await;
        self.platform.flush(&self.local).await;
        Ending { cause, undrained }
    }
}

fn boot_state(entry: Entry) -> BootState {
    BootState::long_mode(
        entry.rip,
        entry.rsi,
        boot::STACK,
        boot::PAGE_TABLES,
        boot::GDT,
    )
}
