// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's memory as its driver sees it: pieces to allocate, bytes to read and write.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use ebbtide_memory::{AddressSpace, Gpa};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// RAM to allocate from. Clones share it.
#[derive(Clone)]
pub struct GuestRam {
    space: Arc<AddressSpace>,
    /// Free ranges by their start; none touch each other.
    free: Arc<Mutex<BTreeMap<u64, u64>>>,
}

impl GuestRam {
    /// All of `range` is free. It must be RAM of `space`.
    pub fn new(space: &Arc<AddressSpace>, range: Range<u64>) -> Self {
        let free = BTreeMap::from([(range.start, range.end)]);
        Self {
            space: Arc::clone(space),
            free: Arc::new(Mutex::new(free)),
        }
    }

    /// The address space the RAM is part of.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// `len` bytes (at least one), aligned, zeroed.
    ///
    /// # Panics
    /// When there is no room: a test that needs more makes more.
    pub fn alloc(&self, len: usize, align: u64) -> Gpa {
        let len = u64::try_from(len).expect("a length").max(1);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(&start, &end): (&u64, &u64)| {
            let at = start.next_multiple_of(align);
            (at + len <= end).then_some((start, end, at))
        };
        let (start, end, at) = free.iter().find_map(fits).expect("guest RAM is full");
        free.remove(&start);
        if start < at {
            free.insert(start, at);
        }
        if at + len < end {
            free.insert(at + len, end);
        }
        drop(free);
        self.write(Gpa(at), &vec![0; usize::try_from(len).expect("a length")]);
        Gpa(at)
    }

    /// Gives back what [`alloc`](Self::alloc) returned for this length.
    pub fn free(&self, gpa: Gpa, len: usize) {
        let (mut start, mut end) = (gpa.0, gpa.0 + u64::try_from(len).expect("a length").max(1));
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((&before, &before_end)) = free.range(..start).next_back()
            && before_end == start
        {
            free.remove(&before);
            start = before;
        }
        if let Some(behind_end) = free.remove(&end) {
            end = behind_end;
        }
        free.insert(start, end);
    }

    /// Bytes that are free.
    pub fn free_bytes(&self) -> u64 {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.iter().map(|(start, end)| end - start).sum()
    }

    /// Copies `bytes` into guest memory.
    ///
    /// # Panics
    /// When there is no RAM.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) {
        let reader = self.space.memory().register();
        self.space
            .read(&reader)
            .write_bytes(gpa, bytes)
            .expect("write to guest RAM");
    }

    /// Copies `len` bytes out of guest memory.
    ///
    /// # Panics
    /// When there is no RAM.
    pub fn read(&self, gpa: Gpa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let reader = self.space.memory().register();
        self.space
            .read(&reader)
            .read_bytes(gpa, &mut bytes)
            .expect("read from guest RAM");
        bytes
    }

    /// Writes a value.
    ///
    /// # Panics
    /// When there is no RAM.
    pub fn put<T: IntoBytes + Immutable>(&self, gpa: Gpa, value: &T) {
        self.write(gpa, value.as_bytes());
    }

    /// Reads a value.
    ///
    /// # Panics
    /// When there is no RAM.
    pub fn get<T: FromBytes>(&self, gpa: Gpa) -> T {
        T::read_from_bytes(&self.read(gpa, size_of::<T>())).expect("as many bytes as the type has")
    }
}
