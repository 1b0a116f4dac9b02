// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Holds two idle VMs open in the nested node, so that the node's kernel never patches KVM's code while VMs run.
//!
//! KVM keeps conditions that are rarely true in static keys, which are instructions that the kernel rewrites: whether
//! any vCPU has its APIC switched off (true for a moment in every VM's start), whether any has none, whether there is
//! any VM. QEMU before 8.1 can run a stale translation of such an instruction on its other vCPU (it does not lock a page
//! while it translates it), and the node's kernel then dies of an int3. With these two VMs all of the keys stay true.
//!
//! Compiled with rustc alone, for it is needed before anything else is built.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::process::exit;

// Linux, include/uapi/linux/kvm.h
const KVM_CREATE_VM: u64 = 0xae01;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_CREATE_IRQCHIP: u64 = 0xae60;

unsafe extern "C" {
    fn ioctl(descriptor: i32, request: u64, ...) -> i32;
}

/// A request of KVM whose argument is 0; its result.
fn request(descriptor: i32, request: u64) -> i32 {
    // SAFETY: none of the three requests takes a pointer.
    let result = unsafe { ioctl(descriptor, request, 0_u64) };
    if result < 0 {
        eprintln!("hold_kvm: request {request:#x}: {}", std::io::Error::last_os_error());
        exit(1);
    }
    result
}

fn main() {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap_or_else(|error| {
        eprintln!("hold_kvm: /dev/kvm: {error}");
        exit(1);
    });
    // A vCPU's APIC is switched off until its guest switches it on, which these never do.
    let with_apic = request(kvm.as_raw_fd(), KVM_CREATE_VM);
    request(with_apic, KVM_CREATE_IRQCHIP);
    request(with_apic, KVM_CREATE_VCPU);
    let without_apic = request(kvm.as_raw_fd(), KVM_CREATE_VM);
    request(without_apic, KVM_CREATE_VCPU);
    loop {
        std::thread::park();
    }
}
