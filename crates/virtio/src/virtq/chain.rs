// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a driver asks for with one chain of descriptors, owned and validated.

use ebbtide_memory::{AccessError, Gpa, ReadGuard};
use smallvec::SmallVec;

use super::descriptor::Descriptor;
use super::error::QueueError;

/// One request of the driver.
///
/// Owned: it stays what it is whatever the driver does to the descriptors afterwards. The lengths of all buffers
/// together fit a `u32`, no buffer wraps around the address space, and none is empty (empty ones were left out, which
/// changes nothing: a device must not depend on how a request is cut into descriptors, 2.7.4.1). Whether a buffer lies
/// in guest RAM is found out when it is pinned or copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The first descriptor, by which the chain is given back.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Buffers,
    /// What the device may write, in order.
    pub writable: Buffers,
}

impl Chain {
    pub(crate) fn new(head: u16) -> Self {
        Self {
            head,
            readable: Buffers::default(),
            writable: Buffers::default(),
        }
    }

    /// What it is; leaves an empty one.
    pub(crate) fn take(&mut self) -> Chain {
        std::mem::replace(self, Chain::new(self.head))
    }

    /// Becomes an empty one, without giving up memory.
    pub(super) fn restart(&mut self, head: u16) {
        let Self {
            head: own,
            readable,
            writable,
        } = self;
        *own = head;
        readable.clear();
        writable.clear();
    }

    pub(super) fn push(&mut self, descriptor: &Descriptor) -> Result<(), QueueError> {
        let (gpa, length) = (Gpa(descriptor.address()), descriptor.length());
        if !descriptor.is_writable() && self.writable.seen {
            return Err(QueueError::ReadableAfterWritable { head: self.head });
        }
        // The end may be 2^64 itself: the last byte must have an address, not the one behind it.
        if length > 0 && gpa.0.checked_add(u64::from(length) - 1).is_none() {
            return Err(QueueError::AddressOverflow { gpa, length });
        }
        let rest = u32::MAX - self.readable.total - self.writable.total;
        if length > rest {
            return Err(QueueError::LengthOverflow { head: self.head });
        }
        let side = if descriptor.is_writable() {
            &mut self.writable
        } else {
            &mut self.readable
        };
        side.push(gpa, length);
        Ok(())
    }
}

/// A list of guest buffers, seen as one run of bytes.
///
/// Dereferences to the `(address, length)` pairs, which is what
/// [`pin_list`](ebbtide_memory::ReadGuard::pin_list) takes.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    list: SmallVec<[(Gpa, u32); 4]>,
    /// Sum of the lengths; cannot overflow, see [`Chain::push`].
    total: u32,
    /// Whether there was a descriptor of this side at all, be it an empty one.
    seen: bool,
}

impl Buffers {
    fn push(&mut self, gpa: Gpa, length: u32) {
        self.seen = true;
        if length > 0 {
            self.list.push((gpa, length));
            self.total += length;
        }
    }

    fn clear(&mut self) {
        let Self { list, total, seen } = self;
        list.clear();
        *total = 0;
        *seen = false;
    }

    fn one((gpa, length): (Gpa, u32)) -> Buffers {
        let mut one = Buffers::default();
        one.push(gpa, length);
        one
    }

    /// Bytes of all buffers together.
    pub fn total_len(&self) -> u32 {
        self.total
    }

    /// Takes the first `length` bytes away and returns them, or `None` (and changes nothing) when there are fewer.
    pub fn split_front(&mut self, length: u32) -> Option<Buffers> {
        if length > self.total {
            return None;
        }
        // As drivers mostly cut it: nothing is to be cut.
        if let Some(&first) = self.list.first()
            && first.1 == length
        {
            self.list.remove(0);
            self.total -= length;
            return Some(Buffers::one(first));
        }
        let mut front = Buffers {
            seen: true,
            ..Buffers::default()
        };
        let mut back = Buffers {
            seen: self.seen,
            ..Buffers::default()
        };
        for (gpa, part) in self.list.drain(..) {
            let here = part.min(length - front.total);
            front.push(gpa, here);
            // `here` bytes fit behind `gpa`: the buffer does not wrap (Chain::push). Wrapping only for an empty rest.
            back.push(Gpa(gpa.0.wrapping_add(u64::from(here))), part - here);
        }
        *self = back;
        Some(front)
    }

    /// Takes the last `length` bytes away and returns them, or `None` (and changes nothing) when there are fewer.
    pub fn split_back(&mut self, length: u32) -> Option<Buffers> {
        let keep = self.total.checked_sub(length)?;
        if let Some(&last) = self.list.last()
            && last.1 == length
        {
            self.list.pop();
            self.total = keep;
            return Some(Buffers::one(last));
        }
        let front = self.split_front(keep)?;
        Some(std::mem::replace(self, front))
    }

    /// Takes the last byte away and returns where it is, or `None` when there is none.
    pub(crate) fn pop_byte(&mut self) -> Option<Gpa> {
        let (gpa, length) = self.list.last_mut()?;
        *length -= 1;
        // A buffer does not wrap (Chain::push).
        let last = Gpa(gpa.0.wrapping_add(u64::from(*length)));
        if *length == 0 {
            self.list.pop();
        }
        self.total -= 1;
        Some(last)
    }

    /// Takes the first bytes away and returns what they are, or `None` (and changes nothing) when there are fewer.
    ///
    /// # Errors
    /// A buffer is not in readable guest RAM. They are taken away nevertheless.
    pub(crate) fn read_front<const N: usize>(
        &mut self,
        guard: &ReadGuard<'_>,
    ) -> Result<Option<[u8; N]>, AccessError> {
        // As drivers mostly cut it: nothing is to be cut.
        if let Some(&(gpa, length)) = self.list.first()
            && length as usize == N
        {
            self.list.remove(0);
            self.total -= length;
            return guard.read(gpa).map(Some);
        }
        let mut bytes = [0; N];
        let front = u32::try_from(N)
            .ok()
            .and_then(|count| self.split_front(count));
        match front {
            Some(front) => front.copy_to(guard, &mut bytes).map(|_| Some(bytes)),
            None => Ok(None),
        }
    }

    /// Copies bytes from the start of the list into `to`; returns how many there were, at most `to.len()`.
    ///
    /// # Errors
    /// A buffer is not in readable guest RAM. `to` is then partly written.
    pub fn copy_to(&self, guard: &ReadGuard<'_>, mut to: &mut [u8]) -> Result<usize, AccessError> {
        let mut copied = 0;
        for &(gpa, length) in &self.list {
            let Some((here, rest)) = to.split_at_mut_checked((length as usize).min(to.len()))
            else {
                break;
            };
            if here.is_empty() {
                break;
            }
            guard.read_bytes(gpa, here)?;
            copied += here.len();
            to = rest;
        }
        Ok(copied)
    }

    /// Copies `from` to the start of the list; returns how much found room.
    ///
    /// # Errors
    /// A buffer is not in writable guest RAM. Those before it are then written.
    pub fn copy_from(&self, guard: &ReadGuard<'_>, mut from: &[u8]) -> Result<usize, AccessError> {
        let mut copied = 0;
        for &(gpa, length) in &self.list {
            let Some((here, rest)) = from.split_at_checked((length as usize).min(from.len()))
            else {
                break;
            };
            if here.is_empty() {
                break;
            }
            guard.write_bytes(gpa, here)?;
            copied += here.len();
            from = rest;
        }
        Ok(copied)
    }
}

/// Two lists are equal when they name the same buffers.
impl PartialEq for Buffers {
    fn eq(&self, other: &Self) -> bool {
        self.list == other.list
    }
}

impl Eq for Buffers {}

impl std::ops::Deref for Buffers {
    type Target = [(Gpa, u32)];

    fn deref(&self) -> &Self::Target {
        &self.list
    }
}
