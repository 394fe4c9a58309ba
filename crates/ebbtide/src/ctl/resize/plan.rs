// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which device is to provide how much, so that the guest has a given size in all.

use std::cmp::Ordering;

use super::super::human;

/// A virtio-mem device; bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Elastic {
    pub(crate) id: String,
    pub(crate) max: u64,
    pub(crate) block_size: u64,
}

/// What the guest has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inventory {
    /// Boot memory.
    pub(crate) boot: u64,
    /// What devices provide that cannot be resized here.
    pub(crate) fixed: u64,
    /// Devices that can be resized.
    pub(crate) elastic: Vec<Elastic>,
}

/// Why a size cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("this machine has no resizable memory: run it with --memory size=...,max=...")]
    NothingElastic,
    #[error("{} is too little: the guest keeps its {} of boot memory{}", human(*.wanted), human(*.boot), and_fixed(*.fixed))]
    TooLittle { wanted: u64, boot: u64, fixed: u64 },
    #[error("{} is too much: the guest can have at most {} ({} of boot memory and {} of memory devices)",
        human(*.wanted), human(.boot + .devices), human(*.boot), human(*.devices))]
    TooMuch {
        wanted: u64,
        boot: u64,
        devices: u64,
    },
    #[error("{wanted} bytes cannot be had exactly, memory comes in blocks of {}: the nearest are {below} ({}) and {above} ({})",
        human(*.block_size), human(*.below), human(*.above))]
    Misaligned {
        wanted: u64,
        below: u64,
        above: u64,
        block_size: u64,
    },
}

fn and_fixed(bytes: u64) -> String {
    if bytes == 0 {
        String::new()
    } else {
        format!(" and {} of other memory devices", human(bytes))
    }
}

/// The size each device is to have, in the order of their ids.
pub(crate) fn plan(inventory: &Inventory, wanted: u64) -> Result<Vec<(String, u64)>, PlanError> {
    let Inventory {
        boot,
        fixed,
        elastic,
    } = inventory;
    if elastic.is_empty() {
        return Err(PlanError::NothingElastic);
    }
    let floor = boot.saturating_add(*fixed);
    let Some(mut left) = wanted.checked_sub(floor) else {
        return Err(PlanError::TooLittle {
            wanted,
            boot: *boot,
            fixed: *fixed,
        });
    };
    let most = elastic
        .iter()
        .fold(0u64, |sum, device| sum.saturating_add(device.max));
    if left > most {
        return Err(PlanError::TooMuch {
            wanted,
            boot: *boot,
            devices: most.saturating_add(*fixed),
        });
    }
    let mut devices: Vec<&Elastic> = elastic.iter().collect();
    devices.sort_by(|a, b| natural(&a.id, &b.id));
    let mut sizes = Vec::new();
    for device in &devices {
        let size = left.min(device.max);
        // A server that says 0 has a bug; dividing by it would be ours.
        let size = size - size % device.block_size.max(1);
        left -= size;
        sizes.push((device.id.clone(), size));
    }
    if left == 0 {
        return Ok(sizes);
    }
    let block_size = devices
        .iter()
        .map(|device| device.block_size.max(1))
        .min()
        .unwrap_or(1);
    let below = wanted - left;
    let above = below
        .saturating_add(block_size)
        .min(floor.saturating_add(most));
    Err(PlanError::Misaligned {
        wanted,
        below,
        above,
        block_size,
    })
}

/// vmem2 before vmem10.
pub(crate) fn natural(a: &str, b: &str) -> Ordering {
    let key = |id: &str| {
        let stem = id.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = id
            .get(stem.len()..)
            .and_then(|digits| digits.parse::<u64>().ok());
        (stem.to_owned(), number)
    };
    key(a).cmp(&key(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    fn inventory(devices: &[(&str, u64, u64)]) -> Inventory {
        let elastic = devices.iter().map(|(id, max, block_size)| Elastic {
            id: (*id).into(),
            max: max * M,
            block_size: block_size * M,
        });
        Inventory {
            boot: 512 * M,
            fixed: 0,
            elastic: elastic.collect(),
        }
    }

    fn sizes(inventory: &Inventory, wanted: u64) -> Vec<(String, u64)> {
        plan(inventory, wanted * M)
            .unwrap()
            .into_iter()
            .map(|(id, bytes)| (id, bytes / M))
            .collect()
    }

    #[test]
    fn one_device_gets_what_boot_memory_leaves() {
        let one = inventory(&[("vmem0", 7680, 2)]);
        assert_eq!(sizes(&one, 512), [("vmem0".into(), 0)]);
        assert_eq!(sizes(&one, 4096), [("vmem0".into(), 3584)]);
        assert_eq!(sizes(&one, 8192), [("vmem0".into(), 7680)]);
    }

    #[test]
    fn several_are_filled_in_the_order_of_their_ids() {
        let many = inventory(&[("vmem10", 1024, 2), ("vmem2", 1024, 2), ("amem", 100, 2)]);
        let named = |a, b, c| {
            [
                ("amem".to_owned(), a),
                ("vmem2".to_owned(), b),
                ("vmem10".to_owned(), c),
            ]
        };
        assert_eq!(sizes(&many, 512), named(0, 0, 0));
        assert_eq!(sizes(&many, 612), named(100, 0, 0));
        assert_eq!(sizes(&many, 1700), named(100, 1024, 64));
        assert_eq!(sizes(&many, 512 + 2148), named(100, 1024, 1024));
    }

    #[test]
    fn a_coarse_device_leaves_the_rest_to_a_fine_one() {
        let mixed = inventory(&[("a", 1024, 256), ("b", 1024, 2)]);
        assert_eq!(
            sizes(&mixed, 512 + 300),
            [("a".into(), 256), ("b".into(), 44)]
        );
    }

    #[test]
    fn what_cannot_be_had_is_explained() {
        let one = inventory(&[("vmem0", 7680, 2)]);
        let text = |inventory: &Inventory, wanted| plan(inventory, wanted).unwrap_err().to_string();
        assert_eq!(
            text(&one, 256 * M),
            "256 MiB is too little: the guest keeps its 512 MiB of boot memory"
        );
        assert_eq!(
            text(&one, 9000 * M),
            "8.78 GiB is too much: the guest can have at most 8 GiB (512 MiB of boot memory and 7.5 GiB of memory devices)"
        );
        assert_eq!(
            text(&one, 513 * M + 1),
            "537919489 bytes cannot be had exactly, memory comes in blocks of 2 MiB: the nearest are 536870912 (512 MiB) and \
             538968064 (514 MiB)"
        );
        let none = inventory(&[]);
        assert!(text(&none, 1 << 30).contains("--memory size=...,max=..."));
        let fixed = Inventory {
            fixed: 512 * M,
            ..one
        };
        assert!(
            text(&fixed, 600 * M)
                .ends_with("512 MiB of boot memory and 512 MiB of other memory devices")
        );
        assert_eq!(sizes(&fixed, 1024), [("vmem0".into(), 0)]);
    }

    #[test]
    fn a_server_that_lies_does_no_harm() {
        let odd = Inventory {
            boot: u64::MAX,
            fixed: u64::MAX,
            elastic: vec![
                Elastic {
                    id: "x".into(),
                    max: u64::MAX,
                    block_size: 0
                };
                2
            ],
        };
        assert!(plan(&odd, 0).is_err());
        assert_eq!(plan(&odd, u64::MAX), Ok(vec![("x".into(), 0); 2]));
    }
}
