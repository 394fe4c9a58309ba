// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--memory`, `--disk`, `--object`, `--device`: from option texts to the machine's configuration.

use std::path::PathBuf;

use ebbtide_machine::Backing;
use ebbtide_machine::config::{
    DiskConfig, MEMORY_GRANULE, MemoryDeviceConfig, RamConfig, SerialConfig,
};

use ebbtide_qmp::SocketSpec;

use super::options::{KeyValues, OptionError, unknown};

const MEMORY_KEYS: &[&str] = &["size", "max", "backend", "path", "prefault"];
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

const OBJECT_TYPES: &[&str] = &[
    "memory-backend-ram",
    "memory-backend-memfd",
    "memory-backend-file",
];
const OBJECT_KEYS: &[&str] = &["id", "size", "prealloc", "mem-path", "share", "hugetlb"];

impl MemoryObject {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// One `--object`.
pub fn object(text: &str) -> Result<MemoryObject, OptionError> {
    let mut kv = KeyValues::parse("--object", text, Some("qom-type"))?;
    let kind = kv.need("qom-type")?;
    let id = kv.need("id")?;
    let size_bytes = kv
        .size("size")?
        .ok_or_else(|| kv.error(format!("{id}: size= is missing")))?;
    let backing = match kind.as_str() {
        "memory-backend-ram" => Backing::Anon { thp: true },
        "memory-backend-memfd" if kv.switch("hugetlb", false)? => Backing::Hugetlb {
            page_size_bytes: 2 << 20,
        },
        "memory-backend-memfd" => Backing::Memfd { thp: true },
        "memory-backend-file" => Backing::File {
            path: PathBuf::from(kv.need("mem-path")?),
            share: kv.switch("share", false)?,
            readonly: false,
        },
        other => return Err(kv.error(unknown("object type", other, OBJECT_TYPES))),
    };
    let prefault = kv.switch("prealloc", false)?;
    kv.finish(OBJECT_KEYS)?;
    Ok(MemoryObject {
        id,
        size_bytes,
        backing,
        prefault,
    })
}

const DEVICE_TYPES: &[&str] = &["virtio-mem-pci"];
const MEM_KEYS: &[&str] = &[
    "id",
    "memdev",
    "requested-size",
    "block-size",
    "node",
    "prealloc",
];

/// One `--device`; takes its backend out of `objects`, for a backend serves one device.
pub fn device(
    text: &str,
    index: usize,
    objects: &mut Vec<MemoryObject>,
) -> Result<MemoryDeviceConfig, OptionError> {
    let mut kv = KeyValues::parse("--device", text, Some("driver"))?;
    let driver = kv.need("driver")?;
    if driver != "virtio-mem-pci" && driver != "virtio-mem" {
        return Err(kv.error(unknown("driver", &driver, DEVICE_TYPES)));
    }
    let memdev = kv.need("memdev")?;
    let id = kv.take("id").unwrap_or_else(|| format!("vmem{index}"));
    let at = objects.iter().position(|o| o.id == memdev).ok_or_else(|| {
        kv.error(format!(
            "memdev={memdev}: there is no such --object, or another device has it"
        ))
    })?;
    let node = match kv.take("node") {
        None => 0,
        Some(text) => text
            .parse()
            .ok()
            .filter(|n| *n == 0u16)
            .ok_or_else(|| kv.error(format!("node={text}: this machine has node 0 only")))?,
    };
    let requested_bytes = kv.size("requested-size")?.unwrap_or(0);
    let block_size_bytes = kv.size("block-size")?.unwrap_or(DEFAULT_BLOCK);
    let prefault = kv.switch("prealloc", false)?;
    kv.finish(MEM_KEYS)?;
    let object = objects.remove(at);
    if object.prefault {
        return Err(OptionError::new(
            "--device",
            format!("memdev={memdev}: its object has prealloc=on; use prealloc=on of the device"),
        ));
    }
    Ok(MemoryDeviceConfig {
        id,
        memdev,
        size_bytes: object.size_bytes,
        requested_bytes,
        block_size_bytes,
        node,
        backing: object.backing,
        prefault,
    })
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

    #[test]
    fn qemu_spelling_of_a_memory_device() {
        let mut objects = vec![object("memory-backend-ram,id=m0,size=1G").unwrap()];
        let dev = device(
            "virtio-mem-pci,id=v1,memdev=m0,requested-size=256M",
            0,
            &mut objects,
        )
        .unwrap();
        assert_eq!((dev.id.as_str(), dev.requested_bytes), ("v1", 256 << 20));
        let again = device("virtio-mem-pci,memdev=m0", 1, &mut objects).unwrap_err();
        assert!(again.to_string().contains("memdev=m0"));
        let e = device("virtio-men-pci,memdev=m0", 1, &mut objects).unwrap_err();
        assert!(e.to_string().contains("is \"virtio-mem-pci\" meant?"));
    }
}
