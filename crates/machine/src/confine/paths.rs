// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which files can be opened once the machine runs (landlock(7)).
//!
//! The directories of the files that the configuration names, for reading and writing: an image may grow a neighbour, a
//! socket is made and removed. Those of the kernel and the initrd for reading, they are read again at a reset. Device
//! nodes by themselves, as /dev holds more than is meant. What the host says about itself. And what the user adds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ebbtide_memory::Backing;
use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr,
};
use serde_json::Value;

use crate::Error;
use crate::config::{MachineConfig, SerialConfig};

/// What is asked of the kernel; an older one gives what it has.
const RIGHTS: ABI = ABI::V5;
/// The first version is in Linux 5.13.
const VERSION_QUERY: libc::c_uint = 1;

/// Read by the process itself: limits, huge pages, its own memory use, random numbers.
const HOST_READ: [&str; 5] = ["/proc", "/sys", "/dev/urandom", "/dev/random", "/dev/hwrng"];
/// Devices that management's commands need.
const HOST_WRITE: [&str; 2] = ["/dev/null", "/dev/net/tun"];

/// Members of objects, backends and block nodes that hold a path.
const PATH_MEMBERS: [&str; 4] = ["filename", "path", "mem-path", "out"];

/// The version of this kernel's landlock; `None` without it.
pub(super) fn version() -> Option<u32> {
    let none = std::ptr::null::<u8>();
    // SAFETY: asks for the version, no pointer is followed.
    let answer =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, VERSION_QUERY) };
    u32::try_from(answer).ok().filter(|version| *version > 0)
}

/// What stays reachable.
pub(super) struct Paths {
    rules: RulesetCreated,
    /// Canonical, to say beforehand what the kernel would refuse.
    roots: Vec<PathBuf>,
}

impl Paths {
    /// For the files of `config` and for `allowed`.
    ///
    /// # Errors
    /// A path of `allowed` that does not exist, or what the kernel says to the rules.
    pub(super) fn new(config: &MachineConfig, allowed: &[PathBuf]) -> Result<Paths, Error> {
        let failed = |e: landlock::RulesetError| Error::part("landlock", e);
        let rules = Ruleset::default()
            .handle_access(AccessFs::from_all(RIGHTS))
            .and_then(Ruleset::create)
            .map_err(failed)?;
        let mut paths = Paths {
            rules,
            roots: Vec::new(),
        };
        let (read, write) = named(config);
        for path in allowed {
            paths.add(path, writing()).map_err(|source| Error::File {
                what: "--allow",
                path: path.clone(),
                reason: source.to_string(),
            })?;
        }
        let write = write.iter().map(|path| (place(path), writing()));
        let read = read.iter().map(|path| (place(path), reading()));
        let host_read = HOST_READ
            .iter()
            .map(|path| (PathBuf::from(path), reading()));
        let host_write = HOST_WRITE
            .iter()
            .map(|path| (PathBuf::from(path), writing()));
        for (path, access) in write.chain(read).chain(host_read).chain(host_write) {
            match paths.add(&path, access) {
                Ok(()) => {}
                // What opens it says so better; not every host has every device.
                Err(error) => tracing::debug!("landlock: {}: {error}", path.display()),
            }
        }
        Ok(paths)
    }

    fn add(&mut self, path: &Path, access: BitFlags<AccessFs>) -> io::Result<()> {
        let metadata = fs::metadata(path)?;
        let access = match metadata.is_dir() {
            true => access,
            false => access & AccessFs::from_file(RIGHTS),
        };
        let parent = PathFd::new(path).map_err(io::Error::other)?;
        (&mut self.rules)
            .add_rule(PathBeneath::new(parent, access))
            .map_err(io::Error::other)?;
        self.roots.push(fs::canonicalize(path)?);
        Ok(())
    }

    /// Limits the calling thread, and those it starts, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        let rules = self.rules.try_clone()?;
        rules.restrict_self().map(drop).map_err(io::Error::other)
    }

    /// Whether `path`, or the place where it would be made, is within reach. Looks at the file system.
    pub(super) fn reach(&self, path: &Path) -> bool {
        let resolved = fs::canonicalize(path).or_else(|_| fs::canonicalize(place(path)));
        match resolved {
            Ok(resolved) => self.roots.iter().any(|root| resolved.starts_with(root)),
            // Whoever opens it says what is wrong.
            Err(_) => true,
        }
    }
}

fn reading() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

/// All but to execute.
fn writing() -> BitFlags<AccessFs> {
    AccessFs::from_write(RIGHTS) | reading()
}

/// What a file's name gives access to: the directory it is in; a device or a directory itself.
fn place(path: &Path) -> PathBuf {
    use std::os::unix::fs::FileTypeExt;
    let itself = fs::metadata(path).is_ok_and(|m| {
        let kind = m.file_type();
        kind.is_dir() || kind.is_block_device() || kind.is_char_device()
    });
    match path.parent() {
        Some(parent) if !itself && parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) if !itself => parent.to_owned(),
        _ => path.to_owned(),
    }
}

/// The files that `config` names: those that are read, and those that may be written.
fn named(config: &MachineConfig) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut read = vec![config.boot.kernel.clone()];
    read.extend(config.boot.initrd.clone());
    let mut write: Vec<PathBuf> = config.qmp.clone();
    write.extend(config.disks.iter().map(|disk| disk.path.clone()));
    if let SerialConfig::File(path) | SerialConfig::Unix(path) = &config.serial {
        write.push(path.clone());
    }
    let devices = config.memory_devices.iter().map(|device| &device.backing);
    for backing in devices.chain([&config.ram.backing]) {
        if let Backing::File { path, .. } = backing {
            write.push(path.clone());
        }
    }
    let members = config.objects.iter().map(|o| o.properties.clone());
    // The path of passt is one of the launcher's.
    let netdevs = config.netdevs.iter().filter(|n| n.kind != "passt");
    let members = members.chain(netdevs.map(|n| n.properties.clone()));
    let members = members.chain(config.chardevs.iter().map(|c| c.backend.data.clone()));
    let members = members.chain(config.block_nodes.iter().map(|b| b.properties.clone()));
    for properties in members {
        collect(&Value::Object(properties.into_members()), &mut write);
    }
    (read, write)
}

/// Finds paths in what QMP nests.
fn collect(value: &Value, found: &mut Vec<PathBuf>) {
    let Value::Object(members) = value else {
        return;
    };
    for (name, value) in members {
        match value {
            Value::String(path) if PATH_MEMBERS.contains(&&**name) => found.push(path.into()),
            inner => collect(inner, found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_are_found_however_deep() {
        let mut found = Vec::new();
        let nested = json!({
            "file": {"driver": "file", "filename": "/a"},
            "addr": {"type": "unix", "data": {"path": "/b"}},
            "mem-path": "/c", "node-name": "/no",
        });
        collect(&nested, &mut found);
        assert_eq!(found, ["/a", "/b", "/c"].map(PathBuf::from));
    }

    #[test]
    fn a_file_stands_for_its_directory_and_a_device_for_itself() {
        assert_eq!(
            place(Path::new("/nonexistent/disk")),
            Path::new("/nonexistent")
        );
        assert_eq!(place(Path::new("disk")), Path::new("."));
        assert_eq!(place(Path::new("/dev/null")), Path::new("/dev/null"));
        assert_eq!(place(Path::new("/proc")), Path::new("/proc"));
    }
}
