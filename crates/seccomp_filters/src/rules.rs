// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What each kind of thread may call, and why.
//!
//! A rule that nobody can give a reason for is removed. The I/O and control threads have all that a vCPU has, but for
//! KVM_RUN and its like.

use libc::{
    SYS_accept4, SYS_brk, SYS_clock_gettime, SYS_close, SYS_epoll_ctl, SYS_epoll_wait,
    SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fcntl, SYS_fdatasync, SYS_fsync,
    SYS_futex, SYS_getpid, SYS_getrandom, SYS_gettid, SYS_ioctl, SYS_lseek, SYS_madvise, SYS_mmap,
    SYS_mprotect, SYS_mremap, SYS_munmap, SYS_poll, SYS_pread64, SYS_preadv, SYS_pwrite64,
    SYS_pwritev, SYS_read, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_restart_syscall,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_yield, SYS_sendmsg, SYS_sendto, SYS_shutdown,
    SYS_sigaltstack, SYS_socketpair, SYS_tgkill, SYS_timerfd_settime, SYS_write, SYS_writev,
};

use crate::{ThreadRole, file_server};

/// One allowed system call.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Its number.
    pub syscall: i64,
    /// All of these must hold; several rules for one call are alternatives.
    pub checks: &'static [Check],
    /// What for.
    pub why: &'static str,
}

/// A condition on an argument, by its position; 32 bits wide.
#[derive(Debug, Clone, Copy)]
pub enum Check {
    /// Has this value.
    Is(u8, u32),
    /// Is this process's id.
    IsProcess(u8),
    /// Has none of these bits.
    Without(u8, u32),
}

pub(crate) const fn allow(syscall: i64, why: &'static str) -> Rule {
    Rule {
        syscall,
        checks: &[],
        why,
    }
}

pub(crate) const fn only(syscall: i64, checks: &'static [Check], why: &'static str) -> Rule {
    Rule {
        syscall,
        checks,
        why,
    }
}

/// PROT_EXEC: no thread ever makes memory executable.
const EXECUTABLE: u32 = 4;
const AF_UNIX: u32 = 1;
const FIONBIO: u32 = 0x5421;
const F_GETFD: u32 = 1;
const F_GETFL: u32 = 3;
const F_SETFL: u32 = 4;

/// TUNSETOFFLOAD (Linux `include/uapi/linux/if_tun.h`).
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

const READ: u32 = 2;
const WRITE: u32 = 1;

/// The number of a KVM ioctl (Linux `include/uapi/linux/kvm.h`).
const fn kvm(direction: u32, bytes: u32, number: u32) -> u32 {
    direction << 30 | bytes << 16 | 0xae << 8 | number
}

/// KVM_RUN.
pub const KVM_RUN: u32 = kvm(0, 0, 0x80);
const KVM_GET_REGS: u32 = kvm(READ, 144, 0x81);
const KVM_GET_SREGS: u32 = kvm(READ, 312, 0x83);
const KVM_GET_MSRS: u32 = kvm(READ | WRITE, 8, 0x88);
const KVM_GET_LAPIC: u32 = kvm(READ, 1024, 0x8e);
const KVM_SET_LAPIC: u32 = kvm(WRITE, 1024, 0x8f);
const KVM_GET_MP_STATE: u32 = kvm(READ, 4, 0x98);
const KVM_GET_VCPU_EVENTS: u32 = kvm(READ, 64, 0x9f);
const KVM_GET_DEBUGREGS: u32 = kvm(READ, 128, 0xa1);
const KVM_GET_XSAVE: u32 = kvm(READ, 4096, 0xa4);
const KVM_GET_XCRS: u32 = kvm(READ, 392, 0xa6);
const KVM_GET_MSR_INDEX_LIST: u32 = kvm(READ | WRITE, 4, 0x02);
const KVM_GET_IRQCHIP: u32 = kvm(READ | WRITE, 520, 0x62);
const KVM_IRQFD: u32 = kvm(WRITE, 32, 0x76);
const KVM_IOEVENTFD: u32 = kvm(WRITE, 64, 0x79);
const KVM_GET_CLOCK: u32 = kvm(READ, 48, 0x7c);
const KVM_CREATE_VCPU: u32 = kvm(0, 0, 0x41);
const KVM_SET_USER_MEMORY_REGION: u32 = kvm(WRITE, 32, 0x46);
const KVM_SET_MSRS: u32 = kvm(WRITE, 8, 0x89);
const KVM_SET_CPUID2: u32 = kvm(WRITE, 8, 0x90);
const KVM_GET_TSC_KHZ: u32 = kvm(0, 0, 0xa3);

/// What every thread needs, of the VMM and of the file server.
const COMMON: &[Rule] = &[
    allow(SYS_futex, "locks, channels, joining threads"),
    allow(SYS_read, "emptying event descriptors"),
    allow(
        SYS_write,
        "event descriptors, the console log, a panic's message",
    ),
    allow(SYS_close, "dropping descriptors"),
    only(
        SYS_fcntl,
        &[Check::Is(1, F_GETFD)],
        "std checks descriptors it closes in debug builds",
    ),
    allow(SYS_brk, "malloc"),
    only(SYS_mmap, &[Check::Without(2, EXECUTABLE)], "malloc"),
    only(
        SYS_mprotect,
        &[Check::Without(2, EXECUTABLE)],
        "malloc's arenas grow this way",
    ),
    allow(SYS_munmap, "free, and a thread's signal stack at its end"),
    allow(SYS_mremap, "realloc"),
    allow(
        SYS_madvise,
        "free, a thread's stack at its end, pages of the balloon",
    ),
    allow(SYS_getrandom, "seeds of hash maps, the entropy device"),
    allow(SYS_clock_gettime, "where the vDSO cannot tell the time"),
    allow(SYS_sched_yield, "contended channels"),
    allow(SYS_rt_sigreturn, "the end of the kick's handler"),
    allow(SYS_rt_sigprocmask, "the end of a thread, abort"),
    allow(SYS_sigaltstack, "the end of a thread"),
    allow(SYS_restart_syscall, "waits that a signal interrupted"),
    allow(SYS_getpid, "abort"),
    allow(SYS_gettid, "abort"),
    only(SYS_tgkill, &[Check::IsProcess(0)], "kicking a vCPU, abort"),
    allow(SYS_exit, "the end of a thread"),
    allow(SYS_exit_group, "the end of the process"),
];

const VCPU: &[Rule] = &[
    only(SYS_ioctl, &[Check::Is(1, KVM_RUN)], "running the guest"),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_IOEVENTFD)],
        "queues of a device that goes live or is reset",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, TUNSETOFFLOAD)],
        "a network card that goes live",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_GET_REGS)],
        "saying where a guest failed, saving",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_GET_SREGS)],
        "saying where a guest failed, saving",
    ),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_MSRS)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_LAPIC)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_MP_STATE)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_VCPU_EVENTS)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_DEBUGREGS)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_XSAVE)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_XCRS)], "saving"),
];

/// What the thread of a vCPU needs that is made while the guest runs, before it runs it.
const MAKE_VCPU: &[Rule] = &[
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_CREATE_VCPU)],
        "making the vCPU",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_GET_TSC_KHZ)],
        "its clock rate",
    ),
    only(SYS_ioctl, &[Check::Is(1, KVM_SET_CPUID2)], "its CPUID"),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_SET_MSRS)],
        "its registers at boot",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_SET_LAPIC)],
        "being found by the others",
    ),
];

const IO: &[Rule] = &[
    allow(SYS_epoll_wait, "the event loop"),
    allow(SYS_epoll_ctl, "watching queues and streams"),
    allow(SYS_preadv, "disk reads straight into guest memory"),
    allow(SYS_pwritev, "disk writes straight from guest memory"),
    allow(
        SYS_pwrite64,
        "writing zeroes where a disk cannot punch holes",
    ),
    allow(SYS_fdatasync, "flushing a disk"),
    allow(SYS_fsync, "flushing a disk"),
    allow(SYS_fallocate, "discard and write-zeroes"),
    allow(SYS_readv, "vsock streams and frames into guest memory"),
    allow(SYS_writev, "vsock streams and frames from guest memory"),
    allow(SYS_recvfrom, "what a vsock stream begins with"),
    allow(SYS_sendto, "answers on vsock streams"),
    allow(SYS_accept4, "vsock streams of the host"),
    allow(SYS_shutdown, "the end of one direction of a vsock stream"),
    only(
        SYS_socketpair,
        &[Check::Is(0, AF_UNIX)],
        "vsock streams of the guest",
    ),
    allow(SYS_sendmsg, "handing the other end to the shim"),
    only(
        SYS_ioctl,
        &[Check::Is(1, FIONBIO)],
        "making streams non-blocking",
    ),
    only(
        SYS_fcntl,
        &[Check::Is(1, F_GETFL)],
        "making streams non-blocking",
    ),
    only(
        SYS_fcntl,
        &[Check::Is(1, F_SETFL)],
        "making streams non-blocking",
    ),
    allow(SYS_timerfd_settime, "vsock deadlines"),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_SET_USER_MEMORY_REGION)],
        "memory that is plugged or unplugged",
    ),
    allow(SYS_poll, "waiting for the file server, with a deadline"),
];

const CONTROL: &[Rule] = &[
    allow(SYS_poll, "waiting for the shim and the VM's end"),
    allow(SYS_recvmsg, "calls of the shim, with descriptors"),
    allow(SYS_sendmsg, "answers"),
    allow(SYS_eventfd2, "queues of a disk that is attached"),
    allow(SYS_lseek, "size of a disk or of the file for guest memory"),
    allow(SYS_recvfrom, "what the file server offers"),
    allow(
        SYS_pread64,
        "which pages have content, when guest memory is shared",
    ),
    allow(SYS_pwrite64, "their content, when guest memory is shared"),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_IOEVENTFD)],
        "queues of a live device, after a pause",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, TUNSETOFFLOAD)],
        "a live network card, after a pause",
    ),
    only(
        SYS_ioctl,
        &[Check::Is(1, KVM_IRQFD)],
        "interrupt of a disk that is attached",
    ),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_MSR_INDEX_LIST)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_IRQCHIP)], "saving"),
    only(SYS_ioctl, &[Check::Is(1, KVM_GET_CLOCK)], "saving"),
];

/// The rules of a kind of thread.
pub fn of(role: ThreadRole) -> impl Iterator<Item = &'static Rule> {
    let (own, more): (&[Rule], &[Rule]) = match role {
        ThreadRole::Vcpu => (VCPU, &[]),
        ThreadRole::SpareVcpu => (VCPU, MAKE_VCPU),
        ThreadRole::Io => (IO, &[]),
        ThreadRole::Control => (CONTROL, &[]),
        ThreadRole::FileServer => (file_server::RULES, &[]),
    };
    COMMON.iter().chain(own).chain(more)
}
