// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a [`MachineConfig`] to a [`Machine`], part by part.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use ebbtide_block::{Cache, Disk, DiskSpec};
use ebbtide_bus::acpi;
use ebbtide_bus::pci::{HostBridge, IntxWires, PciError, Windows};
use ebbtide_device::GuestEject;
use ebbtide_devices::dimm::{DimmArea, DimmBank, SECTION_BYTES};
use ebbtide_hypervisor::{Vm, kvm};
use ebbtide_iothread::{Blocking, IoThread, Local, Receiver, Remote, Sender, channel};
use ebbtide_memory::{AddressSpace, Gpa, Memory, MemoryConfig, RamSpec, Region};
use ebbtide_net::Launcher;
use ebbtide_qmp::types::run_state::RunState;
use ebbtide_virtio::blk::{BlkSpec, VirtioBlk};
use ebbtide_virtio::mem::{MemEvent, MemSpec, VirtioMem};
use ebbtide_virtio::{VirtioDevice, VirtioPci};

use crate::boot::BootImage;
use crate::config::{DiskConfig, MachineConfig, MemoryDeviceConfig};
use crate::confine::{Confinement, Kind};
use crate::cpus::Cpus;
use crate::guest_ram::{GuestRam, RAM_PRIORITY, Shown};
use crate::hotplug::{Announced, AnyUse, BlockNode, Devices, Face, Made, Place, Surface};
use crate::layout::{ACPI_TABLES, ECAM, Layout, PCI_IO, PCI_MMIO32, SPARE_BUSES};
use crate::lifecycle::{Posted, Requests};
use crate::machine::{BOOT_RAM, Machine, MemorySlot, PowerOn};
use crate::platform::{Board, EVENT_GSI, INTX_GSIS, Platform, SERIAL_GSI};
use crate::{Error, host};

/// Address space kept for RAM blocks beyond what the machine has at once, for blocks that come
/// later: addresses are not used twice.
const ARENA_SPARE: u64 = 4 << 40;
/// Threads for jobs that may block.
pub(crate) const BLOCKING_THREADS: usize = 2;

/// A machine with what must be served beside it.
pub struct Built {
    /// The machine, not started.
    pub machine: Machine,
    /// For [`Machine::run`].
    pub requests: Receiver<Posted>,
    /// Size changes of memory devices.
    pub memory_events: Receiver<MemEvent>,
}

/// What may take long is done: files are opened, memory is populated. Nothing outside of the
/// process shows it yet: it can be given up at any time.
pub struct Prepared {
    config: MachineConfig,
    boot: Arc<BootImage>,
    vm: Arc<dyn Vm>,
    layout: Arc<Layout>,
    parts: Parts,
    slots: Vec<MemorySlot>,
    memory_events: Receiver<MemEvent>,
    launcher: Option<Launcher>,
}

impl Prepared {
    /// Does it. `launcher` starts the programs of backends; without one, backends that need it are refused.
    ///
    /// # Errors
    /// Names the option or the part that can't be had.
    pub fn new(config: MachineConfig, launcher: Option<Launcher>) -> Result<Prepared, Error> {
        config.validate()?;
        host::admit_boot_ram(config.ram.size_bytes, &config.ram.backing)?;
        let confinement = Confinement::new(&config)?;
        let boot = Arc::new(BootImage::open(config.boot.clone())?);
        let vm: Arc<dyn Vm> = kvm::open(kvm::DEFAULT_PATH)
            .and_then(|kvm| kvm.create_vm())
            .map_err(|e| Error::part("KVM", e))?;
        let sizes: Vec<u64> = config.memory_devices.iter().map(|d| d.size_bytes).collect();
        let layout = Arc::new(Layout::new(
            config.ram.size_bytes,
            &sizes,
            config.ram.dimm_slots,
            vm.limits().phys_bits,
        )?);
        let (memory_sender, memory_events) = channel();
        let mut parts = Parts::new(&config, &layout, &vm, confinement)?;
        let slots = parts.memory_devices(&config, &layout, &*vm, &memory_sender)?;
        parts.disks(&config, &*vm)?;
        Ok(Prepared {
            config,
            boot,
            vm,
            layout,
            parts,
            slots,
            memory_events,
            launcher,
        })
    }

    /// Makes it a machine of the control thread: the board with its serial port, the vCPUs.
    ///
    /// # Errors
    /// As [`Prepared::new`].
    pub async fn build(self, local: &Local) -> Result<Built, Error> {
        let Prepared {
            config,
            boot,
            vm,
            layout,
            mut parts,
            slots,
            memory_events,
            launcher,
        } = self;
        let (sender, requests) = channel();
        let sender = Requests::new(sender);
        let surface = Surface {
            bridge: Arc::clone(&parts.bridge),
            system: Arc::clone(&parts.system),
            msi: vm.msi(),
            blocking: Arc::clone(&parts.blocking),
            requests: sender.clone(),
            confinement: Arc::clone(&parts.confinement),
            launcher: launcher.map(Arc::new),
        };
        let threads = std::mem::take(&mut parts.threads);
        let devices = Devices::new(surface, threads, local, config.drain_timeout)
            .map_err(|e| Error::part("devices", e))?;
        let platform = Platform::new(
            &config.serial,
            config.ram.dimm_slots,
            &Board {
                vm: &*vm,
                memory: &parts.memory,
                ports: &parts.port_root,
                bridge: &parts.bridge,
            },
            &sender,
            devices.ejector(),
            local,
        )?;
        devices.set_root_slots(platform.pci_hotplug());
        if let Some(registers) = platform.memory_hotplug() {
            let area = DimmArea {
                range: layout.dimms.clone(),
                unit_bytes: SECTION_BYTES,
                priority: RAM_PRIORITY,
            };
            let bank = DimmBank::new(&parts.memory, &parts.root, registers, area);
            devices.set_dimms(bank.map_err(|e| Error::part("DIMM slots", e))?);
        }
        for cold in parts.functions.drain(..) {
            cold.plug(&devices)?;
        }
        devices.add_cold(&config).await?;
        parts
            .bridge
            .assign_bars()
            .map_err(|e| Error::part("PCI", e))?;
        let last_bus = parts
            .bridge
            .highest_bus_in_use()
            .saturating_add(SPARE_BUSES);
        // A reset programs what was plugged since, too, and the tables stay as they are.
        parts.bridge.set_last_bus(last_bus);
        let tables = Arc::new(tables(&config, &layout, last_bus)?);
        let (cpus, power_on) = processors(&config, &vm, &parts, &sender)?;
        let Parts {
            memory,
            ram,
            system,
            bridge,
            blocking,
            confinement,
            ..
        } = parts;
        let machine = Machine {
            cpus,
            platform,
            bridge,
            devices,
            slots,
            blocking,
            confinement,
            vm,
            system,
            ram,
            memory,
            boot,
            tables,
            power_on,
            layout,
            config,
            state: Cell::new(RunState::PreLaunch),
            resetting: Default::default(),
            requests: sender,
            local: local.clone(),
        };
        Ok(Built {
            machine,
            requests,
            memory_events,
        })
    }
}

/// Memory devices stay: their size is what comes and goes.
const MEM: &str = "virtio-mem-pci";
const BLK: &str = "virtio-blk-pci";

/// A function that is there from the start.
struct ColdFunction {
    id: String,
    driver: &'static str,
    removable: bool,
    function: Arc<VirtioPci>,
    /// The node of a disk.
    node: Option<BlockNode>,
}

impl ColdFunction {
    fn plug(self, devices: &Devices) -> Result<(), Error> {
        let bus = Arc::clone(devices.bridge().bus());
        let at = bus
            .free_slot()
            .ok_or_else(|| Error::part(&self.id, PciError::Full))?;
        let place = Place {
            slot: devices.slot_at(&bus, None, at, self.removable),
            bus,
            at,
            parent: None,
            instance: None,
        };
        let mut uses: Vec<Box<dyn AnyUse>> = Vec::new();
        let mut face = Face::Plain;
        if let Some(node) = self.node {
            face = Face::Disk {
                node: self.id.clone(),
            };
            // Named like its device, as its user has named only that.
            let failures = devices.news().disk.clone();
            node.disk().tell_failures(&self.id, failures);
            let taken = devices.blocks().add(&self.id, node);
            let node = taken.and_then(|()| devices.blocks().take(&self.id, &self.id));
            uses.push(Box::new(node.map_err(|e| Error::part(&self.id, e.desc))?));
        }
        let made = Made {
            uses,
            face,
            ..Made::new(self.function)
        };
        devices
            .plug(
                Some(&self.id),
                self.driver,
                made,
                place,
                GuestEject::default(),
                Announced::AtBoot,
            )
            .map_err(|e| Error::part(&self.id, e.desc))?;
        Ok(())
    }
}

/// The machine while it is being put together.
struct Parts {
    memory: Arc<Memory>,
    root: Arc<Region>,
    ram: GuestRam,
    system: Arc<AddressSpace>,
    port_root: Arc<Region>,
    ports: Arc<AddressSpace>,
    bridge: Arc<HostBridge>,
    functions: Vec<ColdFunction>,
    threads: BTreeMap<String, IoThread>,
    blocking: Arc<Blocking>,
    confinement: Arc<Confinement>,
}

impl Parts {
    /// Memory with boot RAM, both address spaces, the PCI host bridge.
    fn new(
        config: &MachineConfig,
        layout: &Layout,
        vm: &Arc<dyn Vm>,
        confinement: Arc<Confinement>,
    ) -> Result<Parts, Error> {
        let failed = |e: ebbtide_memory::Error| Error::part("memory", e);
        let devices: u64 = config.memory_devices.iter().map(|d| d.size_bytes).sum();
        let arena_bytes = config
            .ram
            .size_bytes
            .saturating_add(devices)
            .saturating_add(ARENA_SPARE);
        let memory = confinement.within(Kind::Grace, || {
            Memory::new(MemoryConfig { arena_bytes }).map_err(failed)
        })?;
        let root = Region::container("system", 1 << 64);
        let system = memory.address_space("memory", &root).map_err(failed)?;
        let port_root = Region::container("io", 1 << 16);
        let ports = memory.address_space("I/O", &port_root).map_err(failed)?;
        system
            .add_listener(vm.memory_listener(), 0)
            .map_err(failed)?;
        ports.add_listener(vm.port_listener(), 0).map_err(failed)?;
        let ram = add_ram(config, layout, &memory, &root)?;
        let windows = Windows {
            mmio32: PCI_MMIO32,
            mmio64: layout.mmio64.clone(),
            io: PCI_IO,
        };
        let bridge = HostBridge::new(&memory, windows).map_err(|e| Error::part("PCI", e))?;
        let ecam = Region::mmio("pcie-ecam", ECAM.end - ECAM.start, bridge.ecam());
        memory
            .update(|t| {
                t.add(&root, bridge.container(), 0, HostBridge::PRIORITY)?;
                t.add(&root, &ecam, ECAM.start, 0)?;
                t.add(&port_root, bridge.io_container(), 0, HostBridge::PRIORITY)
            })
            .map_err(failed)?;
        wire_interrupts(&bridge, &**vm)?;
        let blocking = confinement.within(Kind::Blocking, || {
            Blocking::new("blocking", BLOCKING_THREADS).map_err(|e| Error::part("threads", e))
        })?;
        Ok(Parts {
            memory,
            root,
            ram,
            system,
            port_root,
            ports,
            bridge,
            functions: Vec::new(),
            threads: BTreeMap::new(),
            blocking: Arc::new(blocking),
            confinement,
        })
    }

    fn iothread(&mut self, name: &str) -> Result<Remote, Error> {
        let thread = self.confinement.iothread(name)?;
        let remote = thread.remote();
        self.threads.insert(name.to_owned(), thread);
        Ok(remote)
    }

    /// Puts `device` on the bus.
    fn plug(
        &mut self,
        id: &str,
        driver: &'static str,
        device: Arc<dyn VirtioDevice>,
        vm: &dyn Vm,
        remote: &Remote,
        node: Option<BlockNode>,
    ) -> Result<(), Error> {
        let function = VirtioPci::new(id, device, &self.system, &*vm.msi(), remote)
            .map_err(|e| Error::part(id, e))?;
        self.functions.push(ColdFunction {
            id: id.to_owned(),
            driver,
            removable: driver != MEM,
            function,
            node,
        });
        Ok(())
    }

    /// One virtio-mem device after the other, each with a thread of its own: freeing memory takes
    /// time that no disk should wait for.
    fn memory_devices(
        &mut self,
        config: &MachineConfig,
        layout: &Layout,
        vm: &dyn Vm,
        events: &Sender<MemEvent>,
    ) -> Result<Vec<MemorySlot>, Error> {
        let mut slots = Vec::new();
        for (device, range) in config.memory_devices.iter().zip(&layout.device_memory) {
            let ram = self.sparse_ram(device, range.start)?;
            let remote = self.iothread(&format!("io-{}", device.id))?;
            let spec = MemSpec {
                node: Some(device.node),
                requested_bytes: device.requested_bytes,
                populate: device.prefault,
                ..MemSpec::new(&device.id, &ram.block(), Gpa(range.start))
            };
            let blocking = Arc::clone(&self.blocking);
            let virtio = VirtioMem::new(spec, remote.clone(), blocking, events.clone())
                .map_err(|e| Error::part(&device.id, e))?;
            self.plug(&device.id, MEM, Arc::clone(&virtio) as _, vm, &remote, None)?;
            slots.push(MemorySlot::new(device.clone(), range.clone(), virtio, ram));
        }
        Ok(slots)
    }

    fn sparse_ram(&self, device: &MemoryDeviceConfig, at: u64) -> Result<GuestRam, Error> {
        let failed = |e: ebbtide_memory::Error| Error::part(&device.id, e);
        let block = self
            .memory
            .ram()
            .add(RamSpec {
                name: device.memdev.clone(),
                size_bytes: device.size_bytes,
                max_size_bytes: device.size_bytes,
                backing: device.backing.clone(),
                prefault: false,
                block_size_bytes: Some(device.block_size_bytes),
            })
            .map_err(failed)?;
        GuestRam::new(&self.memory, &self.root, block, Shown::At(at)).map_err(failed)
    }

    /// All disks, served by one thread.
    fn disks(&mut self, config: &MachineConfig, vm: &dyn Vm) -> Result<(), Error> {
        if config.disks.is_empty() {
            return Ok(());
        }
        let remote = self.iothread("io-disks")?;
        for disk in &config.disks {
            // Who opens a block device may start a thread for it.
            let opened = self
                .confinement
                .within(Kind::Blocking, || open_disk(disk))?;
            let spec = BlkSpec {
                serial: disk.serial.clone(),
                ..BlkSpec::new(&disk.id)
            };
            let path = disk.path.to_string_lossy();
            let node = BlockNode::opened(&disk.id, &opened, &path, disk.direct);
            let device = VirtioBlk::new(spec, opened, remote.clone());
            self.plug(&disk.id, BLK, device as _, vm, &remote, Some(node))?;
        }
        Ok(())
    }
}

fn open_disk(disk: &DiskConfig) -> Result<Arc<Disk>, Error> {
    Disk::open(&DiskSpec {
        readonly: disk.readonly,
        cache: if disk.direct {
            Cache::None
        } else {
            Cache::Writeback
        },
        ..DiskSpec::new(&disk.path)
    })
    .map(Arc::new)
    .map_err(|e| Error::part(format!("disk {}", disk.id), e))
}

/// One block of boot RAM, shown below and above the 32-bit hole.
fn add_ram(
    config: &MachineConfig,
    layout: &Layout,
    memory: &Arc<Memory>,
    root: &Arc<Region>,
) -> Result<GuestRam, Error> {
    let failed = |e: ebbtide_memory::Error| Error::part("memory", e);
    let block = memory
        .ram()
        .add(RamSpec {
            name: BOOT_RAM.into(),
            size_bytes: config.ram.size_bytes,
            max_size_bytes: config.ram.size_bytes,
            backing: config.ram.backing.clone(),
            prefault: config.ram.prefault,
            block_size_bytes: None,
        })
        .map_err(failed)?;
    let parts = ["ram-low", "ram-high"].into_iter().zip(layout.ram());
    GuestRam::new(memory, root, block, Shown::Parts(parts.collect())).map_err(failed)
}

/// Gives the interrupt pins of PCI functions their inputs of the interrupt controller.
fn wire_interrupts(bridge: &HostBridge, vm: &dyn Vm) -> Result<(), Error> {
    let mut inputs = Vec::new();
    for gsi in INTX_GSIS {
        let line = vm
            .irq_line(gsi)
            .map_err(|e| Error::part(format!("interrupt line {gsi}"), e))?;
        inputs.push((gsi, line));
    }
    if let Some(wires) = IntxWires::new(inputs) {
        bridge.wire_interrupts(wires);
    }
    Ok(())
}

fn tables(config: &MachineConfig, layout: &Layout, last_bus: u8) -> Result<acpi::Tables, Error> {
    let on_node_0 = |range: &std::ops::Range<u64>| acpi::MemoryRange {
        range: range.clone(),
        node: 0,
    };
    let description = acpi::Description {
        cpus: (0..config.cpus)
            .map(|apic_id| acpi::Cpu { apic_id, node: 0 })
            .collect(),
        ram: layout.ram().iter().map(on_node_0).collect(),
        hotplug: layout.device_memory.iter().map(on_node_0).collect(),
        dimms: (config.ram.dimm_slots > 0).then(|| acpi::Dimms {
            slots: config.ram.dimm_slots,
            area: on_node_0(&layout.dimms),
        }),
        ecam: acpi::Ecam {
            base: ECAM.start,
            last_bus,
        },
        windows: Windows {
            mmio32: PCI_MMIO32,
            mmio64: layout.mmio64.clone(),
            io: PCI_IO,
        },
        pci_hotplug: true,
        serial: Some(acpi::SerialPort {
            port: ebbtide_devices::serial::SerialPort::COM1,
            gsi: SERIAL_GSI,
        }),
        event_gsi: EVENT_GSI,
        intx_gsis: INTX_GSIS.collect(),
    };
    let tables = description
        .build(ACPI_TABLES.start)
        .map_err(|e| Error::part("ACPI tables", e))?;
    let room = ACPI_TABLES.end - ACPI_TABLES.start;
    if tables.bytes.len() as u64 > room {
        return Err(Error::part(
            "ACPI tables",
            format!("{} bytes, there is room for {room}", tables.bytes.len()),
        ));
    }
    Ok(tables)
}

/// vCPUs with their threads, and the state they power on in.
fn processors(
    config: &MachineConfig,
    vm: &Arc<dyn Vm>,
    parts: &Parts,
    requests: &Requests,
) -> Result<(Cpus, PowerOn), Error> {
    let limit = vm.limits().vcpus;
    if config.cpus > limit {
        return Err(Error::Config(format!(
            "cpus={}: this host's KVM takes {limit}",
            config.cpus
        )));
    }
    let mut vcpus = Vec::new();
    let mut states = Vec::new();
    for index in 0..config.cpus {
        let failed = |e| Error::part(format!("vcpu{index}"), e);
        let vcpu = vm.create_vcpu(index, config.cpus).map_err(failed)?;
        states.push(vcpu.save().map_err(failed)?);
        vcpus.push(vcpu);
    }
    let chips = vm
        .save_chips()
        .map_err(|e| Error::part("interrupt controllers", e))?;
    let cpus = Cpus::start(
        vcpus,
        &parts.system,
        &parts.ports,
        requests,
        &parts.confinement,
    )?;
    let power_on = PowerOn {
        chips,
        cpus: Arc::new(states),
    };
    Ok((cpus, power_on))
}
