// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine without a guest: boot memory and virtio-mem devices whose "driver" follows the requested size
//! at a set pace, as far as it is let, and devices that come and go. Clients can be tried on it.

pub mod plug;
pub mod server;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ebbtide_iothread::Local;
use ebbtide_qmp::commands::*;
use ebbtide_qmp::schema::{Command, Empty};
use ebbtide_qmp::types::ebbtide::{Memory, MemoryDevice, Resize, ResizeState, Status};
use ebbtide_qmp::types::events::{self, Cause, MemoryDeviceSizeChange};
use ebbtide_qmp::types::memory::{MemoryDeviceInfo, MemorySizeSummary, VirtioMemDeviceInfo};
use ebbtide_qmp::types::monitor::VersionInfo;
use ebbtide_qmp::types::qom::ObjectPropertyInfo;
use ebbtide_qmp::types::run_state::{RunState, ShutdownCause, StatusInfo};
use ebbtide_qmp::{CommandTable, EventSink, QmpError, hmp};
use serde_json::Value;

/// Waits `value` milliseconds before it answers with it.
pub const TOY_SLEEP: Command<ToyNumber, u64> = Command::new("x-toy-sleep");
/// Waits `value` milliseconds, for the client only.
pub const TOY_WAIT: Command<ToyNumber, u64> = Command::new("x-toy-wait");
/// Answers how many wait.
pub const TOY_WAITING: Command<Empty, u64> = Command::new("x-toy-waiting");
/// Answers with a text of `value` bytes.
pub const TOY_TEXT: Command<ToyNumber, String> = Command::new("x-toy-text");
/// Emits `value` RESUME events.
pub const TOY_EVENTS: Command<ToyNumber, Empty> = Command::new("x-toy-events");
/// Emits MEMORY_DEVICE_SIZE_CHANGE of vmem0 with the size `value`.
pub const TOY_SIZE: Command<ToyNumber, Empty> = Command::new("x-toy-size");

/// An argument.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ToyNumber {
    pub value: u64,
}

impl ebbtide_qmp::schema::Qapi for ToyNumber {
    const TYPE: ebbtide_qmp::schema::Type =
        ebbtide_qmp::schema::Type::Object(&ebbtide_qmp::schema::ObjectInfo {
            name: "ToyNumber",
            members: &[ebbtide_qmp::schema::Member {
                name: "value",
                ty: ebbtide_qmp::schema::Type::Int,
                optional: false,
            }],
            variants: None,
            open: false,
        });
}

/// What the toy has.
#[derive(Debug, Clone)]
pub struct ToyConfig {
    pub boot_bytes: u64,
    pub devices: Vec<ToyDevice>,
    /// How much each driver plugs or unplugs every 10 ms.
    pub step_bytes: u64,
    /// What the guest does when it is asked to let go of a device.
    pub guest: plug::Guest,
    /// Whether it is like QEMU and keeps no list of removals.
    pub without_removals: bool,
}

#[derive(Debug, Clone)]
pub struct ToyDevice {
    pub id: String,
    pub max_bytes: u64,
    /// Past this the driver does not follow: with 0 it never begins ("stalled"), else it ends "partial".
    pub follows_up_to: u64,
}

impl Default for ToyConfig {
    fn default() -> Self {
        let device = ToyDevice {
            id: "vmem0".into(),
            max_bytes: 7680 << 20,
            follows_up_to: u64::MAX,
        };
        Self {
            boot_bytes: 512 << 20,
            devices: vec![device],
            step_bytes: 64 << 20,
            guest: plug::Guest::default(),
            without_removals: false,
        }
    }
}

const BLOCK_BYTES: u64 = 2 << 20;
const STEP: Duration = Duration::from_millis(10);

struct Device {
    config: ToyDevice,
    address: u64,
    requested: Cell<u64>,
    size: Cell<u64>,
    requested_at: Cell<Instant>,
}

/// The machine.
pub struct Toy {
    config: ToyConfig,
    local: Local,
    events: EventSink,
    state: Cell<RunState>,
    devices: Vec<Device>,
    plugged: plug::Plugged,
    /// Why it is to end, once it is.
    pub quit: RefCell<Option<ShutdownCause>>,
    /// Held by those who wait.
    waiting: Rc<()>,
}

impl Toy {
    /// A machine that runs, its drivers at work.
    pub fn start(local: &Local, events: EventSink, config: ToyConfig) -> Rc<Toy> {
        let devices = config
            .devices
            .iter()
            .enumerate()
            .map(|(index, device)| Device {
                config: device.clone(),
                address: (index as u64 + 1) << 32,
                requested: Cell::new(0),
                size: Cell::new(0),
                requested_at: Cell::new(local.now()),
            });
        let toy = Rc::new(Toy {
            devices: devices.collect(),
            config: config.clone(),
            plugged: plug::Plugged::default(),
            local: local.clone(),
            events,
            state: Cell::new(RunState::Running),
            quit: RefCell::default(),
            waiting: Rc::default(),
        });
        let weak = Rc::downgrade(&toy);
        let clock = local.clone();
        local
            .spawn(async move {
                loop {
                    clock.sleep(STEP).await;
                    let Some(toy) = weak.upgrade() else { return };
                    toy.devices.iter().for_each(|device| toy.step(device));
                }
            })
            .detach();
        toy
    }

    fn step(&self, device: &Device) {
        let goal = device.requested.get().min(device.config.follows_up_to);
        let size = device.size.get();
        let step = self.config.step_bytes;
        let next = if size < goal {
            goal.min(size + step)
        } else {
            goal.max(size.saturating_sub(step))
        };
        if next != size {
            device.size.set(next);
            self.announce(device, next);
        }
    }

    fn announce(&self, device: &Device, size: u64) {
        self.events.emit(
            events::MEMORY_DEVICE_SIZE_CHANGE.with(MemoryDeviceSizeChange {
                id: Some(device.config.id.clone()),
                size,
                qom_path: format!("/machine/peripheral/{}", device.config.id),
            }),
        );
    }

    fn plugged(&self) -> u64 {
        self.devices.iter().map(|device| device.size.get()).sum()
    }

    fn device(&self, path: &str) -> Result<&Device, QmpError> {
        let id = path.strip_prefix("/machine/peripheral/").unwrap_or(path);
        self.devices
            .iter()
            .find(|device| device.config.id == id)
            .ok_or_else(|| QmpError::device_not_found(path))
    }

    fn get(&self, path: &str, property: &str) -> Result<Value, QmpError> {
        if let Some(value) = self.plugged.get(path, property) {
            return value;
        }
        let device = self.device(path)?;
        match property {
            "type" => Ok("virtio-mem-pci".into()),
            "requested-size" => Ok(device.requested.get().into()),
            "size" => Ok(device.size.get().into()),
            "block-size" => Ok(BLOCK_BYTES.into()),
            _ => Err(QmpError::property_not_found("virtio-mem-pci", property)),
        }
    }

    fn set_requested(&self, path: &str, property: &str, bytes: u64) -> Result<(), QmpError> {
        let device = self.device(path)?;
        self.get(path, property)?;
        if property != "requested-size" {
            return Err(QmpError::generic(format!(
                "Property 'virtio-mem-pci.{property}' is not writable"
            )));
        }
        if !bytes.is_multiple_of(BLOCK_BYTES) || bytes > device.config.max_bytes {
            return Err(QmpError::generic(format!(
                "'requested-size' {bytes:#x} is not a multiple of 'block-size' or too large"
            )));
        }
        device.requested.set(bytes);
        device.requested_at.set(self.local.now());
        Ok(())
    }

    fn list(&self, path: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
        let own = || ObjectPropertyInfo::new("type", "string");
        match path {
            "/machine/peripheral" => {
                let children = self.devices.iter().map(|d| {
                    ObjectPropertyInfo::new(d.config.id.as_str(), "child<virtio-mem-pci>")
                });
                let plugged = self.plugged.children();
                Ok(std::iter::once(own())
                    .chain(children)
                    .chain(plugged)
                    .collect())
            }
            _ if self.plugged.has(path) => Ok(std::iter::once(own())
                .chain(self.plugged.property(path))
                .collect()),
            _ => {
                self.device(path)?;
                let sizes = ["requested-size", "size", "block-size"]
                    .map(|name| ObjectPropertyInfo::new(name, "size"));
                Ok(std::iter::once(own()).chain(sizes).collect())
            }
        }
    }

    fn memory_devices(&self) -> Vec<MemoryDeviceInfo> {
        let info = |device: &Device| {
            MemoryDeviceInfo::VirtioMem(VirtioMemDeviceInfo {
                id: Some(device.config.id.clone()),
                memaddr: device.address,
                requested_size: device.requested.get(),
                size: device.size.get(),
                max_size: device.config.max_bytes,
                block_size: BLOCK_BYTES,
                node: 0,
                memdev: format!("/objects/mem-{}", device.config.id),
            })
        };
        let dimms = self.plugged.dimms();
        self.devices.iter().map(info).chain(dimms).collect()
    }

    fn summary(&self) -> MemorySizeSummary {
        MemorySizeSummary {
            base_memory: self.config.boot_bytes,
            plugged_memory: Some(self.plugged()),
        }
    }

    fn memory(&self) -> Memory {
        let device = |device: &Device| MemoryDevice {
            id: device.config.id.clone(),
            kind: "virtio-mem".into(),
            node: 0,
            memaddr: device.address,
            block_size: BLOCK_BYTES,
            requested: device.requested.get(),
            size: device.size.get(),
            max: device.config.max_bytes,
        };
        let (boot, plugged) = (self.config.boot_bytes, self.plugged());
        let max = boot
            + self
                .devices
                .iter()
                .map(|device| device.config.max_bytes)
                .sum::<u64>();
        Memory {
            boot,
            plugged,
            total: boot + plugged,
            max,
            rss: 10 << 20,
            devices: self.devices.iter().map(device).collect(),
        }
    }

    fn resize(&self, id: &str) -> Result<Resize, QmpError> {
        let device = self.device(id)?;
        let (target, plugged, limit) = (
            device.requested.get(),
            device.size.get(),
            device.config.follows_up_to,
        );
        let (state, reason) = match () {
            () if plugged == target => (ResizeState::Reached, None),
            () if plugged != target.min(limit) => (ResizeState::Working, None),
            () if plugged == 0 => (ResizeState::Stalled, Some("no driver in the guest")),
            () => (ResizeState::Partial, Some("the guest has no room for more")),
        };
        let since_ms = self
            .local
            .now()
            .duration_since(device.requested_at.get())
            .as_millis() as u64;
        Ok(Resize {
            id: id.to_owned(),
            target,
            plugged,
            state,
            reason: reason.map(str::to_owned),
            since_ms,
        })
    }

    fn set_state(&self, state: RunState) {
        if self.state.replace(state) != state {
            let event = if state == RunState::Running {
                &events::RESUME
            } else {
                &events::STOP
            };
            self.events.emit(event.with(Empty {}));
        }
    }

    fn end(&self, cause: ShutdownCause) {
        self.events.emit(events::SHUTDOWN.with(Cause::new(cause)));
        *self.quit.borrow_mut() = Some(cause);
    }

    fn human(&self, line: &str) -> String {
        let done = |result: Result<(), QmpError>| {
            result.map_or_else(|error| hmp::error(&error), |()| String::new())
        };
        let command = match hmp::parse(line) {
            Ok(command) => command,
            Err(text) => return text,
        };
        match command {
            hmp::Command::Text(text) => text,
            hmp::Command::Info(info) => match info {
                hmp::Info::Status => hmp::status(&StatusInfo::new(self.state.get())),
                hmp::Info::Version => hmp::version(&VersionInfo::ebbtide()),
                hmp::Info::MemoryDevices => hmp::memory_devices(&self.memory_devices()),
                hmp::Info::MemorySizeSummary => hmp::memory_size_summary(&self.summary()),
                hmp::Info::Mtree { flat } => format!("address-space: memory (flat: {flat})\r\n"),
                hmp::Info::RamBlock => "              Block Name\r\n".to_owned(),
                // There are none.
                hmp::Info::Block => hmp::block(&[]),
                hmp::Info::Pci => hmp::pci(&[]),
                hmp::Info::Cpus => hmp::cpus(&[]),
                hmp::Info::Iothreads => hmp::iothreads(&[]),
                hmp::Info::Balloon => hmp::error(&QmpError::no_balloon()),
                hmp::Info::Qtree => String::new(),
            },
            // There is no PCI.
            hmp::Command::InjectError { id, .. } => hmp::error(&QmpError::device_not_found(&id)),
            hmp::Command::Stop => {
                self.set_state(RunState::Paused);
                String::new()
            }
            hmp::Command::Cont => {
                self.set_state(RunState::Running);
                String::new()
            }
            hmp::Command::SystemReset | hmp::Command::SystemPowerdown => String::new(),
            hmp::Command::Quit => {
                self.end(ShutdownCause::HostQmpQuit);
                String::new()
            }
            hmp::Command::QomList { path } => {
                match self.list(path.as_deref().unwrap_or("/machine/peripheral")) {
                    Ok(list) => hmp::properties(&list),
                    Err(error) => hmp::error(&error),
                }
            }
            hmp::Command::QomGet { path, property } => match self.get(&path, &property) {
                Ok(value) => format!("{value}\r\n"),
                Err(error) => hmp::error(&error),
            },
            hmp::Command::QomSet {
                path,
                property,
                value,
            } => done(
                value
                    .to_size(&property)
                    .and_then(|bytes| self.set_requested(&path, &property, bytes)),
            ),
        }
    }
}

/// The commands the toy carries out.
pub fn commands(toy: Rc<Toy>) -> CommandTable<Toy> {
    plug::add(CommandTable::new(toy))
        .on(QUERY_STATUS, async |toy, _, Empty {}| {
            Ok(StatusInfo::new(toy.state.get()))
        })
        .on(STOP, async |toy, _, Empty {}| {
            Ok({
                toy.set_state(RunState::Paused);
                Empty {}
            })
        })
        .on(CONT, async |toy, _, Empty {}| {
            Ok({
                toy.set_state(RunState::Running);
                Empty {}
            })
        })
        .on(SYSTEM_RESET, async |toy, _, Empty {}| {
            toy.events
                .emit(events::RESET.with(Cause::new(ShutdownCause::HostQmpSystemReset)));
            Ok(Empty {})
        })
        .on(SYSTEM_POWERDOWN, async |toy, _, Empty {}| {
            Ok({
                toy.events.emit(events::POWERDOWN.with(Empty {}));
                Empty {}
            })
        })
        .on(QUIT, async |toy, _, Empty {}| {
            Ok({
                toy.end(ShutdownCause::HostQmpQuit);
                Empty {}
            })
        })
        .on(QOM_LIST, async |toy, _, arguments| {
            toy.list(&arguments.path)
        })
        .on(QOM_GET, async |toy, _, arguments| {
            toy.get(&arguments.path, &arguments.property)
        })
        .on(QOM_SET, async |toy, _, arguments| {
            let refused =
                || QmpError::generic(format!("Parameter '{}' expects uint64", arguments.property));
            let bytes = arguments.value.as_u64().ok_or_else(refused)?;
            toy.set_requested(&arguments.path, &arguments.property, bytes)
                .map(|()| Empty {})
        })
        .on(QUERY_MEMORY_DEVICES, async |toy, _, Empty {}| {
            Ok(toy.memory_devices())
        })
        .on(QUERY_MEMORY_SIZE_SUMMARY, async |toy, _, Empty {}| {
            Ok(toy.summary())
        })
        .on(HUMAN_MONITOR_COMMAND, async |toy, _, arguments| {
            Ok(toy.human(&arguments.command_line))
        })
        .on(EBBTIDE_QUERY_STATUS, async |toy, _, Empty {}| {
            Ok(Status {
                status: toy.state.get(),
                reset: None,
                vcpus: 2,
                pid: std::process::id().into(),
                version: env!("CARGO_PKG_VERSION").into(),
            })
        })
        .on(EBBTIDE_QUERY_MEMORY, async |toy, _, Empty {}| {
            Ok(toy.memory())
        })
        .on(EBBTIDE_QUERY_RESIZE, async |toy, _, arguments| {
            toy.resize(&arguments.id)
        })
        .on(TOY_SLEEP, async |toy, _, ToyNumber { value }| {
            toy.local.sleep(Duration::from_millis(value)).await;
            Ok(value)
        })
        .on(TOY_WAIT, async |toy, _, ToyNumber { value }| {
            let _waiting = Rc::clone(&toy.waiting);
            toy.local.sleep(Duration::from_millis(value)).await;
            Ok(value)
        })
        .waits(TOY_WAIT)
        .on(TOY_WAITING, async |toy, _, Empty {}| {
            Ok(Rc::strong_count(&toy.waiting) as u64 - 1)
        })
        .on(TOY_TEXT, async |_, _, ToyNumber { value }| {
            Ok("x".repeat(value as usize))
        })
        .on(TOY_EVENTS, async |toy, _, ToyNumber { value }| {
            (0..value).for_each(|_| toy.events.emit(events::RESUME.with(Empty {})));
            Ok(Empty {})
        })
        .on(TOY_SIZE, async |toy, _, ToyNumber { value }| {
            let device = toy
                .devices
                .first()
                .ok_or_else(|| QmpError::device_not_found("vmem0"))?;
            toy.announce(device, value);
            Ok(Empty {})
        })
}
