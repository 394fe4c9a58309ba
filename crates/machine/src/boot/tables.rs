// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page tables and GDT of the entry state, and the little of a firmware that Linux relies on.

use ebbtide_hypervisor::FLAT_GDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Error;

/// Present, writable.
const PTE_TABLE: u64 = 0x3;
/// Present, writable, page size.
const PTE_LARGE: u64 = 0x83;
const PAGE: u64 = 0x1000;
/// One directory each for the first 4 GiB.
const DIRECTORIES: u64 = 4;

/// Where firmware starts after a reset, for a processor in real mode.
const RESET_VECTOR: u64 = 0xf_fff0;
/// `mov dx, 0xcf9; mov al, 6; out dx, al`, and `hlt` for ever: asks for a reset.
///
/// On a hardware-reduced platform Linux takes EFI's way to reboot, finds no EFI, and jumps here in
/// real mode without having tried the reset register.
const RESET_CODE: [u8; 9] = [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd];

/// Writes identity page tables (one PML4, one PDPT, four directories of 2 MiB pages) at `at`, and
/// the GDT at `gdt`, and the code at the reset vector.
pub fn write<M: GuestMemoryBackend>(memory: &M, at: u64, gdt: u64) -> Result<(), Error> {
    let put = |address: u64, value: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(|e| Error::Boot(format!("the entry tables can't be written: {e}")))
    };
    memory
        .write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))
        .map_err(|e| Error::Boot(format!("the reset vector can't be written: {e}")))?;
    for page in 0..2 {
        memory
            .write_slice(&[0u8; PAGE as usize], GuestAddress(at + page * PAGE))
            .map_err(|e| Error::Boot(format!("the entry tables can't be written: {e}")))?;
    }
    put(at, (at + PAGE) | PTE_TABLE)?;
    for directory in 0..DIRECTORIES {
        let table = at + (2 + directory) * PAGE;
        put(at + PAGE + directory * 8, table | PTE_TABLE)?;
        for entry in 0..512u64 {
            let page = (directory << 30) | (entry << 21);
            put(table + entry * 8, page | PTE_LARGE)?;
        }
    }
    for (i, &descriptor) in (0u64..).zip(FLAT_GDT.iter()) {
        put(gdt + i * 8, descriptor)?;
    }
    Ok(())
}
