// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The errors that `pcie_aer_inject_error` takes (PCIe 5.0, 7.8.4), by the names of Linux's `aer-inject`.

use crate::json::excerpt;

/// What is to happen in a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PcieError {
    /// The bit is one of the correctable error status, not of the uncorrectable one.
    pub correctable: bool,
    /// Its bit.
    pub bit: u8,
    /// The header of the packet it is about.
    pub header: [u32; 4],
}

const UNCORRECTABLE: &[(&str, u8)] = &[
    ("DLP", 4),
    ("SDN", 5),
    ("POISON_TLP", 12),
    ("FCP", 13),
    ("COMP_TIME", 14),
    ("COMP_ABORT", 15),
    ("UNX_COMP", 16),
    ("RX_OVER", 17),
    ("MALF_TLP", 18),
    ("ECRC", 19),
    ("UNSUP", 20),
    ("ACSV", 21),
];
const CORRECTABLE: &[(&str, u8)] = &[
    ("RCVR", 0),
    ("BAD_TLP", 6),
    ("BAD_DLLP", 7),
    ("REP_ROLL", 8),
    ("REP_TIMER", 12),
    ("ADV_NONFATAL", 13),
];

/// Reads `error [header]...`: a name, or a status with one bit, and up to four words. `correctable`: the status is one of
/// correctable errors.
pub(super) fn read(text: &str, correctable: bool) -> Result<PcieError, String> {
    let mut words = text.split_whitespace();
    let name = words.next().unwrap_or_default();
    let named = |table: &[(&str, u8)]| table.iter().find(|(its, _)| *its == name).map(|it| it.1);
    let (correctable, bit) = match (named(UNCORRECTABLE), named(CORRECTABLE)) {
        (Some(bit), _) if !correctable => (false, bit),
        (_, Some(bit)) => (true, bit),
        (Some(_), None) => return Err(format!("Error: {name} is no correctable error\r\n")),
        (None, None) => (correctable, single_bit(name)?),
    };
    let mut header = [0; 4];
    for (place, word) in words.enumerate() {
        let place = header.get_mut(place);
        *place.ok_or("Error: a header has four words at most\r\n")? = number(word)
            .ok_or_else(|| format!("Error: invalid header word '{}'\r\n", excerpt(word)))?;
    }
    Ok(PcieError {
        correctable,
        bit,
        header,
    })
}

fn single_bit(status: &str) -> Result<u8, String> {
    let bits = number(status).filter(|bits| bits.count_ones() == 1);
    let bit = bits.and_then(|bits| u8::try_from(bits.trailing_zeros()).ok());
    bit.ok_or_else(|| {
        let tables = UNCORRECTABLE.iter().chain(CORRECTABLE);
        let names: Vec<&str> = tables.map(|(name, _)| *name).collect();
        format!(
            "Error: invalid error status value '{}': one of {}, or a number with one bit\r\n",
            excerpt(status),
            names.join(", ")
        )
    })
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
