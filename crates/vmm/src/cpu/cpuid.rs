// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! CPUID of a guest: what KVM supports, minus what no pod needs, plus topology and clock rates.
//!
//! Pure: entries in, entries out. Leaf and bit numbers are those of Intel's SDM volume 2 (CPUID) and AMD's APM volume 3
//! appendix E; the 0x4000_00xx leaves are in Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Which of a leaf's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// A feature that guests do not get.
struct Denied {
    leaf: u32,
    register: Register,
    bit: u32,
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "the reason is for readers and tests")
    )]
    why: &'static str,
}

const fn deny(leaf: u32, register: Register, bit: u32, why: &'static str) -> Denied {
    Denied {
        leaf,
        register,
        bit,
        why,
    }
}

const NESTED: &str = "nested virtualization is KVM's largest attack surface, and no pod needs it";
const COUNTERS: &str = "performance counters tell of neighbours, and their MSRs are attack surface";
const TSX: &str = "transactional memory has been a side channel in every generation";
const ENCLAVE: &str = "there are no enclaves in a VM that has no enclave memory";

/// The deny list.
const DENIED: &[Denied] = &[
    deny(0x1, Register::Ecx, 5, NESTED),            // VMX
    deny(0x8000_0001, Register::Ecx, 2, NESTED),    // SVM
    deny(0x1, Register::Ecx, 15, COUNTERS),         // PDCM
    deny(0x8000_0001, Register::Ecx, 23, COUNTERS), // PERFCTR_CORE
    deny(0x8000_0001, Register::Ecx, 24, COUNTERS), // PERFCTR_NB
    deny(0x8000_0001, Register::Ecx, 28, COUNTERS), // PERFCTR_LLC
    deny(0x8000_0001, Register::Ecx, 10, COUNTERS), // IBS
    deny(0x7, Register::Ebx, 25, COUNTERS),         // Processor Trace
    deny(0x7, Register::Edx, 19, COUNTERS),         // architectural LBR
    deny(0x7, Register::Ebx, 4, TSX),               // HLE
    deny(0x7, Register::Ebx, 11, TSX),              // RTM
    deny(0x7, Register::Ebx, 2, ENCLAVE),           // SGX
    deny(0x7, Register::Ecx, 30, ENCLAVE),          // SGX launch control
];

/// Leaves that are emptied with the features they describe: PMU, SGX, PT, AMD's SVM, IBS and PMU leaves.
const EMPTIED: &[u32] = &[0xa, 0x12, 0x14, 0x1c, 0x8000_000a, 0x8000_001b, 0x8000_0022];

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_TSC: u32 = 0x15;
const LEAF_FREQUENCY: u32 = 0x16;
const LEAF_KVM: u32 = 0x4000_0000;
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Rate of the local APIC's clock in KVM, kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Denominator of the TSC leaf; with a crystal of as many kHz the numerator is the TSC's rate in kHz.
const TSC_DENOMINATOR: u32 = 100;

/// What differs between the vCPUs of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuIdentity {
    /// Number of the vCPU, which is its APIC id.
    pub id: u8,
    /// How many there are: one thread per core, one package.
    pub count: u8,
    /// Rate of the TSC.
    pub tsc_khz: u32,
}

/// The entries that every vCPU shares: `supported` without what is denied.
#[must_use]
pub fn policy(mut supported: Vec<kvm_cpuid_entry2>) -> Vec<kvm_cpuid_entry2> {
    for entry in &mut supported {
        let leaf = entry.function;
        for denied in DENIED.iter().filter(|denied| denied.leaf == leaf) {
            // Leaf 7 has features in its first subleaf only.
            if entry.index == 0 {
                let register = match denied.register {
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                *register &= !(1 << denied.bit);
            }
        }
        if EMPTIED.contains(&leaf) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }
    supported.retain(|entry| {
        !matches!(
            entry.function,
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_TSC | LEAF_FREQUENCY | LEAF_TIMING
        )
    });
    supported
}

/// The entries of one vCPU, from those of [`policy`].
#[must_use]
pub fn for_vcpu(policy: &[kvm_cpuid_entry2], vcpu: VcpuIdentity) -> Vec<kvm_cpuid_entry2> {
    let mut entries = policy.to_vec();
    let count = u32::from(vcpu.count);
    let id = u32::from(vcpu.id);
    let last = count.saturating_sub(1);
    let id_bits = u32::BITS.saturating_sub(last.leading_zeros());
    let mut intel = false;
    for entry in &mut entries {
        match entry.function {
            0 => {
                intel = entry.ebx == u32::from_le_bytes(*b"Genu");
                let least = if intel { LEAF_FREQUENCY } else { LEAF_TOPOLOGY };
                entry.eax = entry.eax.max(least);
            }
            LEAF_FEATURES => {
                entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count << 16;
                entry.ecx |= 1 << 31 | 1 << 24; // hypervisor, TSC deadline timer
                entry.edx = entry.edx & !(1 << 28) | u32::from(count > 1) << 28; // HTT: EBX has a count
            }
            LEAF_CACHES => entry.eax = cache(entry.eax, last),
            LEAF_AMD_CACHES => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { last } else { 0 };
                entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
            }
            LEAF_AMD_SIZES => {
                entry.ecx = entry.ecx & 0xffff_0000 | id_bits << 12 | last & 0xff;
            }
            LEAF_AMD_TOPOLOGY => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id & 0xff, 0, 0)
            }
            LEAF_KVM => entry.eax = LEAF_TIMING,
            _ => {}
        }
    }
    // One thread per core; all cores in the package (SDM volume 3, §9.9.1).
    entries.push(topology(0, 0, 1, 1, id));
    entries.push(topology(1, id_bits, count, 2, id));
    if intel {
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_TSC,
            eax: TSC_DENOMINATOR,
            ebx: vcpu.tsc_khz,
            ecx: TSC_DENOMINATOR.saturating_mul(1000),
            ..Default::default()
        });
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_FREQUENCY,
            eax: vcpu.tsc_khz / 1000,
            ebx: vcpu.tsc_khz / 1000,
            ..Default::default()
        });
    }
    entries.push(kvm_cpuid_entry2 {
        function: LEAF_TIMING,
        eax: vcpu.tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    entries
}

/// Leaf 4's EAX: caches up to level 2 belong to one CPU, others to all; as many cores as CPUs.
fn cache(eax: u32, last: u32) -> u32 {
    if eax & 0x1f == 0 {
        return eax; // no more caches
    }
    let level = eax >> 5 & 7;
    let sharing = if level >= 3 { last & 0xfff } else { 0 };
    eax & 0x3fff | sharing << 14 | (last & 0x3f) << 26
}

fn topology(index: u32, shift: u32, count: u32, kind: u32, id: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    fn vcpu(id: u8, count: u8) -> VcpuIdentity {
        VcpuIdentity {
            id,
            count,
            tsc_khz: 2_900_000,
        }
    }

    fn vendor(name: &[u8; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            eax: 0xd,
            ebx: u32::from_le_bytes(*name),
            ..Default::default()
        }
    }

    #[test]
    fn denied_features_are_gone_and_others_stay() {
        let supported = [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0), (0xa, 0)];
        let entries = policy(
            supported
                .map(|(leaf, index)| all_ones(leaf, index))
                .to_vec(),
        );
        for denied in DENIED {
            let entry = find(&entries, denied.leaf, 0);
            let value = match denied.register {
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            };
            assert_eq!(
                value & 1 << denied.bit,
                0,
                "leaf {:#x}: {}",
                denied.leaf,
                denied.why
            );
        }
        assert_eq!(find(&entries, 1, 0).ecx.count_ones(), 30);
        assert_eq!(find(&entries, 7, 1).ebx, u32::MAX);
        assert_eq!(find(&entries, 0xa, 0).eax, 0);
    }

    #[test]
    fn each_vcpu_has_its_own_id_in_every_leaf() {
        let shared = policy(vec![
            vendor(b"Auth"),
            all_ones(1, 0),
            all_ones(0x8000_0008, 0),
            all_ones(0x8000_001e, 0),
        ]);
        let entries = for_vcpu(&shared, vcpu(5, 6));
        assert_eq!(find(&entries, 1, 0).ebx >> 16, 0x0506);
        assert_eq!(find(&entries, 0xb, 0).edx, 5);
        let cores = find(&entries, 0xb, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (3, 6, 0x201, 5)
        );
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx & 0xffff, 3 << 12 | 5);
        assert_eq!(find(&entries, 0x8000_001e, 0).eax, 5);
    }

    #[test]
    fn single_vcpu_needs_no_id_bits_and_no_hyperthreading() {
        let entries = for_vcpu(&policy(vec![all_ones(1, 0)]), vcpu(0, 1));
        assert_eq!(find(&entries, 0xb, 1).eax, 0);
        assert_eq!(find(&entries, 1, 0).edx & 1 << 28, 0);
    }

    #[test]
    fn clock_rates_are_told_so_that_the_guest_calibrates_nothing() {
        let kvm = all_ones(0x4000_0000, 0);
        let intel = for_vcpu(&policy(vec![vendor(b"Genu"), kvm]), vcpu(0, 1));
        let tsc = find(&intel, 0x15, 0);
        let khz = u64::from(tsc.ecx / 1000) * u64::from(tsc.ebx) / u64::from(tsc.eax);
        assert_eq!(khz, 2_900_000);
        assert!(
            tsc.ecx / 1000 * tsc.ebx > 0,
            "as Linux computes it, in 32 bits"
        );
        assert_eq!(find(&intel, 0x16, 0).eax, 2900);
        assert_eq!(find(&intel, 0, 0).eax, 0x16);
        assert_eq!(find(&intel, 0x4000_0010, 0).eax, 2_900_000);
        assert_eq!(find(&intel, 0x4000_0000, 0).eax, 0x4000_0010);
        let amd = for_vcpu(&policy(vec![vendor(b"Auth"), kvm]), vcpu(0, 1));
        assert!(!amd.iter().any(|entry| entry.function == 0x15));
    }
}
