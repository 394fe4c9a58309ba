// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The little of ELF that the lab reads (System V ABI, chapters 4 and 5).

use anyhow::{Context, Result, bail};

const PT_INTERP: u32 = 3;

/// Whether a program needs a dynamic linker.
///
/// # Errors
/// Not a 64-bit little-endian ELF file.
pub fn needs_interpreter(file: &[u8]) -> Result<bool> {
    check_header(file)?;
    let (offset, size, count) = (u64_at(file, 32)?, u16_at(file, 54)?, u16_at(file, 56)?);
    for index in 0..u64::from(count) {
        if u32_at(file, offset + index * u64::from(size))? == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The content of a section.
///
/// # Errors
/// Not a 64-bit little-endian ELF file, or it has no such section.
pub fn section<'a>(file: &'a [u8], name: &str) -> Result<&'a [u8]> {
    check_header(file)?;
    let (table, size) = (u64_at(file, 40)?, u64::from(u16_at(file, 58)?));
    let (count, names) = (u64::from(u16_at(file, 60)?), u64::from(u16_at(file, 62)?));
    let header = |index: u64| table + index * size;
    let content = |header: u64| range(file, u64_at(file, header + 24)?, u64_at(file, header + 32)?);
    let names = content(header(names)).context("section names")?;
    for index in 0..count {
        let at = u32_at(file, header(index))? as usize;
        let found = names
            .get(at..)
            .and_then(|rest| rest.split(|&byte| byte == 0).next());
        if found == Some(name.as_bytes()) {
            return content(header(index)).with_context(|| format!("section {name}"));
        }
    }
    bail!("no section {name}")
}

fn check_header(file: &[u8]) -> Result<()> {
    // Magic, 64-bit, little-endian.
    if !file.starts_with(b"\x7fELF\x02\x01") {
        bail!("not a 64-bit little-endian ELF file");
    }
    Ok(())
}

fn range(file: &[u8], offset: u64, length: u64) -> Result<&[u8]> {
    let end = offset.checked_add(length).context("range overflows")?;
    file.get(usize::try_from(offset)?..usize::try_from(end)?)
        .context("file is cut short")
}

fn array_at<const N: usize>(file: &[u8], offset: u64) -> Result<[u8; N]> {
    Ok(range(file, offset, N as u64)?.try_into()?)
}

fn u16_at(file: &[u8], offset: u64) -> Result<u16> {
    array_at(file, offset).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], offset: u64) -> Result<u32> {
    array_at(file, offset).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], offset: u64) -> Result<u64> {
    array_at(file, offset).map(u64::from_le_bytes)
}

/// A minimal object file with one section, for tests.
#[cfg(test)]
pub(crate) fn object_with(name: &str, content: &[u8]) -> Vec<u8> {
    let mut names = vec![0];
    names.extend(name.as_bytes());
    names.push(0);
    let names_at = 64 + content.len();
    let table = names_at + names.len();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
    file[58..64].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
    file.extend(content);
    file.extend(&names);
    for (name_at, at, length) in [(1u32, 64, content.len()), (0, names_at, names.len())] {
        let mut header = vec![0; 64];
        header[..4].copy_from_slice(&name_at.to_le_bytes());
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
        file.extend(header);
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_found_by_name() {
        let file = object_with(".modinfo", b"depends=a\0");
        assert_eq!(section(&file, ".modinfo").unwrap(), b"depends=a\0");
        assert!(section(&file, ".text").is_err());
    }

    #[test]
    fn damaged_files_are_errors_at_every_length() {
        let file = object_with(".modinfo", b"depends=a\0");
        // The last field that is read ends 24 bytes before the end of the last header.
        for length in 0..file.len() - 24 {
            assert!(section(&file[..length], ".modinfo").is_err(), "{length}");
        }
        assert!(needs_interpreter(b"#!/bin/sh").is_err());
    }

    #[test]
    fn this_test_is_dynamic() {
        let itself = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needs_interpreter(&itself).unwrap());
    }
}
