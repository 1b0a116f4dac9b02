// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Saved state of vCPUs and of KVM's part of a VM.
//!
//! The order of both directions matters and its mistakes are silent: a timer that never fires. Save takes `mp_state`
//! first, because KVM completes pending INITs there, and the events last. Restore sets the local APIC before the MSRs,
//! because the TSC deadline is only taken by an APIC in deadline mode, and the deadline after the TSC.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::VmmError;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Everything KVM knows of one vCPU.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run; `msrs` names the registers, as KVM lists them.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, VmmError> {
        let failed = VmmError::kvm;
        Ok(Self {
            mp_state: fd.get_mp_state().map_err(failed("save the run state"))?,
            regs: fd.get_regs().map_err(failed("save the registers"))?,
            sregs: fd
                .get_sregs()
                .map_err(failed("save the control registers"))?,
            xsave: Box::new(fd.get_xsave().map_err(failed("save the FPU"))?),
            xcrs: fd.get_xcrs().map_err(failed("save XCR0"))?,
            debug: fd
                .get_debug_regs()
                .map_err(failed("save the debug registers"))?,
            lapic: Box::new(fd.get_lapic().map_err(failed("save the local APIC"))?),
            msrs: save_msrs(fd, msrs)?,
            events: fd
                .get_vcpu_events()
                .map_err(failed("save pending events"))?,
        })
    }

    /// Sets the state of a new vCPU that has its CPUID.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), VmmError> {
        let failed = VmmError::kvm;
        fd.set_mp_state(self.mp_state)
            .map_err(failed("restore the run state"))?;
        fd.set_regs(&self.regs)
            .map_err(failed("restore the registers"))?;
        fd.set_sregs(&self.sregs)
            .map_err(failed("restore the control registers"))?;
        #[expect(
            unsafe_code,
            reason = "KVM_SET_XSAVE reads as much as the vCPU's XSAVE needs"
        )]
        // SAFETY: no feature beyond the 4 KiB of `kvm_xsave` is enabled: that takes an arch_prctl nobody calls.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed("restore the FPU"))?;
        fd.set_xcrs(&self.xcrs).map_err(failed("restore XCR0"))?;
        fd.set_debug_regs(&self.debug)
            .map_err(failed("restore the debug registers"))?;
        fd.set_lapic(&self.lapic)
            .map_err(failed("restore the local APIC"))?;
        set_msrs(fd, &with_live_deadline(&self.msrs))?;
        fd.set_vcpu_events(&self.events)
            .map_err(failed("restore pending events"))
    }
}

/// Reads the registers one by one: KVM lists some that a given host does not have.
fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VmmError> {
    let mut saved = Vec::with_capacity(indices.len());
    for &index in indices {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut one = Msrs::from_entries(&[entry]).map_err(|_| VmmError::State {
            reason: "too many model-specific registers",
        })?;
        if fd.get_msrs(&mut one).is_ok_and(|count| count == 1) {
            saved.extend_from_slice(one.as_slice());
        }
    }
    Ok(saved)
}

/// The deadline after the TSC; one of zero (fired, or never set) becomes the TSC itself, which fires at once: an
/// interrupt too many is harmless, one too few is a hung vCPU.
fn with_live_deadline(saved: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let tsc = saved.iter().find(|entry| entry.index == MSR_TSC);
    let (deadline, mut entries): (Vec<kvm_msr_entry>, Vec<kvm_msr_entry>) = saved
        .iter()
        .partition(|entry| entry.index == MSR_TSC_DEADLINE);
    entries.extend(deadline.into_iter().map(|entry| kvm_msr_entry {
        data: match (entry.data, tsc) {
            (0, Some(tsc)) => tsc.data,
            (data, _) => data,
        },
        ..entry
    }));
    entries
}

/// Sets registers; KVM answers how many it took.
///
/// # Errors
/// KVM refuses one of them.
pub(crate) fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VmmError> {
    for entry in entries {
        let one = Msrs::from_entries(&[*entry]).map_err(|_| VmmError::State {
            reason: "too many model-specific registers",
        })?;
        let taken = fd
            .set_msrs(&one)
            .map_err(VmmError::kvm("set a model-specific register"))?;
        // What a guest never wrote and a host does not let us write keeps its reset value, zero.
        if taken != 1 && entry.data != 0 {
            return Err(VmmError::State {
                reason: "the host's CPU lacks a model-specific register that the guest used",
            });
        }
    }
    Ok(())
}

/// What KVM keeps for the VM as a whole.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct KvmState {
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl KvmState {
    /// Reads interrupt controllers and clock; vCPUs are paused, and interrupts of devices are in the controllers.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn save(vm: &VmFd) -> Result<Self, VmmError> {
        let mut chips = Vec::new();
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(VmmError::kvm("save an interrupt controller"))?;
            chips.push(chip);
        }
        let mut clock = vm.get_clock().map_err(VmmError::kvm("save the clock"))?;
        clock.flags = 0; // what it says of the host's clock does not hold on the next one
        Ok(Self { chips, clock })
    }

    /// Sets interrupt controllers and clock of a new VM, before its vCPUs.
    ///
    /// # Errors
    /// [`VmmError::Kvm`].
    pub fn restore(&self, vm: &VmFd) -> Result<(), VmmError> {
        for chip in &self.chips {
            vm.set_irqchip(chip)
                .map_err(VmmError::kvm("restore an interrupt controller"))?;
        }
        vm.set_clock(&self.clock)
            .map_err(VmmError::kvm("restore the clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            reserved: 0,
            data,
        }
    }

    #[test]
    fn deadline_comes_after_the_tsc_and_is_never_zero() {
        let saved = [msr(MSR_TSC_DEADLINE, 0), msr(MSR_TSC, 500), msr(0x174, 1)];
        let entries = with_live_deadline(&saved);
        assert_eq!(entries.last(), Some(&msr(MSR_TSC_DEADLINE, 500)));
        let saved = [msr(MSR_TSC_DEADLINE, 900), msr(MSR_TSC, 500)];
        assert_eq!(
            with_live_deadline(&saved).last(),
            Some(&msr(MSR_TSC_DEADLINE, 900))
        );
    }
}
