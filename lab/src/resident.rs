// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What memory of a VMM is resident beside its guest's boot RAM, of which a guest comes to use more in its own time.

use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::system::MIB;
use crate::vmm::Vmm;

/// What goes after the guest has given it back goes within this.
const GIVEN_BACK: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(50);

/// In bytes.
///
/// # Errors
/// The VMM can't be read.
pub(crate) fn beside_boot_ram(vmm: &mut Vmm) -> Result<u64> {
    let line = json!({"command-line": "info ramblock"});
    let table = vmm.qmp().execute("human-monitor-command", line)?;
    let ram = boot_ram(table.as_str().unwrap_or_default());
    let ram = ram.with_context(|| format!("no boot RAM in {table}"))?;
    let file = format!("/proc/{}/smaps", vmm.process().pid());
    let maps = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    Ok(outside(&maps, &ram))
}

/// Waits until there is no more than `bytes` of it.
///
/// # Errors
/// There stays more.
pub(crate) fn beside_boot_ram_within(vmm: &mut Vmm, bytes: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        let now = beside_boot_ram(vmm)?;
        if now <= bytes {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < GIVEN_BACK,
            "the VMM holds {} MiB beside the guest's boot RAM, {} are enough",
            now / MIB,
            bytes / MIB
        );
        std::thread::sleep(LOOK);
    }
}

/// Where the block `ram` is, in the table of `info ramblock`: a name, a page size of two words, offset, used and whole
/// length, address.
fn boot_ram(table: &str) -> Option<Range<u64>> {
    let words =
        |line: &'_ str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
    let hexadecimal = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    table.lines().map(words).find_map(|words| match &*words {
        [name, _, _, _, _, bytes, address, ..] if name == "ram" => {
            let (bytes, address) = (hexadecimal(bytes)?, hexadecimal(address)?);
            Some(address..address + bytes)
        }
        _ => None,
    })
}

/// The resident bytes of the mappings in `smaps` (proc(5)) that are not within `range`.
fn outside(smaps: &str, range: &Range<u64>) -> u64 {
    let (mut bytes, mut counts) = (0, true);
    for line in smaps.lines() {
        if let Some(addresses) = mapping(line) {
            counts = addresses.start < range.start || addresses.end > range.end;
        } else if let Some(resident) = line.strip_prefix("Rss:")
            && counts
        {
            let kib = resident.trim().strip_suffix(" kB");
            bytes += kib.and_then(|it| it.parse::<u64>().ok()).unwrap_or(0) << 10;
        }
    }
    bytes
}

/// The addresses that the first line of a mapping begins with.
fn mapping(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_ram_is_found_and_left_out() {
        let table = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                     mem-vmem0    4 KiB  0x20000000 0x40000000 0x40000000 0x7f0040000000  rw\n\
                     ram    4 KiB  0x00 0x3000 0x3000 0x7f0000000000  rw\n";
        let ram = boot_ram(table).unwrap();
        assert_eq!(ram, 0x7f00_0000_0000..0x7f00_0000_3000);
        assert_eq!(boot_ram("mem-vmem0 4 KiB 0x0 0x1 0x1 0x2 rw"), None);
        let smaps = "55d0-55e0 r-xp 0 0:1 2 /bin/ebbtide\nRss:                 100 kB\nPss:  7 kB\n\
                     7f0000000000-7f0000001000 rw-p 0 0:0 0\nRss:   4 kB\n\
                     7f0000001000-7f0000003000 ---p 0 0:0 0\nRss:   8 kB\n\
                     7f0000003000-7f0000005000 rw-p 0 0:0 0\nRss:  16 kB\n";
        assert_eq!(outside(smaps, &ram), 116 << 10);
    }
}
