// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The zero page: setup header and memory map (e820) for the kernel.

use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::Error;
use crate::layout::{EBDA_START, ECAM, Layout, MIB};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Undefined" in the boot protocol's list of loaders: no assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;

/// Fills in what the loader owes the kernel in its setup header.
pub fn complete_header(
    header: &mut setup_header,
    cmdline_at: u64,
    cmdline_bytes: u32,
    initrd: Option<(u64, u64)>,
) {
    // An ELF kernel brings no header.
    if header.header == 0 {
        header.boot_flag = BOOT_FLAG;
        header.header = HDRS;
        header.kernel_alignment = 0x0100_0000;
    }
    header.type_of_loader = LOADER_UNDEFINED;
    // The protocol's fields are 32 bits wide; everything placed here lies below 4 GiB.
    header.cmd_line_ptr = cmdline_at as u32;
    header.cmdline_size = cmdline_bytes;
    if let Some((at, bytes)) = initrd {
        header.ramdisk_image = at as u32;
        header.ramdisk_size = bytes as u32;
    }
}

/// Writes the zero page at `at`.
pub fn write<M: GuestMemoryBackend>(
    memory: &M,
    at: u64,
    header: setup_header,
    layout: &Layout,
    rsdp: u64,
) -> Result<(), Error> {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    let map = memory_map(layout);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(at)), memory)
        .map_err(|e| Error::Boot(format!("the zero page can't be written: {e}")))
}

/// What e820 tells. Device memory is left out: it belongs to its devices, plugged or not.
fn memory_map(layout: &Layout) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind: u32| boot_e820_entry {
        addr: start,
        size: end - start,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, EBDA_START, E820_RAM),
        entry(EBDA_START, MIB, E820_RESERVED),
        entry(MIB, layout.low_ram.end, E820_RAM),
        entry(ECAM.start, ECAM.end, E820_RESERVED),
    ];
    if !layout.high_ram.is_empty() {
        map.push(entry(layout.high_ram.start, layout.high_ram.end, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::GIB;

    #[test]
    fn map_covers_ram_and_reserves_ecam() {
        let layout = Layout::new(5 * GIB, &[GIB], 0, 40).unwrap();
        let map = memory_map(&layout);
        let usable: u64 = map
            .iter()
            .filter(|e| e.r#type == E820_RAM)
            .map(|e| e.size)
            .sum();
        assert_eq!(usable, 5 * GIB - (MIB - EBDA_START));
        assert!(
            map.iter()
                .any(|e| { e.r#type == E820_RESERVED && { e.addr } == ECAM.start })
        );
        for pair in map.windows(2) {
            assert!(pair[0].addr + pair[0].size <= pair[1].addr);
        }
    }
}
