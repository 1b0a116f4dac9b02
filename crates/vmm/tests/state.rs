// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A guest that is saved in one VM and goes on in another. Needs `/dev/kvm`.
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that gives KVM the addresses of guest memory"
)]

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm::state::{KvmState, VcpuState};

/// Real mode: writes BL to port 0x10, adds one, and again.
const COUNT: &[u8] = &[
    0x88, 0xd8, // mov al, bl
    0xe6, 0x10, // out 0x10, al
    0xfe, 0xc3, // inc bl
    0xeb, 0xf8, // jmp to the mov
];

fn vm_with(kvm: &Kvm, memory: &GuestMemoryMmap) -> (VmFd, VcpuFd) {
    let vm = kvm.create_vm().unwrap();
    vm.set_tss_address(vmm::layout::TSS).unwrap();
    vm.create_irq_chip().unwrap();
    let region = kvm_userspace_memory_region {
        memory_size: 0x10000,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    // SAFETY: the caller keeps the memory for longer than the VM.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    (vm, vcpu)
}

fn next_output(vcpu: &mut VcpuFd) -> u8 {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, [byte]) => *byte,
        other => panic!("{other:?}"),
    }
}

#[test]
fn guest_goes_on_where_it_was_saved() {
    let kvm = Kvm::new().unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    memory.write_slice(COUNT, GuestAddress(0x1000)).unwrap();
    let (vm, mut vcpu) = vm_with(&kvm, &memory);
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rbx, regs.rflags) = (0x1000, 40, 2);
    vcpu.set_regs(&regs).unwrap();
    assert_eq!([next_output(&mut vcpu), next_output(&mut vcpu)], [40, 41]);

    // KVM finishes the port write at the next entry (KVM API §5), so that must come before the state is read.
    vcpu.set_kvm_immediate_exit(1);
    assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
    let msrs = kvm.get_msr_index_list().unwrap();
    let saved = VcpuState::save(&vcpu, msrs.as_slice()).unwrap();
    let saved_vm = KvmState::save(&vm).unwrap();
    let encoded = serde_json::to_vec(&(&saved_vm, &saved)).unwrap();
    drop((vcpu, vm));

    let (vm, mut vcpu) = vm_with(&kvm, &memory);
    let (saved_vm, saved): (KvmState, VcpuState) = serde_json::from_slice(&encoded).unwrap();
    saved_vm.restore(&vm).unwrap();
    saved.restore(&vcpu).unwrap();
    let again = VcpuState::save(&vcpu, &[]).unwrap();
    let registers = |state: &VcpuState| serde_json::to_value(state).unwrap()["regs"].clone();
    assert_eq!(registers(&again), registers(&saved));
    assert_eq!([next_output(&mut vcpu), next_output(&mut vcpu)], [42, 43]);
}
