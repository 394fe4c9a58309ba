// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INQUIRY (SPC-4, 6.4) and its vital product data (SPC-4, 7.8; SBC-3, 6.6).

use crate::cdb::Cdb;
use crate::sense::Sense;
use crate::unit::{Geometry, Work, reply};
use crate::{RANGE_MAX_BYTES, UNMAP_DESCRIPTORS_MAX};

const PAGE_SUPPORTED: u8 = 0x00;
const PAGE_SERIAL: u8 = 0x80;
const PAGE_IDENTIFICATION: u8 = 0x83;
const PAGE_LIMITS: u8 = 0xb0;
const PAGE_CHARACTERISTICS: u8 = 0xb1;
const PAGE_PROVISIONING: u8 = 0xb2;

/// Peripheral qualifier "no unit can be here", device type "unknown".
const ABSENT: u8 = 0x7f;

/// What a disk says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `vendor`: 8 printable characters, padded with spaces.
    vendor: [u8; 8],
    /// `product`: 16.
    product: [u8; 16],
    /// `ver`: 4.
    revision: [u8; 4],
    serial: String,
    device_id: String,
    wwn: Option<u64>,
    rotation_rate: u16,
}

/// A part of an identity that cannot be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityError {
    /// The property.
    pub property: &'static str,
    /// What was given.
    pub value: String,
    /// The most bytes it may have, of printable ASCII.
    pub max: usize,
}

impl std::fmt::Display for IdentityError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}='{}': at most {} characters of printable ASCII",
            self.property, self.value, self.max
        )
    }
}

impl std::error::Error for IdentityError {}

impl Identity {
    /// Vendor "Ebbtide", product "Disk", revision "1", no serial number, a medium that does not rotate.
    pub fn new() -> Identity {
        Identity {
            vendor: *b"Ebbtide ",
            product: *b"Disk            ",
            revision: *b"1   ",
            serial: String::new(),
            device_id: String::new(),
            wwn: None,
            rotation_rate: 1,
        }
    }

    /// Sets `vendor`.
    ///
    /// # Errors
    /// More than 8 characters, or one that is not printable ASCII.
    pub fn vendor(mut self, vendor: &str) -> Result<Identity, IdentityError> {
        self.vendor = padded("vendor", vendor)?;
        Ok(self)
    }

    /// Sets `product`.
    ///
    /// # Errors
    /// More than 16 characters, or one that is not printable ASCII.
    pub fn product(mut self, product: &str) -> Result<Identity, IdentityError> {
        self.product = padded("product", product)?;
        Ok(self)
    }

    /// Sets `ver`.
    ///
    /// # Errors
    /// More than 4 characters, or one that is not printable ASCII.
    pub fn revision(mut self, ver: &str) -> Result<Identity, IdentityError> {
        self.revision = padded("ver", ver)?;
        Ok(self)
    }

    /// Sets `serial`, page 80.
    ///
    /// # Errors
    /// More than 36 characters, or one that is not printable ASCII.
    pub fn serial(mut self, serial: &str) -> Result<Identity, IdentityError> {
        self.serial = checked("serial", serial, 36)?.to_owned();
        Ok(self)
    }

    /// Sets `device_id`, page 83: what makes the unit the same one on every path. The serial number without it.
    ///
    /// # Errors
    /// More than 200 characters, or one that is not printable ASCII.
    pub fn device_id(mut self, id: &str) -> Result<Identity, IdentityError> {
        self.device_id = checked("device_id", id, 200)?.to_owned();
        Ok(self)
    }

    /// Sets `wwn`, an NAA designator of page 83.
    pub fn wwn(mut self, wwn: u64) -> Identity {
        self.wwn = Some(wwn);
        self
    }

    /// Sets `rotation_rate`, page B1: 1 for a medium that does not rotate, 0 for "not told", or rounds per minute.
    pub fn rotation_rate(mut self, rate: u16) -> Identity {
        self.rotation_rate = rate;
        self
    }
}

impl Default for Identity {
    fn default() -> Identity {
        Identity::new()
    }
}

fn checked<'a>(
    property: &'static str,
    value: &'a str,
    max: usize,
) -> Result<&'a str, IdentityError> {
    let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    if value.len() > max || !value.bytes().all(printable) {
        let value = value.to_owned();
        return Err(IdentityError {
            property,
            value,
            max,
        });
    }
    Ok(value)
}

fn padded<const N: usize>(property: &'static str, value: &str) -> Result<[u8; N], IdentityError> {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(checked(property, value, N)?.bytes()) {
        *to = from;
    }
    Ok(field)
}

/// INQUIRY to a unit that is there.
pub(crate) fn present(
    cdb: Cdb<'_>,
    identity: &Identity,
    geometry: &Geometry,
) -> Result<Work, Sense> {
    let page = cdb.byte(2)?;
    let data = if cdb.bit(1, 0)? {
        vital(page, identity, geometry).ok_or(Sense::INVALID_FIELD)?
    } else if page != 0 {
        return Err(Sense::INVALID_FIELD);
    } else {
        standard(0, identity)
    };
    Ok(reply(data, cdb.be16(3)?.into()))
}

/// INQUIRY to a unit that is not there. It has no vital product data.
pub(crate) fn absent(cdb: Cdb<'_>) -> Result<Work, Sense> {
    if cdb.bit(1, 0)? || cdb.byte(2)? != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    Ok(reply(
        standard(ABSENT, &Identity::new()),
        cdb.be16(3)?.into(),
    ))
}

fn standard(peripheral: u8, identity: &Identity) -> Vec<u8> {
    /// SPC-4.
    const VERSION: u8 = 6;
    /// Hierarchical LUNs, response data format 2.
    const FORMAT: u8 = 0x12;
    /// Command queuing.
    const QUEUING: u8 = 0x02;
    // SAM-5, SPC-4, SBC-3 without claims of a version.
    const DESCRIPTORS: [u8; 6] = [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0];
    let mut data = vec![peripheral, 0, VERSION, FORMAT, 0, 0, 0, QUEUING];
    data.extend(identity.vendor);
    data.extend(identity.product);
    data.extend(identity.revision);
    // Vendor specific and reserved.
    data.extend([0; 22]);
    data.extend(DESCRIPTORS);
    data.resize(74, 0);
    // What follows byte 4.
    let additional = u8::try_from(data.len() - 5).unwrap_or(u8::MAX);
    if let Some(length) = data.get_mut(4) {
        *length = additional;
    }
    data
}

fn vital(page: u8, identity: &Identity, geometry: &Geometry) -> Option<Vec<u8>> {
    let body = match page {
        PAGE_SUPPORTED => {
            let mut pages = vec![PAGE_SUPPORTED];
            if !identity.serial.is_empty() {
                pages.push(PAGE_SERIAL);
            }
            pages.extend([
                PAGE_IDENTIFICATION,
                PAGE_LIMITS,
                PAGE_CHARACTERISTICS,
                PAGE_PROVISIONING,
            ]);
            pages
        }
        PAGE_SERIAL if !identity.serial.is_empty() => identity.serial.as_bytes().to_vec(),
        PAGE_IDENTIFICATION => designators(identity),
        PAGE_LIMITS => limits(geometry),
        PAGE_CHARACTERISTICS => {
            let mut body = identity.rotation_rate.to_be_bytes().to_vec();
            body.resize(60, 0);
            body
        }
        PAGE_PROVISIONING => vec![
            0,
            if geometry.unmap {
                LBPU | LBPWS | LBPWS10
            } else {
                0
            },
            if geometry.unmap { THIN } else { 0 },
            0,
        ],
        _ => return None,
    };
    let length = u16::try_from(body.len()).ok()?;
    let mut data = vec![0, page];
    data.extend(length.to_be_bytes());
    data.extend(body);
    Some(data)
}

// Page B2, byte 5: UNMAP, WRITE SAME (16) and WRITE SAME (10) give space back. Blocks given back need not read as zeroes.
const LBPU: u8 = 0x80;
const LBPWS: u8 = 0x40;
const LBPWS10: u8 = 0x20;
/// Page B2, byte 6: thin provisioning.
const THIN: u8 = 2;

fn designators(identity: &Identity) -> Vec<u8> {
    let name = match identity.device_id.as_str() {
        "" => &identity.serial,
        id => id,
    };
    let mut data = Vec::new();
    if !name.is_empty() {
        // ASCII, T10 vendor identification, of the logical unit.
        let length = u8::try_from(8 + name.len()).unwrap_or(u8::MAX);
        data.extend([2, 1, 0, length]);
        data.extend(identity.vendor);
        data.extend(name.bytes());
    }
    if let Some(wwn) = identity.wwn {
        // Binary, NAA, of the logical unit.
        data.extend([1, 3, 0, 8]);
        data.extend(wwn.to_be_bytes());
    }
    data
}

/// Page B0 (SBC-3, 6.6.3).
fn limits(geometry: &Geometry) -> Vec<u8> {
    /// WRITE SAME of no blocks, "to the end", is refused.
    const WSNZ: u8 = 1;
    /// The alignment that follows is told.
    const UGAVALID: u32 = 1 << 31;
    let block = geometry.block_bytes.max(1);
    let per_physical = geometry.physical_block_bytes / block;
    let granularity = u16::try_from(per_physical).unwrap_or(u16::MAX);
    let range_blocks = RANGE_MAX_BYTES / u64::from(block);
    let unmap = |value: u32| if geometry.unmap { value } else { 0 };
    let mut body = vec![WSNZ, 0];
    body.extend(granularity.to_be_bytes());
    // Largest and best transfer, largest prefetch: not limited, not told, none.
    body.extend([0; 12]);
    body.extend(unmap(u32::try_from(range_blocks).unwrap_or(u32::MAX)).to_be_bytes());
    body.extend(unmap(UNMAP_DESCRIPTORS_MAX as u32).to_be_bytes());
    body.extend(unmap(per_physical.max(1)).to_be_bytes());
    body.extend(unmap(UGAVALID).to_be_bytes());
    body.extend(range_blocks.to_be_bytes());
    body.resize(60, 0);
    body
}
