// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Parameter lists: what commands bring besides their CDB.

use crate::UNMAP_DESCRIPTORS_MAX;
use crate::sense::Sense;
use crate::unit::Geometry;

/// What a parameter list is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterList {
    /// MODE SELECT.
    Mode {
        /// The form of ten bytes.
        ten: bool,
    },
    /// UNMAP.
    Unmap,
}

/// A range of the disk, in bytes, inside its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// Ranges of one command, at most [`UNMAP_DESCRIPTORS_MAX`].
pub type Extents = Vec<Extent>;

/// What a parameter list asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is left to do.
    None,
    /// The cache was switched to write-through: what is in it has to reach the medium.
    Flush,
    /// These ranges are not needed any more.
    Unmap(Extents),
}

/// The ranges of UNMAP (SBC-3, 5.28).
pub(crate) fn unmap(bytes: &[u8], geometry: &Geometry) -> Result<Extents, Sense> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let Some((header, descriptors)) = bytes.split_first_chunk::<8>() else {
        return Err(Sense::PARAMETER_LENGTH);
    };
    let [_, _, high, low, ..] = *header;
    let length = usize::from(u16::from_be_bytes([high, low]));
    // A list may end early; the last descriptor is then left out if it is not whole.
    let descriptors = descriptors.get(..length).unwrap_or(descriptors);
    let (descriptors, _) = descriptors.as_chunks::<16>();
    if descriptors.len() > UNMAP_DESCRIPTORS_MAX {
        return Err(Sense::INVALID_PARAMETER);
    }
    let mut extents = Vec::with_capacity(descriptors.len());
    for [lba @ .., b0, b1, b2, b3, _, _, _, _] in descriptors {
        let blocks = u32::from_be_bytes([*b0, *b1, *b2, *b3]);
        let extent = geometry.extent(u64::from_be_bytes(*lba), blocks.into())?;
        if extent.len > crate::RANGE_MAX_BYTES {
            return Err(Sense::INVALID_PARAMETER);
        }
        if extent.len > 0 {
            extents.push(extent);
        }
    }
    Ok(extents)
}
