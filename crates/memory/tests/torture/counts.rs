// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What was done, and what must not have happened.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use ebbtide_memory::AccessError;

macro_rules! counts {
    ($(#[$doc:meta])* $name:ident { $($(#[$what:meta])* $count:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Default)]
        pub struct $name {
            $($(#[$what])* pub $count: AtomicU64,)*
        }

        impl $name {
            /// By name, in the order above.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($count), self.$count.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counts! {
    /// Operations: each kind has happened in a run that says anything.
    Done {
        pins_home, pins_remote, pins_cloned, pins_refused,
        look_ups, cached, loads,
        plugs, unplugs, resizes, renewals, publications, mappings,
        seals_undone, discards, populates, refills,
        writes, pages_harvested, blocks_logged,
    }
}

counts! {
    /// What may not be: all zero.
    Wrong {
        /// Pages that were written and not told, or do not arrive.
        lost_bits,
        /// Pages that were told and not written.
        phantom_bits,
        /// Accesses that the host did not serve.
        faults,
        /// Pages of a block that was given back, or of another block.
        stale_pages,
        /// What was written under a pin and was not there at its end.
        lost_writes,
    }
}

pub fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Wrong {
    /// Counts a fault of the host; other errors are answers.
    pub fn note<T>(&self, result: Result<T, AccessError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(AccessError::HostFault { .. }) => {
                add(&self.faults);
                None
            }
            Err(_) => None,
        }
    }
}

/// As a JSON object.
pub fn json<T: std::fmt::Display>(counts: &[(&str, T)]) -> String {
    let mut text = String::from("{");
    for (at, (name, count)) in counts.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let _ = write!(text, "{comma}\"{name}\":{count}");
    }
    text + "}"
}
