// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a machine is made of, as plain data, and the checks that need no machine.

use std::path::PathBuf;
use std::time::Duration;

use ebbtide_devices::chardev::ChardevSpec;
use ebbtide_memory::Backing;
use ebbtide_qmp::types::block::BlockdevOptions;
use ebbtide_qmp::types::chardev::ChardevAdd;
use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::net::NetdevAdd;
use ebbtide_qmp::types::qom::ObjectAdd;

use crate::Error;
use crate::boot::BootSpec;
use crate::confine::ConfinementConfig;
use crate::hotplug::drivers::is_id;
use crate::layout::MIB;
use crate::machine::BOOT_RAM;

/// Boot RAM and devices are multiples of this: the size of an x86 large page, and of the
/// default virtio-mem block.
pub const MEMORY_GRANULE: u64 = 2 * MIB;
/// The kernel, its tables and an initrd need at least this.
pub const MIN_RAM: u64 = 32 * MIB;
/// Longer nobody waits for requests in flight.
pub const MAX_DRAIN_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
pub use ebbtide_bus::acpi::MAX_DIMM_SLOTS;
/// vCPUs of one machine.
pub const MAX_CPUS: u8 = 4;

/// A whole machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Kernel, initrd, command line.
    pub boot: BootSpec,
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// Boot RAM.
    pub ram: RamConfig,
    /// virtio-mem devices, in id order of the command line.
    pub memory_devices: Vec<MemoryDeviceConfig>,
    /// virtio-blk devices.
    pub disks: Vec<DiskConfig>,
    /// Memory backends of devices, iothreads.
    pub objects: Vec<ObjectAdd>,
    /// Character devices.
    pub chardevs: Vec<ChardevAdd>,
    /// Network backends.
    pub netdevs: Vec<NetdevAdd>,
    /// Block nodes, in order: one may stand on another before it.
    pub block_nodes: Vec<BlockdevOptions>,
    /// Devices that are there from the start, in order: one may be plugged into another before it.
    pub devices: Vec<DeviceAdd>,
    /// Where the first serial port goes.
    pub serial: SerialConfig,
    /// QMP sockets to listen on.
    pub qmp: Vec<PathBuf>,
    /// A guest reset ends the VM instead.
    pub no_reboot: bool,
    /// How long reset and quit wait for requests in flight, at most [`MAX_DRAIN_TIMEOUT`].
    pub drain_timeout: Duration,
    /// What its threads may ask of the kernel.
    pub confinement: ConfinementConfig,
}

/// Boot RAM.
#[derive(Clone, Debug)]
pub struct RamConfig {
    /// Bytes, a multiple of [`MEMORY_GRANULE`].
    pub size_bytes: u64,
    /// What holds it.
    pub backing: Backing,
    /// Populate all of it before the guest starts.
    pub prefault: bool,
    /// Slots for DIMMs, up to [`MAX_DIMM_SLOTS`].
    pub dimm_slots: u16,
}

/// One virtio-mem device.
#[derive(Clone, Debug)]
pub struct MemoryDeviceConfig {
    /// Unique id, the last part of its QOM path.
    pub id: String,
    /// Id of its memory backend, as `query-memory-devices` names it.
    pub memdev: String,
    /// Bytes at most, a multiple of the block size.
    pub size_bytes: u64,
    /// Bytes wanted at start.
    pub requested_bytes: u64,
    /// Block size, a power of two of at least 1 MiB.
    pub block_size_bytes: u64,
    /// NUMA node of its memory.
    pub node: u16,
    /// What holds it.
    pub backing: Backing,
    /// Populate blocks when they are plugged.
    pub prefault: bool,
}

/// One virtio-blk device.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Unique id.
    pub id: String,
    /// Raw image file or block device.
    pub path: PathBuf,
    /// The guest may only read.
    pub readonly: bool,
    /// Serial number the guest reads, at most 20 bytes.
    pub serial: String,
    /// Bypass the host's page cache.
    pub direct: bool,
}

/// Where the first serial port goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// The terminal, or pipes, of this process.
    Stdio,
    /// Output into a file.
    File(PathBuf),
    /// Listen on a Unix socket.
    Unix(PathBuf),
    /// Nowhere.
    Off,
}

impl SerialConfig {
    /// The character device at its other end.
    pub(crate) fn chardev(&self) -> ChardevSpec {
        match self {
            SerialConfig::Stdio => ChardevSpec::Stdio,
            SerialConfig::File(path) => ChardevSpec::File(path.clone()),
            SerialConfig::Unix(path) => ChardevSpec::Unix(path.clone()),
            SerialConfig::Off => ChardevSpec::Off,
        }
    }
}

impl MachineConfig {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`Error::Config`] that names option, value and what is accepted.
    pub fn validate(&self) -> Result<(), Error> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return config_error(format!("cpus={}: 1 to {MAX_CPUS} are accepted", self.cpus));
        }
        let size = self.ram.size_bytes;
        if !size.is_multiple_of(MEMORY_GRANULE) {
            return config_error(format!("memory size={size}: must be a multiple of 2 MiB"));
        }
        if size < MIN_RAM {
            return config_error(format!(
                "memory size={size}: at least {} MiB are needed",
                MIN_RAM / MIB
            ));
        }
        let slots = self.ram.dimm_slots;
        if slots > MAX_DIMM_SLOTS {
            return config_error(format!(
                "memory slots={slots}: 0 to {MAX_DIMM_SLOTS} are accepted"
            ));
        }
        if self.drain_timeout > MAX_DRAIN_TIMEOUT {
            return config_error(format!(
                "drain-timeout={}: 0 to {} seconds are accepted",
                self.drain_timeout.as_secs(),
                MAX_DRAIN_TIMEOUT.as_secs()
            ));
        }
        self.unique_sockets()?;
        self.unique_memory()?;
        self.shared_disks()?;
        for device in &self.memory_devices {
            device.validate()?;
        }
        for disk in &self.disks {
            if disk.serial.len() > 20 {
                return config_error(format!(
                    "disk {}: serial={:?} has {} bytes, at most 20 are accepted",
                    disk.id,
                    disk.serial,
                    disk.serial.len()
                ));
            }
        }
        self.unique_ids()
    }

    /// Each socket is listened on once; found here, it is not taken for another process's.
    fn unique_sockets(&self) -> Result<(), Error> {
        let mut paths: Vec<&PathBuf> = self.qmp.iter().collect();
        if let SerialConfig::Unix(path) = &self.serial {
            paths.push(path);
        }
        paths.sort_unstable();
        match paths.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => config_error(format!("unix:{}: is used twice", pair[0].display())),
            None => Ok(()),
        }
    }

    /// Each backend is one RAM block with a name of its own, and the boot RAM has one, too.
    fn unique_memory(&self) -> Result<(), Error> {
        let mut names: Vec<&str> = self
            .memory_devices
            .iter()
            .map(|d| d.memdev.as_str())
            .collect();
        names.push(BOOT_RAM);
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) if pair[0] == BOOT_RAM => config_error(format!(
                "memory backend id={BOOT_RAM}: is the name of the boot RAM"
            )),
            Some(pair) => config_error(format!("memory backend id={}: is used twice", pair[0])),
            None => Ok(()),
        }
    }

    /// One image may be read by several devices; found here, it is not taken for another process's.
    fn shared_disks(&self) -> Result<(), Error> {
        let mut disks: Vec<&DiskConfig> = self.disks.iter().collect();
        disks.sort_by(|a, b| a.path.cmp(&b.path));
        let shared = |pair: &&[&DiskConfig]| {
            pair[0].path == pair[1].path && !(pair[0].readonly && pair[1].readonly)
        };
        match disks.windows(2).find(shared) {
            Some(pair) => config_error(format!(
                "disks {} and {}: path={}: only with readonly=on may several have one image",
                pair[0].id,
                pair[1].id,
                pair[0].path.display()
            )),
            None => Ok(()),
        }
    }

    fn unique_ids(&self) -> Result<(), Error> {
        let mut ids: Vec<&str> = self.memory_devices.iter().map(|d| d.id.as_str()).collect();
        ids.extend(self.disks.iter().map(|d| d.id.as_str()));
        ids.sort_unstable();
        for id in &ids {
            if !is_id(id) {
                return config_error(format!(
                    "id={id:?}: an id starts with a letter and holds letters, digits, '-', '.', '_'"
                ));
            }
        }
        match ids.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => config_error(format!("id={}: is used twice", pair[0])),
            None => Ok(()),
        }
    }
}

impl MemoryDeviceConfig {
    fn validate(&self) -> Result<(), Error> {
        let MemoryDeviceConfig {
            id,
            size_bytes,
            requested_bytes,
            block_size_bytes: block,
            ..
        } = self;
        if !block.is_power_of_two() || *block < MIB {
            return config_error(format!(
                "{id}: block-size={block}: a power of two of at least 1 MiB is accepted"
            ));
        }
        if *size_bytes == 0 || size_bytes % block != 0 {
            return config_error(format!(
                "{id}: size={size_bytes}: must be a multiple of the block size {block}, and not 0"
            ));
        }
        if requested_bytes > size_bytes || requested_bytes % block != 0 {
            return config_error(format!(
                "{id}: requested-size={requested_bytes}: a multiple of {block} up to {size_bytes} is accepted"
            ));
        }
        Ok(())
    }
}

fn config_error<T>(text: String) -> Result<T, Error> {
    Err(Error::Config(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig {
            boot: BootSpec {
                kernel: "k".into(),
                initrd: None,
                cmdline: String::new(),
            },
            cpus: 1,
            ram: RamConfig {
                size_bytes: 512 * MIB,
                backing: Backing::Anon { thp: true },
                prefault: false,
                dimm_slots: 0,
            },
            memory_devices: vec![MemoryDeviceConfig {
                id: "vmem0".into(),
                memdev: "mem-vmem0".into(),
                size_bytes: 1024 * MIB,
                requested_bytes: 0,
                block_size_bytes: 2 * MIB,
                node: 0,
                backing: Backing::Anon { thp: true },
                prefault: false,
            }],
            disks: vec![],
            objects: vec![],
            chardevs: vec![],
            netdevs: vec![],
            block_nodes: vec![],
            devices: vec![],
            serial: SerialConfig::Off,
            qmp: vec![],
            no_reboot: false,
            drain_timeout: Duration::from_secs(10),
            confinement: ConfinementConfig::default(),
        }
    }

    fn refused(change: impl FnOnce(&mut MachineConfig)) -> String {
        let mut c = config();
        change(&mut c);
        c.validate().unwrap_err().to_string()
    }

    #[test]
    fn accepts_the_ordinary() {
        config().validate().unwrap();
    }

    #[test]
    fn refuses_with_option_and_value() {
        assert!(refused(|c| c.cpus = 5).contains("cpus=5"));
        assert!(refused(|c| c.ram.size_bytes = 0).contains("size=0"));
        assert!(refused(|c| c.ram.size_bytes = 512 * MIB + 4096).contains("multiple of 2 MiB"));
        assert!(
            refused(|c| c.memory_devices[0].block_size_bytes = 3 * MIB).contains("power of two")
        );
        assert!(refused(|c| c.memory_devices[0].size_bytes = 3 * MIB).contains("size=3145728"));
        assert!(
            refused(|c| c.memory_devices[0].requested_bytes = 4096).contains("requested-size=4096")
        );
        assert!(refused(|c| c.drain_timeout = Duration::MAX).contains("0 to 86400 seconds"));
        assert!(refused(|c| c.qmp = vec!["a".into(), "b".into(), "a".into()]).contains("unix:a"));
        let shared = refused(|c| {
            c.qmp = vec!["a".into()];
            c.serial = SerialConfig::Unix("a".into());
        });
        assert!(shared.contains("used twice"), "{shared}");
        let disk = DiskConfig {
            id: "vmem0".into(),
            path: "d".into(),
            readonly: false,
            serial: String::new(),
            direct: false,
        };
        assert!(refused(|c| c.disks.push(disk.clone())).contains("used twice"));
        let twin = |readonly| {
            let mut twins = [disk.clone(), disk.clone()];
            for (disk, id) in twins.iter_mut().zip(["d1", "d2"]) {
                disk.id = id.into();
                disk.readonly = readonly;
            }
            twins
        };
        let shared = refused(|c| c.disks.extend(twin(false)));
        assert!(shared.contains("d1 and d2") && shared.contains("readonly=on"));
        let mut c = config();
        c.disks.extend(twin(true));
        c.validate().unwrap();
        assert!(refused(|c| c.memory_devices[0].memdev = "ram".into()).contains("boot RAM"));
        let second = refused(|c| {
            let mut device = c.memory_devices[0].clone();
            device.id = "vmem1".into();
            c.memory_devices.push(device);
        });
        assert!(second.contains("id=mem-vmem0"), "{second}");
        let mut bad = disk.clone();
        bad.id = "0/x".into();
        assert!(refused(|c| c.disks.push(bad)).contains("starts with a letter"));
        let mut long = disk;
        long.id = "d".into();
        long.serial = "123456789012345678901".into();
        assert!(refused(|c| c.disks.push(long)).contains("at most 20"));
    }
}
