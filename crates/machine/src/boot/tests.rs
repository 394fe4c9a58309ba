// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::io::Write;

use ebbtide_memory::{Backing, Memory, MemoryConfig, PinnedRam, RamSpec, Region};
use vm_memory::GuestAddress;

use super::*;
use crate::layout::GIB;

fn spec(kernel: &Path) -> BootSpec {
    BootSpec {
        kernel: kernel.to_owned(),
        initrd: None,
        cmdline: "console=ttyS0".into(),
    }
}

/// A bzImage as far as its header goes: two setup sectors, `body` bytes of kernel.
fn bzimage(body: usize) -> Vec<u8> {
    let mut image = vec![0u8; 3 * 512 + body];
    image[0x1f1] = 2;
    image[0x1f4..0x1f8].copy_from_slice(&((body / 16) as u32).to_le_bytes());
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&(MIB as u32).to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&XLF_KERNEL_64.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    image
}

fn file(content: &[u8]) -> tempfile::NamedTempFile {
    let mut f = tempfile::NamedTempFile::new().unwrap();
    f.write_all(content).unwrap();
    f
}

fn memory(bytes: u64) -> (PinnedRam, Layout) {
    let config = MemoryConfig {
        arena_bytes: 1 << 30,
    };
    let memory = Memory::new(config).unwrap();
    let root = Region::container("root", 1 << 40);
    let space = memory.address_space("memory", &root).unwrap();
    let spec = RamSpec {
        name: "ram".into(),
        size_bytes: bytes,
        max_size_bytes: bytes,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: None,
    };
    let ram = Region::ram("ram", &memory.ram().add(spec).unwrap());
    memory.update(|t| t.add(&root, &ram, 0, 0)).unwrap();
    let ram = PinnedRam::new(&space, &memory.register()).unwrap();
    (ram, Layout::new(bytes, &[], 0, 40).unwrap())
}

#[test]
fn loads_and_says_where_to_enter() {
    let kernel = file(&bzimage(4096));
    let initrd = file(&[7u8; 5000]);
    let mut s = spec(kernel.path());
    s.initrd = Some(initrd.path().to_owned());
    let (mem, layout) = memory(64 * MIB);
    let entry = BootImage::open(s)
        .unwrap()
        .load(&mem, &layout, 0xe_0000)
        .unwrap();
    assert_eq!(entry.rip, KERNEL_LOAD + BZIMAGE_ENTRY_64);
    let at: u32 = mem.read_obj(GuestAddress(entry.rsi + 0x218)).unwrap();
    let len: u32 = mem.read_obj(GuestAddress(entry.rsi + 0x21c)).unwrap();
    assert_eq!(len, 5000);
    assert_eq!(u64::from(at), (64 * MIB - 5000) & !0xfff);
    let byte: u8 = mem.read_obj(GuestAddress(u64::from(at) + 4999)).unwrap();
    assert_eq!(byte, 7);
    let rsdp: u64 = mem.read_obj(GuestAddress(entry.rsi + 0x70)).unwrap();
    assert_eq!(rsdp, 0xe_0000);
    let mut text = [0u8; 14];
    mem.read_slice(&mut text, GuestAddress(COMMAND_LINE))
        .unwrap();
    assert_eq!(&text, b"console=ttyS0\0");
    // 1 GiB + 2 MiB is mapped onto itself.
    let pde: u64 = mem
        .read_obj(GuestAddress(PAGE_TABLES + 3 * 0x1000 + 8))
        .unwrap();
    assert_eq!(pde, GIB + 2 * MIB + 0x83);
}

#[test]
fn bad_kernels_are_named() {
    let missing = BootImage::open(spec(Path::new("/nonexistent/vmlinuz"))).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/vmlinuz"));
    let mut short = bzimage(4096);
    short.truncate(2000);
    let short = file(&short);
    let text = BootImage::open(spec(short.path())).unwrap_err().to_string();
    assert!(text.contains("truncated"), "{text}");
    let garbage = file(&[1u8; 4096]);
    let text = BootImage::open(spec(garbage.path()))
        .unwrap_err()
        .to_string();
    assert!(text.contains("neither a bzImage nor an ELF"), "{text}");
    let empty = file(b"");
    let text = BootImage::open(spec(empty.path())).unwrap_err().to_string();
    assert!(text.contains("empty"), "{text}");
    let text = BootImage::open(spec(Path::new("/")))
        .unwrap_err()
        .to_string();
    assert!(text.contains("not a regular file"), "{text}");
    let mut old = bzimage(4096);
    old[0x236] = 0;
    let old = file(&old);
    let text = BootImage::open(spec(old.path())).unwrap_err().to_string();
    assert!(text.contains("64-bit entry"), "{text}");
}

#[test]
fn truncated_elf_is_an_error_at_load() {
    let elf = file(b"\x7fELF\x02\x01\x01");
    let (mem, layout) = memory(16 * MIB);
    let err = BootImage::open(spec(elf.path()))
        .unwrap()
        .load(&mem, &layout, 0)
        .unwrap_err();
    assert!(err.to_string().contains("can't be loaded"), "{err}");
}

#[test]
fn initrd_larger_than_memory_is_refused() {
    let kernel = file(&bzimage(4096));
    let initrd = tempfile::NamedTempFile::new().unwrap();
    initrd.as_file().set_len(100 * MIB).unwrap();
    let mut s = spec(kernel.path());
    s.initrd = Some(initrd.path().to_owned());
    let (mem, layout) = memory(64 * MIB);
    let err = BootImage::open(s)
        .unwrap()
        .load(&mem, &layout, 0)
        .unwrap_err();
    assert!(err.to_string().contains("100 MiB do not fit"), "{err}");
}

#[test]
fn command_line_limits() {
    let kernel = file(&bzimage(4096));
    let mut s = spec(kernel.path());
    s.cmdline = "x".repeat(2048);
    let err = BootImage::open(s.clone()).unwrap_err();
    assert!(err.to_string().contains("at most 2047"), "{err}");
    s.cmdline = "a\0b".into();
    assert!(BootImage::open(s).unwrap_err().to_string().contains("NUL"));
}

#[test]
fn a_pipe_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    let text = BootImage::open(spec(&path)).unwrap_err().to_string();
    assert!(text.contains("not a regular file"), "{text}");
}

/// A file system may cut short what is read without waiting; the loader takes that for the end.
#[test]
fn what_is_loaded_is_read_with_waiting() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "x").unwrap();
    let (opened, _) = super::open_file("initrd", file.path()).unwrap();
    let flags = rustix::fs::fcntl_getfl(&opened).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
}
