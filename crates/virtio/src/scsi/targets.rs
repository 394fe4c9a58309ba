// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The units of a device: who is there, who is on the way out.
//!
//! ```text
//!   add ─► open ──close──► closed: commands get "bad target" ──last command gone──► drained ──take──► gone
//! ```
//!
//! A command finds its unit under the read lock, takes a lease of the unit's gate there, and keeps what it needs of the
//! unit besides. Nothing else keeps a unit: when its gate has drained, the table's is the only one, and the disk goes
//! with it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ebbtide_block::Disk;
use ebbtide_gate::{Gate, Owned};
use ebbtide_scsi::{Condition, Geometry, LogicalUnit, Lun};

use super::request::Address;

/// One unit.
pub(super) struct Unit {
    pub disk: Arc<Disk>,
    pub logical: LogicalUnit,
}

impl Unit {
    pub(super) fn geometry(&self) -> Geometry {
        let block_bytes = self.disk.logical_block_bytes();
        Geometry {
            blocks: self.disk.size_bytes() / u64::from(block_bytes.max(1)),
            block_bytes,
            physical_block_bytes: self.disk.physical_block_bytes(),
            readonly: self.disk.readonly(),
            unmap: self.disk.features().discard,
        }
    }
}

pub(super) type Units = BTreeMap<Address, Owned<Unit>>;

/// All units of a device.
#[derive(Default)]
pub(super) struct Targets(RwLock<Units>);

impl Targets {
    /// For a look. Nothing that blocks is done under it.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Units> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Units> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a unit and calls `then` before it can go again. False: there is one, be it on the way out.
    pub(super) fn add(
        &self,
        address: Address,
        name: String,
        unit: Unit,
        then: impl FnOnce(),
    ) -> bool {
        let mut units = self.write();
        if units.contains_key(&address) {
            return false;
        }
        luns_changed(&units, address.target);
        units.insert(address, Owned::new(name, unit));
        then();
        true
    }

    /// Lets no command in any more. `None`: there is no such unit.
    pub(super) fn close(&self, address: Address) -> Option<Arc<Gate>> {
        let units = self.read();
        let owned = units.get(&address)?;
        owned.close();
        Some(Arc::clone(owned.gate()))
    }

    /// Takes the unit behind `gate` out, once that has drained, and calls `then` before another can take its place.
    /// `None`: it is not there any more, or has not drained.
    pub(super) fn take(
        &self,
        address: Address,
        gate: &Arc<Gate>,
        then: impl FnOnce(),
    ) -> Option<Unit> {
        let mut units = self.write();
        let owned = units.remove(&address)?;
        let unit = if Arc::ptr_eq(owned.gate(), gate) {
            owned.try_into_inner()
        } else {
            Err(owned)
        };
        match unit {
            Ok(unit) => {
                luns_changed(&units, address.target);
                then();
                Some(unit)
            }
            Err(owned) => {
                units.insert(address, owned);
                None
            }
        }
    }

    /// Every unit is as at power-on.
    pub(super) fn power_on(&self) {
        for owned in self.read().values() {
            owned.get().logical.reset(Condition::PowerOn);
        }
    }
}

/// The units of a target have news for their initiator.
fn luns_changed(units: &Units, target: u8) {
    for (address, owned) in units {
        if address.target == target {
            let attention = owned.get().logical.attention();
            attention.establish(Condition::LunsChanged);
        }
    }
}

/// The units of a target that can be used.
pub(super) fn luns_of(units: &Units, target: u8) -> Vec<Lun> {
    units
        .iter()
        .filter(|(address, owned)| address.target == target && !owned.gate().is_closed())
        .map(|(address, _)| address.lun)
        .collect()
}
