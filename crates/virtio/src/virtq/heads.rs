// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which chains a device has.

/// The chains in flight, a bit for each head: so it is found out when a driver makes one available that the device still has,
/// or a device gives one back that it has not.
pub(super) struct Heads {
    bits: Box<[u64]>,
    /// So many more are in flight, with heads that nobody has written down.
    unnamed: u16,
}

impl Heads {
    /// For a queue of `size`; `unnamed` of its chains are in flight.
    pub(super) fn new(size: u16, unnamed: u16) -> Heads {
        let words = usize::from(size).div_ceil(u64::BITS as usize);
        Heads {
            bits: vec![0; words].into(),
            unnamed,
        }
    }

    /// The device takes chain `head`, whose number was checked. False: it has it already.
    pub(super) fn insert(&mut self, head: u16) -> bool {
        let (word, bit) = place(head);
        let Some(bits) = self.bits.get_mut(word) else {
            return false;
        };
        let absent = *bits & bit == 0;
        *bits |= bit;
        absent
    }

    /// The device gives chain `head` back. False: it has not got it.
    pub(super) fn remove(&mut self, head: u16) -> bool {
        let (word, bit) = place(head);
        let Some(bits) = self.bits.get_mut(word) else {
            return false;
        };
        if *bits & bit != 0 {
            *bits &= !bit;
            return true;
        }
        let Some(rest) = self.unnamed.checked_sub(1) else {
            return false;
        };
        self.unnamed = rest;
        true
    }
}

fn place(head: u16) -> (usize, u64) {
    let (word, bit) = (head / u64::BITS as u16, u32::from(head) % u64::BITS);
    (word.into(), 1 << bit)
}
