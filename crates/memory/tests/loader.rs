// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! linux-loader on the vm-memory traits.
#![cfg(not(loom))]

use std::io::Cursor;
use std::sync::Arc;

use ebbtide_memory::{Backing, Gpa, Memory, MemoryConfig, PinnedRam, RamSpec, Region};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{Elf, KernelLoader, load_cmdline};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A 64-bit x86 executable with one loadable segment: `code` at `address`, then 16 zero bytes.
fn elf(address: u64, code: &[u8]) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    let (header, segment) = (64u64, 56u64);
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for value in [address, header, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for value in [header as u16, segment as u16, 1, 64, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    file.extend(5u32.to_le_bytes());
    let length = code.len() as u64;
    for value in [header + segment, address, address, length, length + 16, 16] {
        file.extend(value.to_le_bytes());
    }
    file.extend(code);
    file
}

fn ram(memory: &Memory, name: &str, size_bytes: u64, block_size_bytes: Option<u64>) -> Arc<Region> {
    let backing = Backing::Anon { thp: false };
    let spec = RamSpec {
        name: name.into(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault: false,
        block_size_bytes,
    };
    Region::ram(name, &memory.ram().add(spec).unwrap())
}

#[test]
fn a_kernel_and_a_command_line_are_loaded() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let root = Region::container("root", 1 << 48);
    let space = memory.address_space("memory", &root).unwrap();
    let low = ram(&memory, "low", 4 << 20, None);
    memory
        .update(|t| {
            t.add(&root, &low, 0, 0)?;
            t.add(&root, &Region::reservation("hole", 0x6_0000), 0xa_0000, 1)
        })
        .unwrap();
    let reader = memory.register();
    let pinned = PinnedRam::new(&space, &reader).unwrap();
    let code: Vec<u8> = (0..200).collect();
    let mut image = Cursor::new(elf(0x10_0000, &code));
    let loaded = Elf::load(&pinned, None, &mut image, None).unwrap();
    assert_eq!(
        (loaded.kernel_load.0, loaded.kernel_end),
        (0x10_0000, 0x10_0000 + 216)
    );
    let mut line = Cmdline::new(100).unwrap();
    line.insert_str("console=ttyS0").unwrap();
    load_cmdline(&pinned, GuestAddress(0x2_0000), &line).unwrap();
    // A kernel that does not fit between the hole and the end is refused, not half written.
    let mut large = Cursor::new(elf(0x9_f000, &[0; 8192]));
    assert!(Elf::load(&pinned, None, &mut large, None).is_err());
    drop(pinned);
    let guard = space.read(&reader);
    let mut back = vec![0xff; 216];
    guard.read_bytes(Gpa(0x10_0000), &mut back).unwrap();
    assert_eq!(back[..200], code);
    assert_eq!(back[200..], [0; 16]);
    assert_eq!(
        &guard.read::<[u8; 14]>(Gpa(0x2_0000)).unwrap(),
        b"console=ttyS0\0"
    );
}

#[test]
fn only_plugged_writable_ram_is_seen() {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let root = Region::container("root", 1 << 48);
    let space = memory.address_space("memory", &root).unwrap();
    let sparse = ram(&memory, "sparse", 8 << 20, Some(1 << 20));
    let block = sparse.ram_block().unwrap();
    block.plug(1 << 20..3 << 20, false).unwrap();
    block.plug(5 << 20..6 << 20, false).unwrap();
    let rom = Region::rom("rom", ram(&memory, "rom", 4096, None).ram_block().unwrap());
    memory
        .update(|t| {
            // Seen from half a block in.
            t.add(
                &root,
                &Region::alias("window", &sparse, 1 << 19, 6 << 20),
                1 << 30,
                0,
            )?;
            t.add(&root, &rom, 0, 0)
        })
        .unwrap();
    let reader = memory.register();
    let pinned = PinnedRam::new(&space, &reader).unwrap();
    let regions: Vec<_> = pinned
        .iter()
        .map(|r| (r.start_addr().0 - (1 << 30), r.len()))
        .collect();
    assert_eq!(
        regions,
        [(1 << 19, 2 << 20), ((5 << 20) - (1 << 19), 1 << 20)]
    );
    assert!(pinned.find_region(GuestAddress(0)).is_none());
    let at = GuestAddress((1 << 30) + (1 << 20));
    pinned.write_obj(7u32, at).unwrap();
    assert_eq!(space.load(&reader, at.0, 4), 7);
    assert!(pinned.write_obj(7u32, GuestAddress(1 << 30)).is_err());
    // Pinned: a seal waits.
    let seal = block.seal(2 << 20..3 << 20).unwrap();
    memory.synchronize();
    assert!(!seal.is_drained());
    drop(pinned);
}
