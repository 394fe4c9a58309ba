// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Model specific registers: which are part of a processor's state, and reading and writing them in bulk.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::vm::Machine;
use crate::Error;

pub(super) const TSC: u32 = 0x10;
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: without it Linux takes the page attribute table for unusable.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const TSC_DEADLINE: u32 = 0x6e0;

/// Memory type ranges; KVM has them but not in its list.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    MTRR_DEFAULT_TYPE..=MTRR_DEFAULT_TYPE,
];

/// What power-on leaves to firmware.
pub(super) fn boot() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    [
        entry(MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
    ]
}

/// The registers of a processor's state that have no place of their own, in the order they are to be restored in.
pub(super) fn to_save(system: &kvm_ioctls::Kvm) -> Result<Vec<u32>, Error> {
    let list = system
        .get_msr_index_list()
        .map_err(|errno| Machine::refused("KVM_GET_MSR_INDEX_LIST", errno))?;
    let mut indices: Vec<u32> = list
        .as_slice()
        .iter()
        .copied()
        .filter(|&i| is_state(i))
        .collect();
    indices.extend(MTRRS.into_iter().flatten());
    indices.sort_unstable();
    indices.dedup();
    // Means something only once the local APIC's timer is in the mode that uses it, and may fire at once.
    if let Some(at) = indices.iter().position(|&index| index == TSC_DEADLINE) {
        indices.remove(at);
        indices.push(TSC_DEADLINE);
    }
    Ok(indices)
}

fn is_state(index: u32) -> bool {
    match index {
        // Saved apart.
        TSC => false,
        // What VMX offers; the guest has none.
        0x480..=0x493 => false,
        // Another vendor's hypervisor; the guest is not told of it.
        0x4000_0000..=0x4000_01ff => false,
        _ => true,
    }
}

/// Reads `indices`, leaving out what this processor has not.
pub(super) fn read(fd: &VcpuFd, indices: &[u32], vcpu: u8) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<_> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = fam(&entries, vcpu)?;
        let count = fd
            .get_msrs(&mut msrs)
            .map_err(|errno| Error::refused("KVM_GET_MSRS", format!("vcpu {vcpu}"), errno))?;
        values.extend(msrs.as_slice().iter().take(count));
        // KVM stops at the first it does not have.
        let skipped = usize::from(count < batch.len());
        rest = rest.get(count + skipped..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes `entries` in order. One that cannot be written is fine if it already has the value.
pub(super) fn write(fd: &VcpuFd, entries: &[kvm_msr_entry], vcpu: u8) -> Result<(), Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let msrs = fam(batch, vcpu)?;
        let count = fd
            .set_msrs(&msrs)
            .map_err(|errno| Error::refused("KVM_SET_MSRS", format!("vcpu {vcpu}"), errno))?;
        if let Some(refused) = batch.get(count) {
            let now = read(fd, &[refused.index], vcpu)?;
            if now.first().map(|entry| entry.data) != Some(refused.data) {
                let (index, value) = (refused.index, refused.data);
                return Err(Error::Msr { vcpu, index, value });
            }
        }
        let skipped = usize::from(count < batch.len());
        rest = rest.get(count + skipped..).unwrap_or_default();
    }
    Ok(())
}

fn fam(entries: &[kvm_msr_entry], vcpu: u8) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|error| {
        let source = std::io::Error::other(format!("{error:?}"));
        Error::refused("building a list of msrs", format!("vcpu {vcpu}"), source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_has_not_is_not_state() {
        assert!(is_state(0xc000_0081) && is_state(0x4b56_4d01) && is_state(MISC_ENABLE));
        assert!(!is_state(TSC) && !is_state(0x480) && !is_state(0x4000_0001));
    }
}
