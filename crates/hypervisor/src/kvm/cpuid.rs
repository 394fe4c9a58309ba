// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The processor a guest sees: what KVM supports here, less what this crate does not carry through, plus the topology.
//!
//! Topology: one package, one core per processor, one thread per core, APIC ids 0 to n-1. Fields are named as in the
//! Intel SDM, volume 2, CPUID, and the AMD APM, volume 3, appendix E.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Cap;

use super::vm::Machine;
use crate::Error;

const BASIC: u32 = 0;
const FEATURES: u32 = 1;
const INTEL_CACHES: u32 = 4;
const MORE_FEATURES: u32 = 7;
const TOPOLOGY: u32 = 0xb;
const EXTENDED_STATE: u32 = 0xd;
const SGX: u32 = 0x12;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const POWER: u32 = 0x8000_0007;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const SVM: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Guest physical bits of a processor too old to say.
const DEFAULT_PHYS_BITS: u8 = 36;

/// What KVM supports on this machine.
#[derive(Clone, Debug)]
pub(super) struct Supported {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

/// Asks KVM.
pub(super) fn supported(system: &kvm_ioctls::Kvm) -> Result<Supported, Error> {
    let cpuid = system
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|errno| Machine::refused("KVM_GET_SUPPORTED_CPUID", errno))?;
    Ok(Supported {
        entries: cpuid.as_slice().to_vec(),
        // Not among the leaves: it needs the local APIC inside the kernel, which KVM cannot know here.
        tsc_deadline: system.check_extension(Cap::TscDeadlineTimer),
    })
}

impl Supported {
    /// Width of a guest physical address.
    pub(super) fn phys_bits(&self) -> u8 {
        let Some(sizes) = self.find(ADDRESS_SIZES) else {
            return DEFAULT_PHYS_BITS;
        };
        let [host, _, guest, _] = sizes.eax.to_le_bytes();
        // The second is what the nested page tables can address, where that is less.
        if guest != 0 { host.min(guest) } else { host }
    }

    /// What processor `index` of `cpus` tells about itself.
    pub(super) fn for_vcpu(&self, index: u8, cpus: u8) -> Result<CpuId, Error> {
        let entries = self.entries_for(index, cpus);
        CpuId::from_entries(&entries).map_err(|_| {
            Machine::refused("building CPUID", std::io::Error::other("too many leaves"))
        })
    }

    fn entries_for(&self, index: u8, cpus: u8) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology::new(index, cpus);
        let amd = self.is_amd();
        let tiles = self.has_tiles();
        let has_topology = self.find(TOPOLOGY).is_some();
        let xsave = self.has_xsave();
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .copied()
            .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2 | SGX | SVM))
            .collect();
        for entry in &mut entries {
            match entry.function {
                FEATURES => features(entry, topology, self.tsc_deadline),
                INTEL_CACHES => caches(entry, topology, true),
                MORE_FEATURES => more_features(entry, tiles),
                AMD_FEATURES => amd_features(entry, topology, amd),
                POWER => power(entry),
                ADDRESS_SIZES => address_sizes(entry, topology, amd, self.phys_bits()),
                AMD_CACHES => caches(entry, topology, false),
                AMD_TOPOLOGY => amd_topology(entry, topology),
                _ => {}
            }
        }
        if !xsave {
            entries.iter_mut().for_each(without_xsave);
        }
        if has_topology {
            entries.extend(topology.leaves());
        }
        entries
    }

    fn find(&self, function: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| entry.function == function)
    }

    fn is_amd(&self) -> bool {
        self.find(BASIC).is_some_and(|leaf| {
            let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
            matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
        })
    }

    fn has_xsave(&self) -> bool {
        const XSAVE: u32 = 1 << 26;
        self.find(FEATURES)
            .is_some_and(|leaf| leaf.ecx & XSAVE != 0)
    }

    /// Whether this process may give a guest the state of the tile registers (AMX). KVM lists the instructions whether
    /// or not it may.
    fn has_tiles(&self) -> bool {
        const XCR0_TILES: u32 = 0b11 << 17;
        self.find(EXTENDED_STATE)
            .is_some_and(|leaf| leaf.eax & XCR0_TILES == XCR0_TILES)
    }
}

/// Sets or clears one bit.
fn bit(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

/// Replaces bits `low..low + width`.
fn field(register: &mut u32, low: u32, width: u32, value: u32) {
    let mask = ((1 << width) - 1) << low;
    *register = *register & !mask | (value << low) & mask;
}

fn features(entry: &mut kvm_cpuid_entry2, topology: Topology, tsc_deadline: bool) {
    field(&mut entry.ebx, 24, 8, topology.apic_id);
    field(&mut entry.ebx, 16, 8, topology.cores);
    // VMX: not carried through, a system reset would have to leave nested guests.
    bit(&mut entry.ecx, 5, false);
    bit(&mut entry.ecx, 24, tsc_deadline);
    // A hypervisor is present.
    bit(&mut entry.ecx, 31, true);
    // More than one logical processor in the package.
    bit(&mut entry.edx, 28, topology.cores > 1);
}

/// Takes away what needs registers that only XSAVE can enable. A processor never offers these without it, so a guest
/// does not look further: Linux's AES driver takes AVX by its own bit and dies of an invalid opcode.
fn without_xsave(entry: &mut kvm_cpuid_entry2) {
    /// FMA, AVX, F16C.
    const FEATURES_ECX: u32 = 1 << 12 | 1 << 28 | 1 << 29;
    /// AVX2; AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL.
    const MORE_EBX: u32 =
        1 << 5 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
    /// AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; VAES, VPCLMULQDQ; PKU, which XSAVE saves.
    const MORE_ECX: u32 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;
    /// AVX-512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16.
    const MORE_EDX: u32 = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23;
    /// AVX-VNNI, AVX512-BF16, AVX-IFMA.
    const MORE_1_EAX: u32 = 1 << 4 | 1 << 5 | 1 << 23;
    /// XOP, FMA4.
    const AMD_ECX: u32 = 1 << 11 | 1 << 16;
    match (entry.function, entry.index) {
        (FEATURES, _) => entry.ecx &= !FEATURES_ECX,
        (MORE_FEATURES, 0) => {
            entry.ebx &= !MORE_EBX;
            entry.ecx &= !MORE_ECX;
            entry.edx &= !MORE_EDX;
        }
        (MORE_FEATURES, 1) => entry.eax &= !MORE_1_EAX,
        (AMD_FEATURES, _) => entry.ecx &= !AMD_ECX,
        _ => {}
    }
}

/// Deterministic cache parameters, Intel's leaf and AMD's alike: the last level is shared by all, the others by none.
fn caches(entry: &mut kvm_cpuid_entry2, topology: Topology, intel: bool) {
    const NO_MORE: u32 = 0;
    const LAST_LEVEL: u32 = 3;
    if entry.eax & 0x1f == NO_MORE {
        return;
    }
    let shared = entry.eax >> 5 & 7 >= LAST_LEVEL;
    field(
        &mut entry.eax,
        14,
        12,
        if shared { topology.ids() - 1 } else { 0 },
    );
    if intel {
        field(&mut entry.eax, 26, 6, (topology.ids() - 1).min(0x3f));
    }
}

fn more_features(entry: &mut kvm_cpuid_entry2, tiles: bool) {
    if entry.index == 0 {
        // SGX and its launch control: the guest gets no enclave memory.
        bit(&mut entry.ebx, 2, false);
        bit(&mut entry.ecx, 30, false);
    }
    if !tiles {
        // AMX-BF16, AMX-TILE, AMX-INT8; AMX-FP16 and AMX-COMPLEX in the sub-leaf.
        match entry.index {
            0 => [22, 24, 25]
                .into_iter()
                .for_each(|n| bit(&mut entry.edx, n, false)),
            1 => {
                bit(&mut entry.eax, 21, false);
                bit(&mut entry.edx, 8, false);
            }
            _ => {}
        }
    }
}

fn amd_features(entry: &mut kvm_cpuid_entry2, topology: Topology, amd: bool) {
    // SVM: as VMX.
    bit(&mut entry.ecx, 2, false);
    // CmpLegacy: the logical processors are cores, not threads.
    bit(&mut entry.ecx, 1, amd && topology.cores > 1);
}

fn power(entry: &mut kvm_cpuid_entry2) {
    // Invariant TSC: a guest that believes in it takes the TSC for its clock, and that runs on while the machine is
    // stopped. The paravirtual clock does not.
    bit(&mut entry.edx, 8, false);
}

fn address_sizes(entry: &mut kvm_cpuid_entry2, topology: Topology, amd: bool, phys_bits: u8) {
    field(&mut entry.eax, 0, 8, phys_bits.into());
    if amd {
        // NC and ApicIdSize.
        field(&mut entry.ecx, 0, 8, topology.cores - 1);
        field(&mut entry.ecx, 12, 4, topology.id_bits);
    }
}

fn amd_topology(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    entry.eax = topology.apic_id;
    // One thread per core, and the core is the processor; one node.
    entry.ebx = topology.apic_id;
    entry.ecx = 0;
    entry.edx = 0;
}

/// Where a processor stands among the others.
#[derive(Clone, Copy, Debug)]
struct Topology {
    apic_id: u32,
    cores: u32,
    /// Bits of an APIC id that tell the cores apart.
    id_bits: u32,
}

impl Topology {
    fn new(index: u8, cpus: u8) -> Self {
        let cores = u32::from(cpus.max(1));
        Self {
            apic_id: index.into(),
            cores,
            id_bits: cores.next_power_of_two().trailing_zeros(),
        }
    }

    /// APIC ids set aside for the package.
    fn ids(self) -> u32 {
        1 << self.id_bits
    }

    /// Leaf 0xB: thread level, core level, end.
    fn leaves(self) -> [kvm_cpuid_entry2; 3] {
        const THREAD: u32 = 1;
        const CORE: u32 = 2;
        let level = |index, shift, processors, kind: u32| kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: index | kind << 8,
            edx: self.apic_id,
            ..Default::default()
        };
        [
            level(0, 0, 1, THREAD),
            level(1, self.id_bits, self.cores, CORE),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn vendor(name: &[u8; 12]) -> kvm_cpuid_entry2 {
        let register = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(BASIC, 0, [0x1f, register(0), register(8), register(4)])
    }

    fn host(name: &[u8; 12]) -> Supported {
        let entries = vec![
            vendor(name),
            leaf(FEATURES, 0, [0x800f12, 0x0702_0800, 1 << 5, 0]),
            leaf(
                INTEL_CACHES,
                0,
                [1 | 1 << 5 | 0xfff << 14 | 0x3f << 26, 0, 0, 0],
            ),
            leaf(INTEL_CACHES, 3, [3 | 3 << 5, 0, 0, 0]),
            leaf(INTEL_CACHES, 4, [0, 0, 0, 0]),
            leaf(MORE_FEATURES, 0, [1, 1 << 2, 1 << 30, 0x0340_0010]),
            leaf(TOPOLOGY, 0, [1, 2, 1 << 8, 7]),
            leaf(EXTENDED_STATE, 0, [7, 0, 0, 0]),
            leaf(TOPOLOGY_V2, 0, [1, 2, 1 << 8, 7]),
            leaf(AMD_FEATURES, 0, [0, 0, 1 << 2, 0]),
            leaf(POWER, 0, [0, 0, 0, 1 << 8]),
            leaf(ADDRESS_SIZES, 0, [0x002e_3034, 0, 0x7fff, 0]),
            leaf(SVM, 0, [1, 8, 0, 0xff]),
            leaf(AMD_TOPOLOGY, 0, [7, 0x0103, 0x0300, 0]),
        ];
        Supported {
            entries,
            tsc_deadline: true,
        }
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found: Vec<_> = entries
            .iter()
            .filter(|e| e.function == function && e.index == index)
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
    }

    #[test]
    fn processor_ids_and_counts() {
        let entries = host(b"AuthenticAMD").entries_for(2, 3);
        let [_, ebx, ecx, edx] = get(&entries, FEATURES, 0);
        assert_eq!(ebx, 0x0203_0800);
        assert_eq!(ecx, 1 << 31 | 1 << 24);
        assert_eq!(edx, 1 << 28);
        assert_eq!(get(&entries, TOPOLOGY, 0), [0, 1, 0x100, 2]);
        assert_eq!(get(&entries, TOPOLOGY, 1), [2, 3, 0x201, 2]);
        assert_eq!(get(&entries, TOPOLOGY, 2), [0, 0, 2, 2]);
        assert!(!entries.iter().any(|entry| entry.function == TOPOLOGY_V2));
    }

    #[test]
    fn one_processor_is_alone() {
        let entries = host(b"AuthenticAMD").entries_for(0, 1);
        let [_, ebx, _, edx] = get(&entries, FEATURES, 0);
        assert_eq!((ebx >> 16, edx & 1 << 28), (0x0001, 0));
        assert_eq!(get(&entries, TOPOLOGY, 1), [0, 1, 0x201, 0]);
        assert_eq!(get(&entries, AMD_FEATURES, 0)[2] & 2, 0);
    }

    #[test]
    fn amd_leaves() {
        let entries = host(b"AuthenticAMD").entries_for(1, 4);
        assert_eq!(get(&entries, AMD_FEATURES, 0)[2], 1 << 1);
        assert_eq!(get(&entries, ADDRESS_SIZES, 0)[2], 0x2f03);
        assert_eq!(get(&entries, AMD_TOPOLOGY, 0), [1, 1, 0, 0]);
        assert!(!entries.iter().any(|entry| entry.function == SVM));
    }

    #[test]
    fn intel_leaves() {
        let entries = host(b"GenuineIntel").entries_for(1, 4);
        assert_eq!(get(&entries, AMD_FEATURES, 0)[2], 0);
        assert_eq!(get(&entries, ADDRESS_SIZES, 0)[2], 0x7fff);
        assert_eq!(get(&entries, INTEL_CACHES, 0)[0], 1 | 1 << 5 | 3 << 26);
        assert_eq!(
            get(&entries, INTEL_CACHES, 3)[0],
            3 | 3 << 5 | 3 << 14 | 3 << 26
        );
        assert_eq!(get(&entries, INTEL_CACHES, 4)[0], 0);
    }

    #[test]
    fn nothing_is_offered_that_is_not_carried_through() {
        let entries = host(b"GenuineIntel").entries_for(0, 2);
        assert_eq!(get(&entries, MORE_FEATURES, 0), [1, 0, 0, 0x10]);
        assert_eq!(get(&entries, POWER, 0)[3], 0);
        let mut with_tiles = host(b"GenuineIntel");
        with_tiles
            .entries
            .iter_mut()
            .find(|e| e.function == EXTENDED_STATE)
            .unwrap()
            .eax = 7 | 3 << 17;
        let entries = with_tiles.entries_for(0, 2);
        assert_eq!(get(&entries, MORE_FEATURES, 0)[3], 0x0340_0010);
    }

    #[test]
    fn physical_bits_are_what_nested_paging_reaches() {
        let mut host = host(b"GenuineIntel");
        assert_eq!(host.phys_bits(), 0x2e);
        host.entries.retain(|entry| entry.function != ADDRESS_SIZES);
        assert_eq!(host.phys_bits(), 36);
    }

    #[test]
    fn without_xsave_there_is_no_avx() {
        let avx = |host: &Supported| {
            let entries = host.entries_for(0, 1);
            let [_, _, ecx, _] = get(&entries, FEATURES, 0);
            let [_, ebx, _, _] = get(&entries, MORE_FEATURES, 0);
            (ecx >> 28 & 1, ebx >> 5 & 1)
        };
        let mut host = host(b"AuthenticAMD");
        for entry in &mut host.entries {
            match (entry.function, entry.index) {
                (FEATURES, _) => entry.ecx |= 1 << 28 | 1 << 26,
                (MORE_FEATURES, 0) => entry.ebx |= 1 << 5,
                _ => {}
            }
        }
        assert_eq!(avx(&host), (1, 1));
        for entry in &mut host.entries {
            if entry.function == FEATURES {
                entry.ecx &= !(1 << 26);
            }
        }
        assert_eq!(avx(&host), (0, 0));
    }
}
