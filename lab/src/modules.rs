// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernel modules of an unpacked package: which are needed, in what order.
//!
//! A package that was not installed has `modules.builtin` but no `modules.dep`:
//! depmod writes that on installation, from each module's `.modinfo` section.
//! That section is read here, so neither depmod nor root is needed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::elf;

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
}

/// A module, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Name, with underscores.
    pub name: String,
    /// The object file, decompressed.
    pub content: Vec<u8>,
}

impl Modules {
    /// Finds all modules below `lib/modules/VERSION`.
    ///
    /// # Errors
    /// The directory or its `modules.builtin` can't be read.
    pub fn open(directory: &Path) -> Result<Modules> {
        let list = directory.join("modules.builtin");
        let text = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
        let builtin = text
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut files = HashMap::new();
        let mut pending = vec![directory.join("kernel")];
        while let Some(directory) = pending.pop() {
            let entries = fs::read_dir(&directory)
                .with_context(|| format!("read {}", directory.display()))?;
            for entry in entries {
                let entry = entry.with_context(|| format!("read {}", directory.display()))?;
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    pending.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(Modules { files, builtin })
    }

    /// The modules in `names` and all they depend on, each after what it
    /// depends on; what is built into the kernel is left out.
    ///
    /// # Errors
    /// A module is neither there nor built in; one can't be read.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut found = Vec::new();
        let mut visited = HashSet::new();
        for name in names {
            self.visit(&normal(name), &mut visited, &mut found)?;
        }
        Ok(found)
    }

    /// Like [`Modules::resolve`], without the `names` this kernel doesn't know.
    ///
    /// # Errors
    /// A module can't be read.
    pub fn resolve_known(&self, names: &[&str]) -> Result<Vec<Module>> {
        let known = |name: &&&str| {
            self.builtin.contains(&normal(name)) || self.files.contains_key(&normal(name))
        };
        let names: Vec<&str> = names.iter().filter(known).copied().collect();
        self.resolve(&names)
    }

    fn visit(
        &self,
        name: &str,
        visited: &mut HashSet<String>,
        found: &mut Vec<Module>,
    ) -> Result<()> {
        if self.builtin.contains(name) || !visited.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            bail!("this kernel has no module {name}")
        };
        let content = read_module(path).with_context(|| format!("module {}", path.display()))?;
        let info = elf::section(&content, ".modinfo")
            .with_context(|| format!("module {}", path.display()))?;
        for dependency in depends(info) {
            self.visit(&dependency, visited, found)
                .with_context(|| format!("needed by {name}"))?;
        }
        found.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

/// Files and kernels mix `-` and `_`; the kernel itself uses `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.gz"]
        .iter()
        .find_map(|end| file.strip_suffix(end))?;
    Some(normal(stem))
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let raw = fs::read(path).context("read")?;
    let mut content = Vec::new();
    if raw.starts_with(b"\xfd7zXZ\0") {
        lzma_rust2::XzReader::new(&raw[..], true)
            .read_to_end(&mut content)
            .context("decompress (xz)")?;
    } else if raw.starts_with(&[0x1f, 0x8b]) {
        flate2::read::MultiGzDecoder::new(&raw[..])
            .read_to_end(&mut content)
            .context("decompress (gzip)")?;
    } else {
        content = raw;
    }
    Ok(content)
}

fn depends(info: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(info);
    let list = text
        .split('\0')
        .find_map(|field| field.strip_prefix("depends="))
        .unwrap_or_default();
    list.split(',')
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, Modules) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("modules.builtin"), builtin).unwrap();
        for (file, depends) in modules {
            let path = directory.path().join("kernel/drivers").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let object = elf::object_with(
                ".modinfo",
                format!("name=x\0depends={depends}\0").as_bytes(),
            );
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(&object).unwrap();
            let content = if file.ends_with(".gz") {
                packed.finish().unwrap()
            } else {
                object
            };
            fs::write(path, content).unwrap();
        }
        let modules = Modules::open(directory.path()).unwrap();
        (directory, modules)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_keep, modules) = tree(
            &[
                ("virtio_pci.ko", "virtio_ring,virtio-pci-modern-dev,virtio"),
                ("virtio.ko", "virtio_ring"),
                ("virtio/virtio_ring.ko.gz", ""),
                ("virtio-pci-modern-dev.ko", ""),
                ("virtio_blk.ko", "virtio,virtio_ring"),
            ],
            "",
        );
        let found = modules.resolve(&["virtio_pci", "virtio-blk"]).unwrap();
        assert_eq!(
            names(&found),
            [
                "virtio_ring",
                "virtio_pci_modern_dev",
                "virtio",
                "virtio_pci",
                "virtio_blk"
            ]
        );
        assert!(
            found
                .iter()
                .all(|module| module.content.starts_with(b"\x7fELF"))
        );
    }

    #[test]
    fn what_is_built_in_is_left_out() {
        let (_keep, modules) = tree(&[("a.ko", "b-c")], "kernel/x/b-c.ko\n");
        assert_eq!(names(&modules.resolve(&["a", "b_c"]).unwrap()), ["a"]);
    }

    #[test]
    fn a_missing_module_is_named_with_who_needs_it() {
        let (_keep, modules) = tree(&[("a.ko", "gone")], "");
        let error = format!("{:#}", modules.resolve(&["a"]).unwrap_err());
        assert!(
            error.contains("needed by a") && error.contains("no module gone"),
            "{error}"
        );
        assert_eq!(names(&modules.resolve_known(&["other"]).unwrap()), [""; 0]);
        assert!(modules.resolve_known(&["a"]).is_err());
    }

    #[test]
    fn a_loop_of_dependencies_ends() {
        let (_keep, modules) = tree(&[("a.ko", "b"), ("b.ko", "a")], "");
        assert_eq!(names(&modules.resolve(&["a"]).unwrap()), ["b", "a"]);
    }

    #[test]
    fn xz_is_unpacked_and_damage_found() {
        // `printf 'tide' | xz --check=crc32`
        let packed: &[u8] = include_bytes!("../testdata/tide.xz");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.ko.xz");
        fs::write(&path, packed).unwrap();
        assert_eq!(read_module(&path).unwrap(), b"tide");
        let mut damaged = packed.to_vec();
        damaged[30] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert!(read_module(&path).is_err());
    }
}
