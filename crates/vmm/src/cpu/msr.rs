// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Model-specific registers: those set at boot, and those that guests may not touch.

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::VmmError;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// What firmware would have set: fast string instructions, and all memory write-back (SDM volume 3, §12.11).
pub const AT_BOOT: [kvm_msr_entry; 2] = [
    kvm_msr_entry {
        index: MSR_MISC_ENABLE,
        reserved: 0,
        data: 1,
    },
    kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        reserved: 0,
        data: 0x806,
    },
];

/// First register and number of each range that a guest may neither read nor write: it gets #GP, as on a CPU without the
/// feature that CPUID does not show.
const DENIED: &[(u32, u32)] = &[
    (0x0c1, 8),        // performance counters
    (0x186, 8),        // their event selectors
    (0x309, 4),        // fixed counters
    (0x38d, 4),        // counter control
    (0x480, 18),       // VMX capabilities
    (0x560, 0x22),     // Processor Trace
    (0xc001_0000, 8),  // AMD performance counters
    (0xc001_0114, 4),  // SVM: VM_CR to VM_HSAVE_PA
    (0xc001_0200, 12), // AMD extended performance counters
    (0xc001_1030, 12), // AMD instruction-based sampling
];

/// The longest bitmap that [`DENIED`] needs, in bytes.
const BITMAP_BYTES: usize = 5;

/// Installs the filter.
///
/// # Errors
/// [`VmmError::Kvm`] if KVM refuses; call it only where the capability is there.
pub fn filter(vm: &VmFd) -> Result<(), VmmError> {
    let nothing_allowed = [0u8; BITMAP_BYTES];
    let ranges: Vec<MsrFilterRange<'_>> = DENIED
        .iter()
        .map(|&(base, msr_count)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap: nothing_allowed
                .get(..usize::try_from(msr_count.div_ceil(8)).unwrap_or(0))
                .unwrap_or_default(),
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(VmmError::kvm("install the MSR filter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_is_long_enough_and_ranges_do_not_overlap() {
        let mut end = 0;
        for &(base, count) in DENIED {
            assert!(usize::try_from(count.div_ceil(8)).unwrap() <= BITMAP_BYTES);
            assert!(base >= end, "{base:#x} overlaps or is out of order");
            end = base + count;
        }
        assert!(DENIED.len() <= kvm_bindings::KVM_MSR_FILTER_MAX_RANGES as usize);
    }

    #[test]
    fn registers_that_boot_needs_are_not_denied() {
        for msr in
            AT_BOOT
                .map(|entry| entry.index)
                .into_iter()
                .chain([0x10, 0x1b, 0x6e0, 0xc000_0080])
        {
            let denied = DENIED
                .iter()
                .any(|&(base, count)| (base..base + count).contains(&msr));
            assert!(!denied, "{msr:#x}");
        }
    }
}
