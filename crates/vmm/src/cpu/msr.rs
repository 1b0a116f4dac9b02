// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Model-specific registers that are set at boot.
//!
//! Which ones a guest may touch, KVM decides by the guest's CPUID, and for the performance counters by a capability of
//! the VM. A filter on top (KVM_X86_SET_MSR_FILTER) costs an SRCU grace period, more than all the rest of a start; see
//! `docs/decisions/0002-embedded-vmm.md`.

use kvm_bindings::kvm_msr_entry;

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
