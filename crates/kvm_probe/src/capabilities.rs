// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the embedded VMM needs of a KVM.

use kvm_ioctls::{Cap, Kvm};

use crate::ProbeError;

/// The only version of the KVM API there has ever been (Linux `Documentation/virt/kvm/api.rst` §4.1).
const API_VERSION: i32 = 12;

/// Each capability that the VMM cannot do without, and what for.
const REQUIRED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (
        Cap::SetTssAddr,
        "KVM_CAP_SET_TSS_ADDR",
        "real mode on Intel",
    ),
    (
        Cap::ExtCpuid,
        "KVM_CAP_EXT_CPUID",
        "the guest's CPU features",
    ),
    (
        Cap::Irqchip,
        "KVM_CAP_IRQCHIP",
        "interrupt controllers in the kernel",
    ),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "device interrupts"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "device notifications"),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "stopping a vCPU",
    ),
    (
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER",
        "timers without calibration",
    ),
    (
        Cap::GetTscKhz,
        "KVM_CAP_GET_TSC_KHZ",
        "telling the guest its clock rate",
    ),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "saving the clock"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "saving vCPUs"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "saving vCPUs"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "saving vCPUs"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "saving vCPUs"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "saving vCPUs"),
];

/// Fails unless the API version and every required capability are there.
pub(crate) fn check(kvm: &Kvm) -> Result<(), ProbeError> {
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(ProbeError::ApiVersion { found });
    }
    match REQUIRED.iter().find(|(cap, ..)| !kvm.check_extension(*cap)) {
        None => Ok(()),
        Some((_, name, purpose)) => Err(ProbeError::Capability { name, purpose }),
    }
}
