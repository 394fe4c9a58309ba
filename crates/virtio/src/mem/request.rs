// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests and answers on the wire (virtio 1.3, 5.15.6).

/// Bytes of a request. What a driver appends is ignored.
pub(crate) const REQUEST_BYTES: u32 = 24;
/// Bytes of an answer.
pub(crate) const RESPONSE_BYTES: u32 = 10;

const TYPE_PLUG: u16 = 0;
const TYPE_UNPLUG: u16 = 1;
const TYPE_UNPLUG_ALL: u16 = 2;
const TYPE_STATE: u16 = 3;

/// Blocks a request is about: an address and a count, as the driver wrote them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub addr: u64,
    pub count: u16,
}

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Plug(Blocks),
    Unplug(Blocks),
    UnplugAll,
    State(Blocks),
}

impl Request {
    /// `None`: no request of this specification; the device cannot answer it in any way the driver understands.
    pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES as usize]) -> Option<Request> {
        let [t0, t1, _, _, _, _, _, _, body @ ..] = *bytes;
        let [addr @ .., n0, n1, _, _, _, _, _, _] = body;
        let blocks = Blocks {
            addr: u64::from_le_bytes(addr),
            count: u16::from_le_bytes([n0, n1]),
        };
        match u16::from_le_bytes([t0, t1]) {
            TYPE_PLUG => Some(Request::Plug(blocks)),
            TYPE_UNPLUG => Some(Request::Unplug(blocks)),
            TYPE_UNPLUG_ALL => Some(Request::UnplugAll),
            TYPE_STATE => Some(Request::State(blocks)),
            _ => None,
        }
    }

    pub(crate) fn kind(&self) -> RequestKind {
        match self {
            Request::Plug(_) => RequestKind::Plug,
            Request::Unplug(_) => RequestKind::Unplug,
            Request::UnplugAll => RequestKind::UnplugAll,
            Request::State(_) => RequestKind::State,
        }
    }
}

/// What sort of request it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Make blocks usable.
    Plug,
    /// Give blocks back.
    Unplug,
    /// Give everything back.
    UnplugAll,
    /// Ask whether blocks are plugged.
    State,
}

/// The state of a range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// What the driver is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Ack,
    /// The answer to a state request.
    State(BlockState),
    /// Over the requested size. Linux tries again at once.
    Nack,
    /// Not now. Linux sleeps for 50 s and more.
    Busy,
    /// The request itself is wrong. Linux gives the device up for good.
    Error,
}

impl Answer {
    pub(crate) fn to_bytes(self) -> [u8; RESPONSE_BYTES as usize] {
        let (kind, state) = match self {
            Answer::Ack => (0_u16, 0),
            Answer::State(state) => (0, state as u16),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
        };
        let [k0, k1] = kind.to_le_bytes();
        let [s0, s1] = state.to_le_bytes();
        [k0, k1, 0, 0, 0, 0, 0, 0, s0, s1]
    }
}

#[cfg(test)]
pub(crate) fn encode(request: Request) -> [u8; REQUEST_BYTES as usize] {
    let (kind, blocks) = match request {
        Request::Plug(blocks) => (TYPE_PLUG, blocks),
        Request::Unplug(blocks) => (TYPE_UNPLUG, blocks),
        Request::UnplugAll => (TYPE_UNPLUG_ALL, Blocks { addr: 0, count: 0 }),
        Request::State(blocks) => (TYPE_STATE, blocks),
    };
    let mut bytes = [0x5a; REQUEST_BYTES as usize]; // padding is to be ignored
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&blocks.addr.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.count.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        let blocks = Blocks {
            addr: 0x1_2345_6789_abcd,
            count: 0xfedc,
        };
        for request in [
            Request::Plug(blocks),
            Request::Unplug(blocks),
            Request::UnplugAll,
            Request::State(blocks),
        ] {
            assert_eq!(Request::parse(&encode(request)), Some(request));
        }
    }

    #[test]
    fn unknown_types_are_no_requests() {
        for kind in [4_u16, 5, 0x0100, u16::MAX] {
            let mut bytes = [0; 24];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            assert_eq!(Request::parse(&bytes), None);
        }
    }

    #[test]
    fn answers_on_the_wire() {
        let plain = |kind| [kind, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(Answer::Ack.to_bytes(), plain(0));
        assert_eq!(Answer::Nack.to_bytes(), plain(1));
        assert_eq!(Answer::Busy.to_bytes(), plain(2));
        assert_eq!(Answer::Error.to_bytes(), plain(3));
        assert_eq!(Answer::State(BlockState::Plugged).to_bytes(), plain(0));
        assert_eq!(
            Answer::State(BlockState::Unplugged).to_bytes(),
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
        );
        assert_eq!(
            Answer::State(BlockState::Mixed).to_bytes(),
            [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]
        );
    }
}
