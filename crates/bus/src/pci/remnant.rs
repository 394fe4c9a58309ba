// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a function leaves in the memory map that was taken from its driver by surprise: the register that the driver waits
//! for on its way out, where nothing would read as all ones for ever.
//!
//! A remnant lies where the function's BAR was, below all BARs and windows in the map's order: whatever a guest puts there
//! hides it. It belongs to the place the function was in. When that is behind a bridge that goes, too, it passes on to the
//! bridge's place, for the guest takes down what was behind it after both are gone. The next function that leaves the place
//! takes it away if the guest has had it decoded, for then it was through with the first one; so does a reset.
//!
//! ```text
//!             detach ──▶ there ──▶ gone: another in use leaves the place, or a reset
//!                        │    ▲
//!                        └────┘ the bridge above is detached
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use ebbtide_memory::{Error, Memory, Region};

use super::Devfn;
use super::bar::{BAR_PRIORITY, BarSpace};

/// Below whatever has an address there by now.
const PRIORITY: i32 = BAR_PRIORITY - 1;

/// What answers in place of a function that is gone.
pub struct Remnant {
    /// The BAR it was in.
    pub bar: u8,
    /// Where in the BAR it was.
    pub offset: u64,
    /// What is there now. It keeps nothing of the function alive.
    pub region: Arc<Region>,
}

/// Remnants in the map, by the place of the function they were part of.
#[derive(Default)]
pub(super) struct Remnants(BTreeMap<Devfn, Vec<Mapped>>);

/// A remnant in the map, until this is dropped.
struct Mapped {
    memory: Arc<Memory>,
    region: Arc<Region>,
}

impl Mapped {
    fn new(space: &BarSpace, address: u64, region: Arc<Region>) -> Result<Self, Error> {
        space
            .memory
            .update(|change| change.add(&space.root, &region, address, PRIORITY))?;
        Ok(Self {
            memory: Arc::clone(&space.memory),
            region,
        })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(error) = self.memory.update(|change| change.remove(&self.region)) {
            tracing::error!("{} stays in the memory map: {error}", self.region.name());
        }
    }
}

impl Remnants {
    /// The function at `devfn` is gone. What it leaves takes the place of what the one before it left: `own`, at the address
    /// of its BAR, and what was left `behind` it, a bridge.
    pub(super) fn replace(
        &mut self,
        space: &BarSpace,
        devfn: Devfn,
        own: Option<(Remnant, u64)>,
        behind: Remnants,
    ) {
        // First, for it may be at the same address.
        self.0.remove(&devfn);
        let mut left: Vec<Mapped> = behind.0.into_values().flatten().collect();
        if let Some((remnant, bar)) = own {
            let name = remnant.region.name().to_owned();
            // The address of a BAR in a window of the host bridge: no offset in the BAR overflows.
            match Mapped::new(space, bar.wrapping_add(remnant.offset), remnant.region) {
                Ok(mapped) => left.push(mapped),
                Err(error) => {
                    tracing::warn!("{name} can't be mapped, its driver may wait for ever: {error}");
                }
            }
        }
        if !left.is_empty() {
            self.0.insert(devfn, left);
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes all of them away.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
