// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a driver asks of a disk: parsing and checking, as functions of bytes (virtio 1.3, 5.2.6).

use smallvec::SmallVec;

/// The unit of sector numbers, whatever the block size.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Bytes of the header in front of every request.
const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
pub(crate) const SEGMENT_BYTES: u32 = 16;
/// Bytes of the answer to "get id".
pub(crate) const ID_BYTES: usize = 20;

/// The most sectors one range may have: 1 GiB, so that a host that writes zeroes by hand answers in the end.
pub(crate) const SEGMENT_SECTORS_MAX: u32 = 1 << 21;
/// The most ranges one request may have.
pub(crate) const SEGMENTS_MAX: u32 = 32;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const SEGMENT_FLAG_UNMAP: u32 = 1;

/// The last byte of every answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub(crate) enum Status {
    #[default]
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// What the device offers and the driver accepted, as far as requests depend on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub capacity_bytes: u64,
    pub readonly: bool,
    /// VIRTIO_BLK_F_DISCARD is negotiated.
    pub discard: bool,
    /// VIRTIO_BLK_F_WRITE_ZEROES is negotiated.
    pub write_zeroes: bool,
}

/// A range of the disk, in bytes, inside its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset: u64,
    pub len: u64,
    /// Space may be given back.
    pub unmap: bool,
}

pub(crate) type Segments = SmallVec<[Segment; 1]>;

/// The kind of a request, known from its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// `None`: a type this device does not know.
    pub kind: Option<Kind>,
    pub sector: u64,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *bytes;
        let kind = match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN => Some(Kind::Read),
            TYPE_OUT => Some(Kind::Write),
            TYPE_FLUSH => Some(Kind::Flush),
            TYPE_GET_ID => Some(Kind::GetId),
            TYPE_DISCARD => Some(Kind::Discard),
            TYPE_WRITE_ZEROES => Some(Kind::WriteZeroes),
            _ => None,
        };
        Header {
            kind,
            sector: u64::from_le_bytes(sector),
        }
    }
}

impl Terms {
    /// The byte offset of a read or write of `len` bytes.
    pub(crate) fn transfer_offset(&self, sector: u64, len: u32) -> Result<u64, Status> {
        if !u64::from(len).is_multiple_of(SECTOR_BYTES) {
            return Err(Status::IoErr);
        }
        self.range(sector, u64::from(len)).ok_or(Status::IoErr)
    }

    /// What a write must pass besides its range (5.2.6.2: a read-only device fails it and writes nothing).
    pub(crate) fn writable(&self) -> Result<(), Status> {
        if self.readonly {
            Err(Status::IoErr)
        } else {
            Ok(())
        }
    }

    /// How many ranges a discard or write-zeroes request of `len` bytes behind its header has.
    pub(crate) fn segment_count(&self, kind: Kind, len: u32) -> Result<u32, Status> {
        let negotiated = match kind {
            Kind::Discard => self.discard,
            Kind::WriteZeroes => self.write_zeroes,
            _ => false,
        };
        if !negotiated {
            return Err(Status::Unsupported);
        }
        self.writable()?;
        let count = len / SEGMENT_BYTES;
        if count == 0 || count > SEGMENTS_MAX || !len.is_multiple_of(SEGMENT_BYTES) {
            return Err(Status::IoErr);
        }
        Ok(count)
    }

    /// The ranges of a discard or write-zeroes request, from the bytes behind its header.
    pub(crate) fn segments(&self, kind: Kind, bytes: &[u8]) -> Result<Segments, Status> {
        let (segments, _) = bytes.as_chunks::<{ SEGMENT_BYTES as usize }>();
        segments
            .iter()
            .map(|bytes| self.segment(kind, bytes))
            .collect()
    }

    fn segment(&self, kind: Kind, bytes: &[u8; SEGMENT_BYTES as usize]) -> Result<Segment, Status> {
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *bytes;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let allowed = match kind {
            Kind::WriteZeroes => SEGMENT_FLAG_UNMAP,
            _ => 0,
        };
        // 5.2.6.2: unknown flags, and "unmap" in a discard, are unsupported rather than wrong.
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > SEGMENT_SECTORS_MAX {
            return Err(Status::IoErr);
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        let offset = self
            .range(u64::from_le_bytes(sector), len)
            .ok_or(Status::IoErr)?;
        Ok(Segment {
            offset,
            len,
            unmap: flags & SEGMENT_FLAG_UNMAP != 0,
        })
    }

    /// Start of the range in bytes; `None` when it ends behind the disk.
    fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR_BYTES)?;
        let end = offset.checked_add(len)?;
        (end <= self.capacity_bytes).then_some(offset)
    }
}

/// The answer to "get id": the serial, cut or padded with zeroes (5.2.6.1).
pub(crate) fn id_bytes(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        capacity_bytes: 1 << 20,
        readonly: false,
        discard: true,
        write_zeroes: true,
    };

    fn header(kind: u32, sector: u64) -> Header {
        let mut bytes = [0xee; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        Header::parse(&bytes)
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    #[test]
    fn headers() {
        let known = [
            (0, Kind::Read),
            (1, Kind::Write),
            (4, Kind::Flush),
            (8, Kind::GetId),
            (11, Kind::Discard),
            (13, Kind::WriteZeroes),
        ];
        for (number, kind) in known {
            let expected = Header {
                kind: Some(kind),
                sector: 0x1122_3344_5566_7788,
            };
            assert_eq!(header(number, 0x1122_3344_5566_7788), expected);
        }
        for unknown in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 1 << 31, u32::MAX] {
            assert_eq!(header(unknown, 1).kind, None);
        }
    }

    #[test]
    fn transfers_stay_on_the_disk() {
        assert_eq!(TERMS.transfer_offset(0, 1 << 20), Ok(0));
        assert_eq!(TERMS.transfer_offset(2047, 512), Ok(2047 * 512));
        assert_eq!(TERMS.transfer_offset(2048, 0), Ok(1 << 20));
        for (sector, len) in [
            (0, 511),
            (0, 513),
            (2048, 512),
            (2047, 1024),
            (1 << 55, 0),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
        ] {
            assert_eq!(
                TERMS.transfer_offset(sector, len),
                Err(Status::IoErr),
                "{sector} {len}"
            );
        }
    }

    #[test]
    fn segments_are_checked() {
        let parse = |kind, bytes: &[u8]| TERMS.segments(kind, bytes);
        let plain = Segment {
            offset: 512,
            len: 1024,
            unmap: false,
        };
        assert_eq!(
            parse(Kind::Discard, &segment(1, 2, 0)).unwrap().as_slice(),
            [plain]
        );
        let unmap = Segment {
            unmap: true,
            ..plain
        };
        let two = [segment(1, 2, 1), segment(1, 2, 0)].concat();
        assert_eq!(
            parse(Kind::WriteZeroes, &two).unwrap().as_slice(),
            [unmap, plain]
        );
        assert_eq!(
            parse(Kind::Discard, &segment(1, 2, 1)),
            Err(Status::Unsupported)
        );
        assert_eq!(
            parse(Kind::Discard, &segment(1, 2, 2)),
            Err(Status::Unsupported)
        );
        assert_eq!(
            parse(Kind::WriteZeroes, &segment(1, 2, 3)),
            Err(Status::Unsupported)
        );
        assert_eq!(
            parse(Kind::WriteZeroes, &segment(2047, 2, 0)),
            Err(Status::IoErr)
        );
        assert_eq!(
            parse(Kind::WriteZeroes, &segment(u64::MAX, 1, 0)),
            Err(Status::IoErr)
        );
        let big = Terms {
            capacity_bytes: u64::MAX,
            ..TERMS
        };
        let bytes = segment(0, SEGMENT_SECTORS_MAX + 1, 0);
        assert_eq!(big.segments(Kind::Discard, &bytes), Err(Status::IoErr));
        let bytes = segment(0, SEGMENT_SECTORS_MAX, 0);
        assert!(big.segments(Kind::Discard, &bytes).is_ok());
    }

    #[test]
    fn segment_counts() {
        assert_eq!(TERMS.segment_count(Kind::Discard, 16), Ok(1));
        assert_eq!(TERMS.segment_count(Kind::Discard, 32 * 16), Ok(32));
        for len in [0, 8, 17, 33 * 16] {
            assert_eq!(
                TERMS.segment_count(Kind::WriteZeroes, len),
                Err(Status::IoErr),
                "{len}"
            );
        }
        let plain = Terms {
            discard: false,
            write_zeroes: false,
            ..TERMS
        };
        assert_eq!(
            plain.segment_count(Kind::Discard, 16),
            Err(Status::Unsupported)
        );
        assert_eq!(
            plain.segment_count(Kind::WriteZeroes, 16),
            Err(Status::Unsupported)
        );
        let readonly = Terms {
            readonly: true,
            ..TERMS
        };
        assert_eq!(
            readonly.segment_count(Kind::Discard, 16),
            Err(Status::IoErr)
        );
        assert_eq!(readonly.writable(), Err(Status::IoErr));
    }

    #[test]
    fn serials_are_cut_and_padded() {
        assert_eq!(&id_bytes("abc")[..5], b"abc\0\0");
        assert_eq!(
            &id_bytes("0123456789abcdefghijKLM"),
            b"0123456789abcdefghij"
        );
    }
}
