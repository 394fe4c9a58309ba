// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mode pages (SPC-4, 7.5; SBC-3, 6.5): MODE SENSE and MODE SELECT.

use crate::cdb::{Cdb, op};
use crate::parameters::ParameterList;
use crate::sense::Sense;
use crate::unit::{Geometry, Work, reply};

const PAGE_ERROR_RECOVERY: u8 = 0x01;
const PAGE_CACHING: u8 = 0x08;
const PAGE_CONTROL: u8 = 0x0a;
const PAGE_ALL: u8 = 0x3f;
const SUBPAGE_ALL: u8 = 0xff;

/// Device-specific parameter: write protected; DPO and FUA are known.
const WRITE_PROTECTED: u8 = 0x80;
const DPOFUA: u8 = 0x10;
/// Write cache enable, in byte 2 of the caching page.
const WCE: u8 = 1 << 2;

/// Which values of a page are meant.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    Current,
    /// The bits that can be changed.
    Changeable,
    Default,
}

/// The page, from its code on. `None`: there is no such page.
fn page(code: u8, values: Values, writeback: bool) -> Option<Vec<u8>> {
    let (length, byte2, byte3) = match code {
        // Automatic write reallocation.
        PAGE_ERROR_RECOVERY => (10, 0x80, 0),
        PAGE_CACHING => (18, if writeback { WCE } else { 0 }, 0),
        // Commands may be reordered without restriction.
        PAGE_CONTROL => (10, 0, 0x10),
        _ => return None,
    };
    let (byte2, byte3) = match (values, code) {
        (Values::Current, _) => (byte2, byte3),
        (Values::Default, PAGE_CACHING) => (WCE, 0),
        (Values::Default, _) => (byte2, byte3),
        (Values::Changeable, PAGE_CACHING) => (WCE, 0),
        (Values::Changeable, _) => (0, 0),
    };
    let mut data = vec![code, length, byte2, byte3];
    data.resize(2 + usize::from(length), 0);
    Some(data)
}

/// MODE SENSE (6, 10).
pub(crate) fn sense(cdb: Cdb<'_>, geometry: &Geometry, writeback: bool) -> Result<Work, Sense> {
    let ten = cdb.opcode() == op::MODE_SENSE_10;
    let (code, subpage) = (cdb.byte(2)? & 0x3f, cdb.byte(3)?);
    let values = match cdb.byte(2)? >> 6 {
        0 => Values::Current,
        1 => Values::Changeable,
        2 => Values::Default,
        _ => return Err(Sense::SAVING_NOT_SUPPORTED),
    };
    if subpage != 0 && subpage != SUBPAGE_ALL {
        return Err(Sense::INVALID_FIELD);
    }
    let descriptor = if cdb.bit(1, 3)? {
        Vec::new()
    } else {
        block_descriptor(geometry)
    };
    let codes: &[u8] = match &code {
        &PAGE_ALL => &[PAGE_ERROR_RECOVERY, PAGE_CACHING, PAGE_CONTROL],
        one => std::slice::from_ref(one),
    };
    let mut pages = Vec::new();
    for code in codes {
        pages.extend(page(*code, values, writeback).ok_or(Sense::INVALID_FIELD)?);
    }
    let specific = DPOFUA
        | if geometry.readonly {
            WRITE_PROTECTED
        } else {
            0
        };
    // All lengths are small numbers: pages are fixed, descriptors have 8 bytes.
    let descriptor_bytes = descriptor.len() as u8;
    let rest = descriptor.len() + pages.len();
    let (mut data, allocation) = if ten {
        let length = (6 + rest) as u16;
        let [high, low] = length.to_be_bytes();
        let header = vec![high, low, 0, specific, 0, 0, 0, descriptor_bytes];
        (header, u32::from(cdb.be16(7)?))
    } else {
        let header = vec![(3 + rest) as u8, 0, specific, descriptor_bytes];
        (header, u32::from(cdb.byte(4)?))
    };
    data.extend(descriptor);
    data.extend(pages);
    Ok(reply(data, allocation))
}

/// The short form: number of blocks in three bytes, or all ones; block length in three.
fn block_descriptor(geometry: &Geometry) -> Vec<u8> {
    let blocks = u32::try_from(geometry.blocks)
        .unwrap_or(u32::MAX)
        .min(0xff_ffff);
    let mut data = blocks.to_be_bytes().to_vec();
    data.extend((geometry.block_bytes & 0xff_ffff).to_be_bytes());
    data
}

/// MODE SELECT (6, 10): the parameter list it needs.
pub(crate) fn select(cdb: Cdb<'_>) -> Result<Work, Sense> {
    let ten = cdb.opcode() == op::MODE_SELECT_10;
    let flags = cdb.byte(1)?;
    // The page format is meant, and nothing is to be saved.
    if flags & 0x11 != 0x10 {
        return Err(Sense::INVALID_FIELD);
    }
    let length = if ten {
        cdb.be16(7)?.into()
    } else {
        cdb.byte(4)?.into()
    };
    Ok(Work::Parameters {
        length,
        list: ParameterList::Mode { ten },
    })
}

/// The write cache setting a parameter list asks for; `None` if it says nothing of that.
pub(crate) fn selected(
    bytes: &[u8],
    ten: bool,
    geometry: &Geometry,
    writeback: bool,
) -> Result<Option<bool>, Sense> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let header_bytes = if ten { 8 } else { 4 };
    let (header, rest) = bytes
        .split_at_checked(header_bytes)
        .ok_or(Sense::PARAMETER_LENGTH)?;
    let descriptor_bytes = match *header {
        [_, _, _, length] => usize::from(length),
        // Long descriptors are not offered by MODE SENSE.
        [_, _, _, _, long, _, high, low] if long & 1 == 0 => {
            usize::from(u16::from_be_bytes([high, low]))
        }
        _ => return Err(Sense::INVALID_PARAMETER),
    };
    let (descriptor, mut pages) = rest
        .split_at_checked(descriptor_bytes)
        .ok_or(Sense::PARAMETER_LENGTH)?;
    check_descriptor(descriptor, geometry)?;
    let mut chosen = None;
    while let Some((&[code, length], _)) = pages.split_first_chunk() {
        let (given, others) = pages
            .split_at_checked(2 + usize::from(length))
            .ok_or(Sense::PARAMETER_LENGTH)?;
        let wce = changed(code, given, chosen.unwrap_or(writeback))?;
        chosen = wce.or(chosen);
        pages = others;
    }
    if pages.is_empty() {
        Ok(chosen)
    } else {
        Err(Sense::PARAMETER_LENGTH)
    }
}

/// The number of blocks and their length cannot be changed.
fn check_descriptor(descriptor: &[u8], geometry: &Geometry) -> Result<(), Sense> {
    let own = block_descriptor(geometry);
    let same_blocks = |given: &[u8]| {
        // Zero blocks: "do not change".
        given.get(..4) == own.get(..4) || given.get(..4) == Some(&[0; 4])
    };
    if descriptor.is_empty()
        || descriptor.len() == own.len()
            && same_blocks(descriptor)
            && descriptor.get(4..) == own.get(4..)
    {
        return Ok(());
    }
    Err(Sense::INVALID_PARAMETER)
}

/// A page may differ from what it is in the bits that can be changed only.
fn changed(code: u8, given: &[u8], writeback: bool) -> Result<Option<bool>, Sense> {
    let current = page(code, Values::Current, writeback).ok_or(Sense::INVALID_PARAMETER)?;
    let mask = page(code, Values::Changeable, writeback).ok_or(Sense::INVALID_PARAMETER)?;
    if given.len() != current.len() {
        return Err(Sense::INVALID_PARAMETER);
    }
    // Behind code and length, which "changeable" has, too.
    let mut bytes = given.iter().zip(&current).zip(&mask).skip(2);
    if bytes.any(|((given, current), mask)| (given ^ current) & !mask != 0) {
        return Err(Sense::INVALID_PARAMETER);
    }
    Ok((code == PAGE_CACHING).then(|| given.get(2).is_some_and(|byte| byte & WCE != 0)))
}
