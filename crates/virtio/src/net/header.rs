// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The header in front of each frame (virtio 1.3, 5.1.6): which of it was agreed upon.

use ebbtide_net::{HEADER_BYTES, Offloads};

use super::feature::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, HOST_ECN, HOST_TSO4, HOST_TSO6,
};

/// `flags`: the checksum is to be filled in.
const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum was checked.
const DATA_VALID: u8 = 2;

/// `gso_type`: one segment.
const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
const GSO_TCPV6: u8 = 4;
/// `gso_type`: ... with ECN bits.
const GSO_ECN: u8 = 0x80;

/// Offset of `num_buffers`, the last field.
const NUM_BUFFERS: usize = 10;

/// Which features allow what, in one direction.
struct Allowed {
    csum: bool,
    tso4: bool,
    tso6: bool,
    ecn: bool,
}

impl Allowed {
    fn by(features: u64, [csum, tso4, tso6, ecn]: [u64; 4]) -> Allowed {
        let has = |bit| features & bit != 0;
        Allowed {
            csum: has(csum),
            tso4: has(tso4),
            tso6: has(tso6),
            ecn: has(ecn),
        }
    }

    fn segments(&self, gso_type: u8) -> bool {
        let kind = match gso_type & !GSO_ECN {
            GSO_NONE => return gso_type == GSO_NONE,
            GSO_TCPV4 => self.tso4,
            GSO_TCPV6 => self.tso6,
            _ => false,
        };
        kind && (gso_type & GSO_ECN == 0 || self.ecn)
    }
}

/// Makes the header of a packet to send what was agreed upon (5.1.6.2.2). False: it cannot be sent.
///
/// Where the checksum is and how long a segment is the host's kernel checks itself, against the frame.
pub(super) fn admit_sent(features: u64, packet: &mut [u8]) -> bool {
    let Some(header) = packet.first_chunk_mut::<HEADER_BYTES>() else {
        return false;
    };
    let allowed = Allowed::by(features, [CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN]);
    let [flags, gso_type, rest @ ..] = header;
    if !allowed.segments(*gso_type) {
        return false;
    }
    *flags &= if allowed.csum { NEEDS_CSUM } else { 0 };
    if *flags == 0 && *gso_type == GSO_NONE {
        rest.fill(0);
    }
    // `num_buffers` means nothing in this direction.
    write_num_buffers(packet, 0);
    true
}

/// Whether a received packet leaves to the driver only what was agreed upon (5.1.6.4.1).
pub(super) fn admits_received(features: u64, packet: &mut [u8]) -> bool {
    let [flags, gso_type, ..] = packet else {
        return false;
    };
    let allowed = Allowed::by(features, [GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN]);
    if !allowed.csum {
        *flags &= !DATA_VALID;
    }
    allowed.segments(*gso_type) && (allowed.csum || *flags & NEEDS_CSUM == 0)
}

/// Says over how many chains a received packet goes.
pub(super) fn write_num_buffers(packet: &mut [u8], count: u16) {
    if let Some(field) = packet.get_mut(NUM_BUFFERS..HEADER_BYTES) {
        field.copy_from_slice(&count.to_le_bytes());
    }
}

/// What the backend may leave to the driver, by features: those agreed upon, or those a command left on.
pub(super) fn offloads(features: u64) -> Offloads {
    let has = |bit| features & bit != 0;
    Offloads {
        csum: has(GUEST_CSUM),
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    fn packet(flags: u8, gso_type: u8) -> [u8; 12] {
        [flags, gso_type, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    }

    #[test]
    fn sent_headers() {
        for (features, gso_type, sent) in [
            (ALL, 0, true),
            (0, 0, true),
            (ALL, 1, true),
            (ALL, 4, true),
            (ALL, 0x81, true),
            (ALL, 0x84, true),
            (ALL & !HOST_TSO4, 1, false),
            (ALL & !HOST_TSO6, 4, false),
            (ALL & !HOST_ECN, 0x81, false),
            (ALL, 0x80, false),
            (ALL, 2, false),
            (ALL, 3, false),
            (ALL, 5, false),
            (ALL, 0xff, false),
        ] {
            let mut bytes = packet(1, gso_type);
            assert_eq!(admit_sent(features, &mut bytes), sent, "{gso_type:#x}");
        }
        let mut bytes = packet(0xff, 1);
        assert!(admit_sent(ALL, &mut bytes));
        assert_eq!(bytes, [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
        let mut bytes = packet(0xff, 0);
        assert!(admit_sent(0, &mut bytes));
        assert_eq!(bytes, [0; 12], "nothing was agreed upon");
        assert!(!admit_sent(ALL, &mut bytes[..11]));
    }

    #[test]
    fn received_headers() {
        for (features, flags, gso_type, taken) in [
            (0, 0, 0, true),
            (0, 1, 0, false),
            (GUEST_CSUM, 1, 0, true),
            (GUEST_CSUM, 1, 1, false),
            (GUEST_CSUM | GUEST_TSO4, 1, 1, true),
            (GUEST_CSUM | GUEST_TSO4, 1, 0x81, false),
            (ALL, 1, 0x84, true),
            (ALL, 0, 3, false),
        ] {
            let mut bytes = packet(flags, gso_type);
            assert_eq!(admits_received(features, &mut bytes), taken);
        }
        let mut bytes = packet(2, 0);
        assert!(admits_received(0, &mut bytes));
        assert_eq!(bytes[0], 0, "valid is what the driver has to find out");
        write_num_buffers(&mut bytes, 0x0102);
        assert_eq!(bytes[10..], [2, 1]);
    }
}
