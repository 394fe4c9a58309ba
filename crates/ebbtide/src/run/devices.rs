// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--memory`, `--disk`, `--object`, `--device`: from option texts to the machine's configuration.

use std::path::PathBuf;

use ebbtide_machine::config::{
    DiskConfig, MAX_DIMM_SLOTS, MEMORY_GRANULE, MemoryDeviceConfig, RamConfig, SerialConfig,
};
use ebbtide_machine::{Backing, MEMORY_BACKENDS, memory_backing};

use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::qom::ObjectAdd;
use ebbtide_qmp::{Properties, QmpError, SocketSpec};

use super::options::{KeyValues, OptionError, unknown};

const MEMORY_KEYS: &[&str] = &["size", "max", "backend", "path", "prefault", "slots"];
const DISK_KEYS: &[&str] = &["path", "id", "readonly", "serial", "direct"];
const DEFAULT_BLOCK: u64 = 2 << 20;
/// Id of the device that `max=` adds.
const AUTO_MEMORY_DEVICE: &str = "vmem0";

/// The boot RAM of `--memory`, and the device that its `max=` asks for.
pub fn memory(text: &str) -> Result<(RamConfig, Option<MemoryDeviceConfig>), OptionError> {
    let mut kv = KeyValues::parse("--memory", text, Some("size"))?;
    let size_bytes = kv
        .size("size")?
        .ok_or_else(|| kv.error("size= is missing"))?;
    let max = kv.size("max")?;
    let backend = kv.take("backend").unwrap_or_else(|| "anon".into());
    let path = kv.take("path").map(PathBuf::from);
    let backing = backing(&kv, &backend, path)?;
    let prefault = kv.switch("prefault", false)?;
    let dimm_slots = match kv.take("slots") {
        None => 0,
        Some(text) => text
            .parse()
            .ok()
            .filter(|slots| *slots <= MAX_DIMM_SLOTS)
            .ok_or_else(|| kv.error(format!("slots={text}: 0 to {MAX_DIMM_SLOTS} are accepted")))?,
    };
    if size_bytes == 0 || !size_bytes.is_multiple_of(MEMORY_GRANULE) {
        return Err(kv.error(format!(
            "size={size_bytes}: a multiple of 2 MiB, not 0, is accepted"
        )));
    }
    let device = match max {
        None => None,
        Some(max) if max < size_bytes => {
            return Err(kv.error(format!("max={max} is smaller than size={size_bytes}")));
        }
        Some(max) if !max.is_multiple_of(MEMORY_GRANULE) => {
            return Err(kv.error(format!("max={max}: a multiple of 2 MiB is accepted")));
        }
        Some(max) if max == size_bytes => None,
        Some(max) => Some(memory_device(&kv, max - size_bytes, &backing)?),
    };
    kv.finish(MEMORY_KEYS)?;
    Ok((
        RamConfig {
            size_bytes,
            backing,
            prefault,
            dimm_slots,
        },
        device,
    ))
}

fn memory_device(
    kv: &KeyValues,
    size_bytes: u64,
    ram: &Backing,
) -> Result<MemoryDeviceConfig, OptionError> {
    let (backing, block_size_bytes) = match ram {
        Backing::Anon { .. } | Backing::Memfd { .. } => (ram.clone(), DEFAULT_BLOCK),
        Backing::Hugetlb { page_size_bytes } => {
            (ram.clone(), (*page_size_bytes).max(DEFAULT_BLOCK))
        }
        Backing::File { .. } => {
            return Err(kv.error(
                "max= with backend=file: one file can't hold both; give the device a backend of its own with --object and --device",
            ));
        }
    };
    Ok(MemoryDeviceConfig {
        id: AUTO_MEMORY_DEVICE.into(),
        memdev: format!("mem-{AUTO_MEMORY_DEVICE}"),
        size_bytes,
        requested_bytes: 0,
        block_size_bytes,
        node: 0,
        backing,
        prefault: false,
    })
}

fn backing(kv: &KeyValues, kind: &str, path: Option<PathBuf>) -> Result<Backing, OptionError> {
    match (kind, path) {
        ("anon", None) => Ok(Backing::Anon { thp: true }),
        ("memfd", None) => Ok(Backing::Memfd { thp: true }),
        ("hugetlb", None) => Ok(Backing::Hugetlb {
            page_size_bytes: 2 << 20,
        }),
        ("file", Some(path)) => Ok(Backing::File {
            path,
            share: true,
            readonly: false,
        }),
        ("file", None) => Err(kv.error("backend=file needs path=")),
        ("anon" | "memfd" | "hugetlb", Some(path)) => Err(kv.error(format!(
            "path={} goes with backend=file only",
            path.display()
        ))),
        (other, _) => Err(kv.error(unknown(
            "backend",
            other,
            &["anon", "memfd", "hugetlb", "file"],
        ))),
    }
}

/// The disk of one `--disk`; `index` makes its default id.
pub fn disk(text: &str, index: usize) -> Result<DiskConfig, OptionError> {
    let mut kv = KeyValues::parse("--disk", text, Some("path"))?;
    let path = PathBuf::from(kv.need("path")?);
    let id = kv.take("id").unwrap_or_else(|| format!("disk{index}"));
    let config = DiskConfig {
        path,
        readonly: kv.switch("readonly", false)?,
        serial: kv
            .take("serial")
            .unwrap_or_else(|| id.chars().take(20).collect()),
        direct: kv.switch("direct", false)?,
        id,
    };
    kv.finish(DISK_KEYS)?;
    Ok(config)
}

/// The value of `--serial`.
pub fn serial(text: &str) -> Result<SerialConfig, OptionError> {
    let path = |p: &str| {
        if p.is_empty() {
            Err(OptionError::new(
                "--serial",
                format!("{text:?} has no path"),
            ))
        } else {
            Ok(PathBuf::from(p))
        }
    };
    match text.split_once(':') {
        None if text == "stdio" => Ok(SerialConfig::Stdio),
        None if text == "off" => Ok(SerialConfig::Off),
        Some(("file", p)) => Ok(SerialConfig::File(path(p)?)),
        Some(("unix", p)) => Ok(SerialConfig::Unix(path(p)?)),
        _ => Err(OptionError::new(
            "--serial",
            format!("{text:?}: stdio, file:PATH, unix:PATH or off are accepted"),
        )),
    }
}

/// The value of `--qmp`, also in QEMU's spelling: `unix:PATH,server=on,wait=off`.
pub fn qmp(text: &str) -> Result<PathBuf, OptionError> {
    let spec: Result<SocketSpec, _> = text.parse();
    spec.map(|spec| spec.path)
        .map_err(|e| OptionError::new("--qmp", e))
}

/// A memory backend of `--object`.
#[derive(Clone, Debug)]
pub struct MemoryObject {
    id: String,
    size_bytes: u64,
    backing: Backing,
    prefault: bool,
}

const OBJECT_KEYS: &[&str] = &["id", "size", "prealloc", "mem-path", "share", "hugetlb"];

/// One `--object`, which has to be a memory backend.
pub fn object(object: ObjectAdd) -> Result<MemoryObject, OptionError> {
    let ObjectAdd {
        qom_type,
        id,
        mut properties,
    } = object;
    let wrong = |error: QmpError| OptionError::new("--object", format!("{id}: {}", error.desc));
    let size_bytes = properties.need_size("size").map_err(wrong)?;
    let backing = memory_backing(&qom_type, &mut properties).map_err(wrong)?;
    let backing = backing.ok_or_else(|| {
        OptionError::new(
            "--object",
            unknown("object type", &qom_type, MEMORY_BACKENDS),
        )
    })?;
    let prefault = properties.take_bool("prealloc").map_err(wrong)?;
    finish("--object", properties, OBJECT_KEYS)?;
    Ok(MemoryObject {
        id,
        size_bytes,
        backing,
        prefault: prefault.unwrap_or(false),
    })
}

/// The drivers of virtio-mem devices.
pub const MEMORY_DRIVERS: &[&str] = &["virtio-mem-pci", "virtio-mem"];
const MEM_KEYS: &[&str] = &[
    "id",
    "memdev",
    "requested-size",
    "block-size",
    "node",
    "prealloc",
];

/// That there is no such driver, with the one that may be meant.
pub fn unknown_driver(driver: &str, reason: &str) -> OptionError {
    let mut known = ebbtide_machine::driver_names();
    known.extend(MEMORY_DRIVERS);
    OptionError::new(
        "--device",
        format!("{reason}: {}", unknown("driver", driver, &known)),
    )
}

/// One `--device`; takes its backend out of `objects`, for a backend serves one device.
pub fn device(
    device: DeviceAdd,
    index: usize,
    objects: &mut Vec<MemoryObject>,
) -> Result<MemoryDeviceConfig, OptionError> {
    let DeviceAdd {
        driver,
        bus,
        id,
        mut properties,
    } = device;
    let error = |text: String| OptionError::new("--device", text);
    let wrong = |wrong: QmpError| error(wrong.desc);
    if !MEMORY_DRIVERS.contains(&&*driver) {
        return Err(error(unknown("driver", &driver, MEMORY_DRIVERS)));
    }
    if bus.is_some() {
        return Err(error(unknown("property", "bus", MEM_KEYS)));
    }
    let memdev = properties.need_string("memdev").map_err(wrong)?;
    let id = id.unwrap_or_else(|| format!("vmem{index}"));
    let at = objects.iter().position(|o| o.id == memdev).ok_or_else(|| {
        error(format!(
            "memdev={memdev}: there is no such --object, or another device has it"
        ))
    })?;
    let node = match properties.take_uint::<u16>("node").map_err(wrong)? {
        None | Some(0) => 0,
        Some(node) => return Err(error(format!("node={node}: this machine has node 0 only"))),
    };
    let requested = properties.take_size("requested-size").map_err(wrong)?;
    let block_size = properties.take_size("block-size").map_err(wrong)?;
    let prefault = properties.take_bool("prealloc").map_err(wrong)?;
    finish("--device", properties, MEM_KEYS)?;
    let object = objects.remove(at);
    if object.prefault {
        return Err(error(format!(
            "memdev={memdev}: its object has prealloc=on; use prealloc=on of the device"
        )));
    }
    Ok(MemoryDeviceConfig {
        id,
        memdev,
        size_bytes: object.size_bytes,
        requested_bytes: requested.unwrap_or(0),
        block_size_bytes: block_size.unwrap_or(DEFAULT_BLOCK),
        node,
        backing: object.backing,
        prefault: prefault.unwrap_or(false),
    })
}

/// Ends the reading: what is left over is unknown, or of no meaning here.
fn finish(option: &str, properties: Properties, known: &[&str]) -> Result<(), OptionError> {
    match properties.into_members().keys().next() {
        None => Ok(()),
        Some(name) if known.contains(&name.as_str()) => Err(OptionError::new(
            option,
            format!("{name} has no meaning for this type"),
        )),
        Some(name) => Err(OptionError::new(option, unknown("property", name, known))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_forms() {
        let (ram, dev) = memory("512M").unwrap();
        assert_eq!(ram.size_bytes, 512 << 20);
        assert!(dev.is_none());
        let (_, dev) = memory("size=512M,max=8G,prefault=on").unwrap();
        let dev = dev.unwrap();
        assert_eq!(dev.size_bytes, (8 << 30) - (512 << 20));
        assert_eq!(dev.id, "vmem0");
        assert!(memory("512M,max=512M").unwrap().1.is_none());
    }

    #[test]
    fn memory_mistakes() {
        let text = |t: &str| memory(t).unwrap_err().to_string();
        assert!(text("size=0").contains("size=0"));
        assert!(text("size=3M").contains("multiple of 2 MiB"));
        assert!(text("size=1G,max=512M").contains("smaller than size"));
        assert!(text("max=1G").contains("size= is missing"));
        assert!(text("1G,backend=anno").contains("is \"anon\" meant?"));
        assert!(text("1G,backend=file").contains("needs path="));
        assert!(text("1G,path=/x").contains("backend=file only"));
        assert!(text("1G,sise=3").contains("is \"size\" meant?"));
    }

    #[test]
    fn serial_and_qmp_forms() {
        assert_eq!(serial("stdio").unwrap(), SerialConfig::Stdio);
        assert_eq!(serial("unix:/a").unwrap(), SerialConfig::Unix("/a".into()));
        assert!(serial("unix:").is_err());
        assert!(serial("tcp:1").unwrap_err().to_string().contains("tcp:1"));
        assert_eq!(qmp("unix:/q").unwrap(), PathBuf::from("/q"));
        assert!(qmp("/q").is_err());
    }

    fn named(driver: &str, id: Option<&str>, text: &str) -> DeviceAdd {
        DeviceAdd {
            driver: driver.into(),
            bus: None,
            id: id.map(str::to_owned),
            properties: Properties::parse(text, "").unwrap(),
        }
    }

    fn backend(qom_type: &str, text: &str) -> Result<MemoryObject, OptionError> {
        object(ObjectAdd {
            qom_type: qom_type.into(),
            id: "m0".into(),
            properties: Properties::parse(text, "").unwrap(),
        })
    }

    #[test]
    fn qemu_spelling_of_a_memory_device() {
        let mut objects = vec![backend("memory-backend-ram", "size=1G").unwrap()];
        let v1 = named(
            "virtio-mem-pci",
            Some("v1"),
            "memdev=m0,requested-size=256M",
        );
        let dev = device(v1, 0, &mut objects).unwrap();
        assert_eq!((dev.id.as_str(), dev.requested_bytes), ("v1", 256 << 20));
        let plain = |driver| named(driver, None, "memdev=m0");
        let again = device(plain("virtio-mem-pci"), 1, &mut objects).unwrap_err();
        assert!(again.to_string().contains("memdev=m0"));
        let e = device(plain("virtio-men-pci"), 1, &mut objects).unwrap_err();
        assert!(e.to_string().contains("is \"virtio-mem-pci\" meant?"));
    }

    #[test]
    fn mistakes_of_memory_devices() {
        let mistake = |text: &str| {
            let mut objects = vec![backend("memory-backend-ram", "size=1G").unwrap()];
            let v1 = named("virtio-mem-pci", Some("v1"), text);
            device(v1, 0, &mut objects).unwrap_err().to_string()
        };
        assert!(mistake("memdev=m0,requsted-size=1G").contains("is \"requested-size\" meant?"));
        assert!(mistake("memdev=m0,node=1").contains("node=1"));
        assert!(mistake("memdev=m0,block-size=x").contains("'x' is not a size"));
        assert_eq!(mistake("node=0"), "--device: Parameter 'memdev' is missing");
        let object = |kind: &str, text: &str| backend(kind, text).unwrap_err().to_string();
        assert_eq!(
            object("memory-backend-ram", "size=1G,mem-path=/x"),
            "--object: mem-path has no meaning for this type"
        );
        assert_eq!(
            object("memory-backend-file", "size=1G"),
            "--object: m0: Parameter 'mem-path' is missing"
        );
        assert!(
            object("memory-backend-rom", "size=1").contains("is \"memory-backend-ram\" meant?")
        );
        assert_eq!(
            object("memory-backend-memfd", "size=1G,share=off"),
            "--object: m0: Property 'memory-backend-memfd.share' doesn't take value 'off'"
        );
        let backing = |kind: &str, text: &str| backend(kind, text).unwrap().backing;
        assert!(matches!(
            backing("memory-backend-memfd", "size=1G,hugetlb,share=on"),
            Backing::Hugetlb { .. }
        ));
        assert!(matches!(
            backing("memory-backend-ram", "size=1G,share=on"),
            Backing::Memfd { .. }
        ));
        assert!(matches!(
            backing("memory-backend-ram", "size=1G,share=off"),
            Backing::Anon { .. }
        ));
    }
}
