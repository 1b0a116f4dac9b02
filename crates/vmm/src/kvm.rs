// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a VM's KVM side is told when it is built.

use std::sync::Arc;

use ids::VcpuCount;
use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::VmmError;
use crate::boot::{Entry, registers};
use crate::cpu::{cpuid, msr};
use crate::devices::{Doorbells, registers as mmio};
use crate::layout::{self, RamBlock};
use crate::state::set_msrs;

/// Bit of KVM_CAP_PMU_CAPABILITY that says that the counters can be disabled.
const PMU_DISABLE: i32 = 1;

/// Doorbells as KVM's ioeventfds.
pub(crate) struct KvmDoorbells(pub(crate) Arc<VmFd>);

impl Doorbells for KvmDoorbells {
    fn connect(&self, index: u16, queue: u16, kick: &EventFd) -> bool {
        let address = notify_address(index);
        self.0
            .register_ioevent(kick, &address, u32::from(queue))
            .is_ok()
    }

    fn disconnect(&self, index: u16, queue: u16, kick: &EventFd) {
        // Fails only if it is not registered.
        let _ = self
            .0
            .unregister_ioevent(kick, &notify_address(index), u32::from(queue));
    }
}

fn notify_address(index: u16) -> IoEventAddress {
    IoEventAddress::Mmio(layout::window(index).saturating_add(mmio::QUEUE_NOTIFY))
}

pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, VmmError> {
    let vm = kvm.create_vm().map_err(VmmError::kvm("create a VM"))?;
    vm.set_tss_address(layout::TSS)
        .map_err(VmmError::kvm("set the TSS address"))?;
    vm.create_irq_chip()
        .map_err(VmmError::kvm("create the interrupt controllers"))?;
    disable_pmu(&vm)?;
    Ok(vm)
}

/// The guest's performance counters, which CPUID hides, also lose their registers.
fn disable_pmu(vm: &VmFd) -> Result<(), VmmError> {
    if vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) & PMU_DISABLE == 0 {
        return Ok(()); // KVM older than 5.18, where CPUID alone has to do
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    cap.args = [u64::from(KVM_PMU_CAP_DISABLE), 0, 0, 0];
    vm.enable_cap(&cap)
        .map_err(VmmError::kvm("take the performance counters away"))
}

#[expect(unsafe_code, reason = "gives KVM the addresses of guest memory")]
pub(crate) fn register_memory(
    vm: &VmFd,
    memory: &GuestMemoryMmap,
    blocks: &[RamBlock],
) -> Result<(), VmmError> {
    for (slot, block) in (0u32..).zip(blocks) {
        let host = memory
            .get_host_address(GuestAddress(block.start))
            .map_err(|error| VmmError::host("find guest memory")(std::io::Error::other(error)))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: block.start,
            memory_size: block.len,
            userspace_addr: host as u64,
        };
        // SAFETY: each block is one whole mapping of `memory`, which `Machine` drops after the VM.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(VmmError::kvm("give the VM its memory"))?;
    }
    Ok(())
}

pub(crate) fn configure_vcpu(
    fd: &VcpuFd,
    policy: &[kvm_cpuid_entry2],
    id: u8,
    count: VcpuCount,
) -> Result<(), VmmError> {
    let tsc_khz = fd
        .get_tsc_khz()
        .map_err(VmmError::kvm("read the clock rate"))?;
    let identity = cpuid::VcpuIdentity {
        id,
        count: count.get(),
        tsc_khz,
    };
    let entries =
        CpuId::from_entries(&cpuid::for_vcpu(policy, identity)).map_err(|_| VmmError::Config {
            reason: "the host's CPU has too many CPUID leaves".to_owned(),
        })?;
    fd.set_cpuid2(&entries)
        .map_err(VmmError::kvm("set the CPUID"))?;
    set_msrs(fd, &msr::AT_BOOT)
}

pub(crate) fn set_entry(fd: &VcpuFd, entry: Entry) -> Result<(), VmmError> {
    let sregs = fd
        .get_sregs()
        .map_err(VmmError::kvm("read the control registers"))?;
    fd.set_sregs(&registers::special(entry, sregs))
        .map_err(VmmError::kvm("set the control registers"))?;
    fd.set_regs(&registers::general(entry))
        .map_err(VmmError::kvm("set the registers"))
}
