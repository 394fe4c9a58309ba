// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes initial RAM file systems: cpio archives in the "newc" format
//! (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;

use crate::modules::Module;

const ALIGNMENT: usize = 4;
/// The kernel unpacks in multiples of this; cpio itself pads to it.
const BLOCK: usize = 512;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
const SYMLINK: u32 = 0o120_000;

/// An archive in the making. Everything in it belongs to root; directories
/// are added where a path needs them.
#[derive(Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Initramfs {
    /// An empty archive.
    pub fn new() -> Initramfs {
        Initramfs::default()
    }

    /// An archive with `init` as PID 1, the modules it is to load in order,
    /// and a console.
    pub fn bootable(init: &[u8], modules: &[Module]) -> Initramfs {
        let mut archive = Initramfs::new();
        archive.file("/init", 0o755, init);
        // The kernel opens this for PID 1 before any file system is mounted.
        archive.character_device("/dev/console", 0o600, 5, 1);
        for directory in ["/proc", "/sys", "/tmp"] {
            archive.directory(directory);
        }
        let mut list = String::new();
        for module in modules {
            let name = format!("{}.ko", module.name);
            archive.file(&format!("/modules/{name}"), 0o644, &module.content);
            list.push_str(&name);
            list.push('\n');
        }
        archive.file("/modules/list", 0o644, list.as_bytes());
        archive
    }

    /// Adds a directory and those above it.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        self.parents(path);
        self.directories.insert(path.to_owned());
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | permissions, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, CHARACTER | permissions, (major, minor), &[]);
    }

    /// The archive, complete.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.archive
            .resize(self.archive.len().next_multiple_of(BLOCK), 0);
        self.archive
    }

    fn parents(&mut self, path: &str) {
        if let Some((directory, _)) = path.trim_matches('/').rsplit_once('/') {
            self.directory(directory);
        }
    }

    /// A header of 13 fields of 8 hexadecimal digits, the name, the content.
    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        // No time of day: equal content makes an equal archive.
        let (uid, gid, mtime, own_device, checksum) = (0, 0, 0, (0, 0), 0);
        let fields = [
            self.entries,
            mode,
            uid,
            gid,
            links,
            mtime,
            content.len() as u32,
            own_device.0,
            own_device.1,
            device.0,
            device.1,
            name.len() as u32 + 1,
            checksum,
        ];
        self.archive.extend(b"070701");
        for field in fields {
            self.archive.extend(format!("{field:08x}").as_bytes());
        }
        self.archive.extend(name.as_bytes());
        self.archive.push(0);
        self.align();
        self.archive.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.archive
            .resize(self.archive.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// Packs an archive with gzip.
///
/// # Errors
/// None in practice: it writes to memory.
pub fn gzip(archive: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut packed, archive)?;
    packed.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Path, mode, device, content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads an archive back.
    fn read(mut archive: &[u8]) -> Vec<Entry> {
        let whole = archive.len();
        let mut entries = Vec::new();
        loop {
            let header = std::str::from_utf8(&archive[..110]).unwrap();
            assert!(header.starts_with("070701"), "{header}");
            let field = |n: usize| u32::from_str_radix(&header[6 + 8 * n..14 + 8 * n], 16).unwrap();
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&archive[110..110 + name_size - 1])
                .unwrap()
                .to_owned();
            assert_eq!(archive[110 + name_size - 1], 0);
            let at = whole - archive.len();
            let content_at = (at + 110 + name_size).next_multiple_of(4) - at;
            let content = archive[content_at..content_at + size].to_vec();
            let end = (at + content_at + size).next_multiple_of(4) - at;
            archive = &archive[end..];
            if name == "TRAILER!!!" {
                assert!(archive.iter().all(|&byte| byte == 0));
                return entries;
            }
            entries.push((name, field(1), (field(9), field(10)), content));
        }
    }

    #[test]
    fn what_goes_in_comes_out_in_order() {
        let mut archive = Initramfs::new();
        archive.file("/bin/tool", 0o755, b"12345");
        archive.file("/bin/other", 0o644, b"");
        archive.symlink("/bin/link", "tool");
        archive.directory("/bin");
        let archive = archive.finish();
        assert_eq!(archive.len() % BLOCK, 0);
        let entries = read(&archive);
        let names: Vec<&str> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(names, ["bin", "bin/tool", "bin/other", "bin/link"]);
        assert_eq!(
            (entries[0].1, entries[1].1, entries[3].1),
            (0o040755, 0o100755, 0o120777)
        );
        assert_eq!(
            (&entries[1].3[..], &entries[3].3[..]),
            (&b"12345"[..], &b"tool"[..])
        );
    }

    #[test]
    fn a_bootable_archive_lists_its_modules_and_has_a_console() {
        let modules = ["b", "a"].map(|name| Module {
            name: name.into(),
            content: name.as_bytes().to_vec(),
        });
        let entries = read(&Initramfs::bootable(b"init", &modules).finish());
        let find = |path: &str| entries.iter().find(|entry| entry.0 == path).unwrap();
        assert_eq!(find("modules/list").3, b"b.ko\na.ko\n");
        assert_eq!(find("modules/a.ko").3, b"a");
        assert_eq!(
            (find("dev/console").1, find("dev/console").2),
            (0o020600, (5, 1))
        );
        assert_eq!(find("init").1, 0o100755);
    }

    #[test]
    fn gzip_is_undone_by_gunzip() {
        let archive = Initramfs::new().finish();
        let mut unpacked = Vec::new();
        let packed = gzip(&archive).unwrap();
        std::io::Read::read_to_end(
            &mut flate2::read::GzDecoder::new(&packed[..]),
            &mut unpacked,
        )
        .unwrap();
        assert_eq!(unpacked, archive);
    }
}
