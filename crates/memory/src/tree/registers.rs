// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device registers: what a device implements, which accesses it takes, and how what the guest
//! does is cut to that.

use std::fmt;
use std::sync::Arc;

use ebbtide_gate::{Entry, Gate};

use crate::Access;
use crate::busy::{Busy, EntryPoint, Key};

/// Device registers.
///
/// Called outside any read section, from several threads at once, with the region perhaps
/// already out of the map: what the device does with late accesses is its own business.
pub trait Mmio: Send + Sync {
    /// A load of `size` bytes (1, 2, 4 or 8) at `offset` of the region, a multiple of `size`
    /// unless the region's [`AccessRules`] allow others.
    fn read(&self, offset: u64, size: u8) -> u64;
    /// A store of `size` bytes (1, 2, 4 or 8) at `offset` of the region, a multiple of `size`
    /// unless the region's [`AccessRules`] allow others.
    fn write(&self, offset: u64, size: u8, value: u64);
    /// The gate of the device the registers belong to. Two regions of one gate are one device:
    /// neither can be reached by DMA while the other is being served.
    fn gate(&self) -> Option<&Arc<Gate>> {
        None
    }
}

/// The byte order of registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Endian {
    /// The lowest address holds the least significant byte.
    #[default]
    Little,
    /// The lowest address holds the most significant byte.
    Big,
}

/// Which accesses registers take, and in which sizes the device implements them. Sizes are in
/// bytes: 1, 2, 4 or 8.
///
/// A transfer is first cut into accesses of `max_size` at most, each a power of two and, unless
/// `unaligned`, at a multiple of its size. One smaller than `min_size` or against `access` is
/// refused. An access larger than `impl_max` becomes several, lowest address first. One smaller
/// than `impl_min` is served from the aligned `impl_min` bytes around it; a store then is a load,
/// a change and a store, so registers whose loads have side effects want `min_size` instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessRules {
    /// Smallest access taken.
    pub min_size: u8,
    /// Largest access taken; more is several accesses.
    pub max_size: u8,
    /// Smallest access the device implements.
    pub impl_min: u8,
    /// Largest access the device implements.
    pub impl_max: u8,
    /// Accesses need not be aligned.
    pub unaligned: bool,
    /// Byte order.
    pub endian: Endian,
    /// What may be done at all.
    pub access: Access,
}

impl Default for AccessRules {
    /// Aligned accesses of 1 to 8 bytes, all of them implemented, little-endian.
    fn default() -> AccessRules {
        AccessRules {
            min_size: 1,
            max_size: 8,
            impl_min: 1,
            impl_max: 8,
            unaligned: false,
            endian: Endian::Little,
            access: Access::ReadWrite,
        }
    }
}

impl AccessRules {
    /// What contradicts itself, if anything.
    pub(super) fn fault(&self) -> Option<&'static str> {
        let sizes = [self.min_size, self.max_size, self.impl_min, self.impl_max];
        if !sizes.iter().all(|size| matches!(size, 1 | 2 | 4 | 8)) {
            return Some("access sizes are 1, 2, 4 or 8 bytes");
        }
        if self.min_size > self.max_size || self.impl_min > self.impl_max {
            return Some("the smallest access size is larger than the largest");
        }
        None
    }

    /// Bytes of the first access of a transfer of `len` bytes (at least 1) at `offset`.
    fn first(&self, offset: u64, len: usize) -> usize {
        let most = len.min(usize::from(self.max_size));
        let size = 1usize << most.ilog2();
        if self.unaligned || offset == 0 {
            return size;
        }
        size.min(1 << offset.trailing_zeros().min(3))
    }

    fn takes(&self, size: usize, write: bool) -> bool {
        let right = match self.access {
            Access::ReadWrite => true,
            Access::Read => !write,
            Access::Write => write,
        };
        right && size >= usize::from(self.min_size)
    }
}

/// Why registers do not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Against the rules, or the device's gate is closed.
    Access,
    /// The device is being served further up this thread's stack.
    Busy,
}

/// Registers with their rules and the gate of their device: what a region is made of.
#[derive(Clone)]
pub struct Registers {
    ops: Arc<dyn Mmio>,
    rules: AccessRules,
    gate: Option<Arc<Gate>>,
}

impl Registers {
    /// Registers with the default rules, behind the gate that `ops` names, if it does.
    pub fn new(ops: Arc<dyn Mmio>) -> Registers {
        let gate = ops.gate().cloned();
        Registers {
            ops,
            rules: AccessRules::default(),
            gate,
        }
    }

    /// With these rules. Rules that contradict themselves are an error when the region is used.
    #[must_use]
    pub fn rules(mut self, rules: AccessRules) -> Registers {
        self.rules = rules;
        self
    }

    /// Behind this gate: once it is closed, loads give all ones, stores are dropped, DMA gets an
    /// error.
    #[must_use]
    pub fn gate(mut self, gate: &Arc<Gate>) -> Registers {
        self.gate = Some(Arc::clone(gate));
        self
    }

    pub(super) fn fault(&self) -> Option<&'static str> {
        self.rules.fault()
    }

    /// Enters the device for one transfer.
    fn enter(&self) -> Result<Busy<'_>, Refused> {
        let Some(gate) = &self.gate else {
            let key = Key::of(&self.ops);
            if key.is_busy() {
                return Err(Refused::Busy);
            }
            return Ok(Busy::keyed(key, EntryPoint::Mmio, None));
        };
        let key = Key::of(gate);
        if key.is_busy() {
            return Err(Refused::Busy);
        }
        let lease = gate.enter(Entry::Mmio).ok_or(Refused::Access)?;
        Ok(Busy::keyed(key, EntryPoint::Mmio, Some(lease)))
    }

    /// Fills `bytes` from `offset` on. What does not answer gives all ones, and an error.
    pub(crate) fn load(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Refused> {
        bytes.fill(0xff);
        let _busy = self.enter()?;
        let mut result = Ok(());
        let mut done = 0;
        while done < bytes.len() {
            let at = offset.wrapping_add(done as u64);
            let size = self.rules.first(at, bytes.len() - done);
            let part = &mut bytes[done..done + size];
            if self.rules.takes(size, false) {
                self.load_access(at, part);
            } else {
                result = Err(Refused::Access);
            }
            done += size;
        }
        result
    }

    /// Stores `bytes` from `offset` on. What is refused is dropped, and an error.
    pub(crate) fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), Refused> {
        let _busy = self.enter()?;
        let mut result = Ok(());
        let mut done = 0;
        while done < bytes.len() {
            let at = offset.wrapping_add(done as u64);
            let size = self.rules.first(at, bytes.len() - done);
            if self.rules.takes(size, true) {
                self.store_access(at, &bytes[done..done + size]);
            } else {
                result = Err(Refused::Access);
            }
            done += size;
        }
        result
    }

    fn load_access(&self, offset: u64, bytes: &mut [u8]) {
        let (least, most) = self.implemented();
        if bytes.len() < least {
            self.each_container(offset, bytes.len(), |container, within, part| {
                let mut wide = [0; 8];
                self.load_one(container, &mut wide[..least]);
                let count = part.len();
                bytes[part].copy_from_slice(&wide[within..within + count]);
            });
            return;
        }
        for (at, part) in bytes.chunks_mut(most).enumerate() {
            self.load_one(offset.wrapping_add((at * most) as u64), part);
        }
    }

    fn store_access(&self, offset: u64, bytes: &[u8]) {
        let (least, most) = self.implemented();
        if bytes.len() < least {
            self.each_container(offset, bytes.len(), |container, within, part| {
                let mut wide = [0; 8];
                self.load_one(container, &mut wide[..least]);
                wide[within..within + part.len()].copy_from_slice(&bytes[part]);
                self.store_one(container, &wide[..least]);
            });
            return;
        }
        for (at, part) in bytes.chunks(most).enumerate() {
            self.store_one(offset.wrapping_add((at * most) as u64), part);
        }
    }

    fn implemented(&self) -> (usize, usize) {
        (
            usize::from(self.rules.impl_min),
            usize::from(self.rules.impl_max),
        )
    }

    /// Calls `f` for each aligned piece of `impl_min` bytes that `len` bytes at `offset` touch:
    /// its offset, where in it they start, and which of them they are.
    fn each_container(
        &self,
        offset: u64,
        len: usize,
        mut f: impl FnMut(u64, usize, std::ops::Range<usize>),
    ) {
        let least = usize::from(self.rules.impl_min);
        let mut done = 0;
        while done < len {
            let at = offset.wrapping_add(done as u64);
            let within = (at % least as u64) as usize;
            let count = (least - within).min(len - done);
            f(at - within as u64, within, done..done + count);
            done += count;
        }
    }

    fn load_one(&self, offset: u64, bytes: &mut [u8]) {
        let size = bytes.len();
        let value = self.ops.read(offset, size as u8);
        match self.rules.endian {
            Endian::Little => bytes.copy_from_slice(&value.to_le_bytes()[..size]),
            Endian::Big => bytes.copy_from_slice(&value.to_be_bytes()[8 - size..]),
        }
    }

    fn store_one(&self, offset: u64, bytes: &[u8]) {
        let size = bytes.len();
        let mut value = [0; 8];
        let value = match self.rules.endian {
            Endian::Little => {
                value[..size].copy_from_slice(bytes);
                u64::from_le_bytes(value)
            }
            Endian::Big => {
                value[8 - size..].copy_from_slice(bytes);
                u64::from_be_bytes(value)
            }
        };
        self.ops.write(offset, size as u8, value);
    }
}

impl From<Arc<dyn Mmio>> for Registers {
    fn from(ops: Arc<dyn Mmio>) -> Registers {
        Registers::new(ops)
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registers")
            .field("rules", &self.rules)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}
