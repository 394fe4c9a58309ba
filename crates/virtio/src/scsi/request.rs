// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The wire format, as functions of bytes (virtio 1.3, 5.6.6).

use ebbtide_scsi::{Lun, Sense, status};
use smallvec::SmallVec;

/// Bytes of a command in front of its CDB.
pub(super) const COMMAND_HEADER_BYTES: u32 = 19;
/// Bytes of a response in front of its sense data.
pub(super) const RESPONSE_HEADER_BYTES: u32 = 12;
/// Bytes of an event.
pub(super) const EVENT_BYTES: usize = 16;
/// Bytes of a task management function.
pub(super) const TMF_BYTES: u32 = 24;
/// Bytes of an asynchronous notification query or subscription, and of its answer.
pub(super) const NOTIFICATION_BYTES: u32 = 16;
pub(super) const NOTIFICATION_ANSWER_BYTES: u32 = 5;

/// `response` of commands and control requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Response {
    /// Also "function complete".
    Ok = 0,
    Overrun = 1,
    Aborted = 2,
    BadTarget = 3,
    Reset = 4,
    Failure = 9,
    FunctionSucceeded = 10,
    FunctionRejected = 11,
    IncorrectLun = 12,
}

/// A unit of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address {
    pub target: u8,
    pub lun: Lun,
}

impl Address {
    /// Single-level addressing behind a 1 and the target. `None`: something else, which is no unit here.
    pub(super) fn parse(bytes: [u8; 8]) -> Option<Address> {
        let [1, target, high, low, 0, 0, 0, 0] = bytes else {
            return None;
        };
        let lun = Lun::from_bytes([high, low])?;
        Some(Address { target, lun })
    }

    pub(super) fn to_bytes(self) -> [u8; 8] {
        let [high, low] = self.lun.to_bytes();
        [1, self.target, high, low, 0, 0, 0, 0]
    }
}

/// The fixed part of a command. Task attributes are not looked at: every order of commands is as good as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CommandHeader {
    /// `None`: no address of a unit.
    pub address: Option<Address>,
    pub tag: u64,
}

impl CommandHeader {
    /// The header of a command, and its CDB.
    pub(super) fn parse(bytes: &[u8]) -> Option<(CommandHeader, &[u8])> {
        let (lun, rest) = bytes.split_first_chunk::<8>()?;
        let (tag, rest) = rest.split_first_chunk::<8>()?;
        // Attribute, priority, command reference number.
        let (_, cdb) = rest.split_first_chunk::<3>()?;
        let header = CommandHeader {
            address: Address::parse(*lun),
            tag: u64::from_le_bytes(*tag),
        };
        Some((header, cdb))
    }
}

/// The answer to a command, as long as the driver made the place for it.
pub(super) fn response_bytes(
    response: Response,
    sense: Option<Sense>,
    residual: u32,
    sense_size: u32,
) -> SmallVec<[u8; 128]> {
    let data = sense.map(|sense| sense.fixed());
    let data = data.as_ref().map_or(&[][..], |data| data);
    let data = data.get(..sense_size as usize).unwrap_or(data);
    let (length, status) = match sense {
        None => (0, status::GOOD),
        Some(_) => (data.len() as u32, status::CHECK_CONDITION),
    };
    let mut bytes = SmallVec::new();
    bytes.extend(length.to_le_bytes());
    bytes.extend(residual.to_le_bytes());
    // Status qualifier: none.
    bytes.extend([0, 0, status, response as u8]);
    bytes.extend_from_slice(data);
    bytes.resize((RESPONSE_HEADER_BYTES + sense_size) as usize, 0);
    bytes
}

/// Task management functions (5.6.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    AbortTask,
    AbortTaskSet,
    ClearTaskSet,
    NexusReset,
    UnitReset,
    QueryTask,
    QueryTaskSet,
}

/// A request on the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Control {
    Task {
        /// `None`: a function there is not.
        function: Option<Function>,
        address: Option<Address>,
        tag: u64,
    },
    /// Asynchronous notification: query or subscribe.
    Notification { address: Option<Address> },
}

impl Control {
    /// `None`: too short, or of an unknown type.
    pub(super) fn parse(bytes: &[u8]) -> Option<Control> {
        let (kind, rest) = bytes.split_first_chunk::<4>()?;
        match u32::from_le_bytes(*kind) {
            0 => {
                let (subtype, rest) = rest.split_first_chunk::<4>()?;
                let (lun, rest) = rest.split_first_chunk::<8>()?;
                let tag = rest.first_chunk::<8>()?;
                Some(Control::Task {
                    function: function(u32::from_le_bytes(*subtype)),
                    address: Address::parse(*lun),
                    tag: u64::from_le_bytes(*tag),
                })
            }
            1 | 2 => {
                let (lun, rest) = rest.split_first_chunk::<8>()?;
                // What is asked for: there is nothing, whatever it is.
                rest.first_chunk::<4>()?;
                let address = Address::parse(*lun);
                Some(Control::Notification { address })
            }
            _ => None,
        }
    }
}

fn function(subtype: u32) -> Option<Function> {
    match subtype {
        0 => Some(Function::AbortTask),
        1 => Some(Function::AbortTaskSet),
        3 => Some(Function::ClearTaskSet),
        4 => Some(Function::NexusReset),
        5 => Some(Function::UnitReset),
        6 => Some(Function::QueryTask),
        7 => Some(Function::QueryTaskSet),
        // 2 clears an auto contingent allegiance, which there never is.
        _ => None,
    }
}

/// What the driver hears of on the event queue (5.6.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A unit is there.
    Added(Address),
    /// A unit is gone.
    Removed(Address),
    /// The capacity of a unit has changed.
    CapacityChanged(Address),
}

impl Event {
    /// `missed`: others were lost before it.
    pub(super) fn to_bytes(self, missed: bool) -> [u8; EVENT_BYTES] {
        const MISSED: u32 = 1 << 31;
        const TRANSPORT_RESET: u32 = 1;
        const PARAM_CHANGE: u32 = 3;
        // Additional sense code, and its qualifier above.
        const CAPACITY: u32 = 0x2a | 0x09 << 8;
        let (kind, address, reason) = match self {
            Event::Added(address) => (TRANSPORT_RESET, address, 1),
            Event::Removed(address) => (TRANSPORT_RESET, address, 2),
            Event::CapacityChanged(address) => (PARAM_CHANGE, address, CAPACITY),
        };
        let kind = kind | if missed { MISSED } else { 0 };
        let mut bytes = [0; EVENT_BYTES];
        let fields = kind
            .to_le_bytes()
            .into_iter()
            .chain(address.to_bytes())
            .chain(reason.to_le_bytes());
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(target: u8, lun: u16) -> Address {
        let lun = Lun::new(lun).unwrap();
        Address { target, lun }
    }

    #[test]
    fn addresses() {
        for (bytes, expected) in [
            ([1, 7, 0, 9, 0, 0, 0, 0], Some(address(7, 9))),
            ([1, 7, 0x40, 9, 0, 0, 0, 0], Some(address(7, 9))),
            ([1, 255, 0x7f, 0xff, 0, 0, 0, 0], Some(address(255, 16383))),
            ([0, 7, 0, 9, 0, 0, 0, 0], None),
            ([0xc1, 1, 0, 0, 0, 0, 0, 0], None),
            ([1, 7, 0x80, 9, 0, 0, 0, 0], None),
            ([1, 7, 0, 9, 0, 1, 0, 0], None),
        ] {
            assert_eq!(Address::parse(bytes), expected);
        }
        assert_eq!(address(2, 256).to_bytes(), [1, 2, 0x41, 0, 0, 0, 0, 0]);
        assert_eq!(address(2, 255).to_bytes(), [1, 2, 0, 255, 0, 0, 0, 0]);
    }

    #[test]
    fn commands() {
        let mut bytes = vec![1, 3, 0x40, 5, 0, 0, 0, 0];
        bytes.extend(0x1122_u64.to_le_bytes());
        bytes.extend([2, 1, 0, 0x28, 0]);
        let (header, cdb) = CommandHeader::parse(&bytes).unwrap();
        assert_eq!(header.address, Some(address(3, 5)));
        assert_eq!((header.tag, cdb), (0x1122, &[0x28, 0][..]));
        assert!(CommandHeader::parse(&bytes[..18]).is_none());
    }

    #[test]
    fn responses() {
        let good = response_bytes(Response::Ok, None, 5, 96);
        assert_eq!(good.len(), 108);
        assert_eq!(good[..12], [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        let check = response_bytes(Response::Ok, Some(Sense::INVALID_FIELD), 0, 96);
        assert_eq!(check[..12], [18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!((check[12], check[14], check[24]), (0x70, 5, 0x24));
        let short = response_bytes(Response::Ok, Some(Sense::INVALID_FIELD), 0, 4);
        assert_eq!(short.len(), 16);
        assert_eq!(short[0], 4);
        assert_eq!(response_bytes(Response::BadTarget, None, 0, 0)[11], 3);
    }

    #[test]
    fn control_requests() {
        let mut bytes = vec![0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 3, 0, 0, 0, 0];
        bytes.extend(9_u64.to_le_bytes());
        let reset = Control::Task {
            function: Some(Function::UnitReset),
            address: Some(address(0, 3)),
            tag: 9,
        };
        assert_eq!(Control::parse(&bytes), Some(reset));
        assert_eq!(Control::parse(&bytes[..23]), None);
        bytes[4] = 2;
        let parsed = Control::parse(&bytes);
        assert!(matches!(parsed, Some(Control::Task { function: None, .. })));
        bytes[0] = 1;
        assert!(matches!(
            Control::parse(&bytes),
            Some(Control::Notification { .. })
        ));
        bytes[0] = 3;
        assert_eq!(Control::parse(&bytes), None);
    }

    #[test]
    fn events() {
        assert_eq!(
            Event::Removed(address(1, 300)).to_bytes(false),
            [1, 0, 0, 0, 1, 1, 0x41, 44, 0, 0, 0, 0, 2, 0, 0, 0]
        );
        assert_eq!(
            Event::CapacityChanged(address(1, 2)).to_bytes(true),
            [3, 0, 0, 0x80, 1, 1, 0, 2, 0, 0, 0, 0, 0x2a, 9, 0, 0]
        );
    }
}
