// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tells the host which NUMA nodes memory comes from.

use std::fs;
use std::io;

use super::NumaPolicy;
use crate::Error;

const MPOL_PREFERRED: libc::c_int = 1;
const MPOL_BIND: libc::c_int = 2;
const MPOL_INTERLEAVE: libc::c_int = 3;

/// The nodes of this host that have memory, as the kernel writes them ("0-1,3").
fn nodes_with_memory() -> String {
    let read = |name: &str| fs::read_to_string(format!("/sys/devices/system/node/{name}"));
    let text = read("has_memory").or_else(|_| read("online"));
    text.map_or_else(|_| "0".to_owned(), |text| text.trim().to_owned())
}

/// Whether `node` is in a list as the kernel writes them.
fn contains(list: &str, node: u32) -> bool {
    list.split(',').any(|part| {
        let mut ends = part.splitn(2, '-').map(|end| end.trim().parse::<u32>());
        match (ends.next(), ends.next()) {
            (Some(Ok(only)), None) => only == node,
            (Some(Ok(first)), Some(Ok(last))) => (first..=last).contains(&node),
            _ => false,
        }
    })
}

impl NumaPolicy {
    fn nodes(&self) -> &[u32] {
        match self {
            NumaPolicy::Bind(nodes) | NumaPolicy::Interleave(nodes) => nodes,
            NumaPolicy::Preferred(node) => std::slice::from_ref(node),
        }
    }

    /// Whether this host has the nodes.
    pub(super) fn check(&self, name: &str) -> Result<(), Error> {
        let host = nodes_with_memory();
        if self.nodes().is_empty() {
            let reason = format!("no NUMA node is named; the host has memory on {host}");
            return Err(Error::BadSpec {
                name: name.to_owned(),
                reason,
            });
        }
        match self.nodes().iter().find(|node| !contains(&host, **node)) {
            None => Ok(()),
            Some(node) => Err(Error::NoNode {
                name: name.to_owned(),
                node: *node,
                nodes: host,
            }),
        }
    }

    /// Gives the policy to `bytes` at `address`, a mapping of ours.
    pub(super) fn apply(&self, address: *mut libc::c_void, bytes: usize) -> io::Result<()> {
        let mode = match self {
            NumaPolicy::Bind(_) => MPOL_BIND,
            NumaPolicy::Preferred(_) => MPOL_PREFERRED,
            NumaPolicy::Interleave(_) => MPOL_INTERLEAVE,
        };
        let words = self.nodes().iter().max().map_or(1, |node| node / 64 + 1) as usize;
        let mut mask = vec![0u64; words];
        for node in self.nodes() {
            mask[(node / 64) as usize] |= 1 << (node % 64);
        }
        // The kernel takes one bit less than it is told.
        let bits = words * 64 + 1;
        // SAFETY: the mask has that many bits; the call changes where pages will come from, not
        // what is in the mapping.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                address,
                bytes,
                mode,
                mask.as_ptr(),
                bits,
                0,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_read_as_the_kernel_writes_them() {
        for (list, inside, outside) in [
            ("0", vec![0], vec![1, 10]),
            ("0-2,7", vec![0, 1, 2, 7], vec![3, 6, 8]),
            ("", vec![], vec![0]),
        ] {
            assert!(inside.iter().all(|node| contains(list, *node)), "{list}");
            assert!(!outside.iter().any(|node| contains(list, *node)), "{list}");
        }
    }
}
