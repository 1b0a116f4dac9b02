// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! System calls that containers and runtimes use must exist; those that reach into the kernel must not.
//!
//! Most are called with arguments that the kernel refuses after it has found the call: any error but `ENOSYS`
//! says that the call is compiled in.

use std::mem::size_of_val;

use anyhow::{Result, bail, ensure};
use libc::c_long;

use crate::Report;

/// Calls that must exist, with arguments that change nothing.
const PRESENT: &[(&str, c_long, [c_long; 4])] = &[
    ("bpf", libc::SYS_bpf, [-1, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
    ("epoll_create1", libc::SYS_epoll_create1, [-1, 0, 0, 0]),
    ("eventfd2", libc::SYS_eventfd2, [0, -1, 0, 0]),
    ("fanotify_init", libc::SYS_fanotify_init, [-1, 0, 0, 0]),
    ("fsopen", libc::SYS_fsopen, [0, -1, 0, 0]),
    ("futex", libc::SYS_futex, [0, 1, 0, 0]),
    ("get_robust_list", libc::SYS_get_robust_list, [0, 0, 0, 0]),
    ("inotify_init1", libc::SYS_inotify_init1, [-1, 0, 0, 0]),
    ("io_setup", libc::SYS_io_setup, [0, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0, 0]),
    ("kcmp", libc::SYS_kcmp, [-1, -1, -1, 0]),
    ("keyctl", libc::SYS_keyctl, [-1, 0, 0, 0]),
    (
        "landlock_create_ruleset",
        libc::SYS_landlock_create_ruleset,
        [0, 0, 1, 0],
    ),
    ("membarrier", libc::SYS_membarrier, [0, 0, 0, 0]),
    ("memfd_create", libc::SYS_memfd_create, [0, -1, 0, 0]),
    ("mount_setattr", libc::SYS_mount_setattr, [-1, 0, -1, 0]),
    ("mq_open", libc::SYS_mq_open, [0, 0, 0, 0]),
    ("msgget", libc::SYS_msgget, [-2, 0, 0, 0]),
    (
        "name_to_handle_at",
        libc::SYS_name_to_handle_at,
        [-1, 0, 0, 0],
    ),
    ("openat2", libc::SYS_openat2, [-1, 0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, 0]),
    ("pidfd_open", libc::SYS_pidfd_open, [-1, 0, 0, 0]),
    ("pkey_alloc", libc::SYS_pkey_alloc, [-1, -1, 0, 0]),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        [-1, 0, 0, 0],
    ),
    ("quotactl", libc::SYS_quotactl, [-1, 0, 0, 0]),
    ("rseq", libc::SYS_rseq, [1, 0, -1, 0]),
    ("seccomp", libc::SYS_seccomp, [-1, 0, 0, 0]),
    ("semget", libc::SYS_semget, [-2, -1, 0, 0]),
    ("shmget", libc::SYS_shmget, [-2, 0, 0, 0]),
    ("signalfd4", libc::SYS_signalfd4, [-1, 0, 0, 0]),
    ("swapoff", libc::SYS_swapoff, [0, 0, 0, 0]),
    ("timerfd_create", libc::SYS_timerfd_create, [-1, 0, 0, 0]),
];

/// Calls that must not exist.
const ABSENT: &[(&str, c_long)] = &[
    ("acct", libc::SYS_acct),
    ("init_module", libc::SYS_init_module),
    ("iopl", libc::SYS_iopl),
    ("ioperm", libc::SYS_ioperm),
    ("kexec_file_load", libc::SYS_kexec_file_load),
    ("kexec_load", libc::SYS_kexec_load),
    ("modify_ldt", libc::SYS_modify_ldt),
    ("userfaultfd", libc::SYS_userfaultfd),
];

pub(crate) fn run(report: &mut Report) {
    for (name, number, arguments) in PRESENT {
        report.check(&format!("system call {name}"), present(*number, *arguments));
    }
    for (name, number) in ABSENT {
        report.check(&format!("no system call {name}"), absent(*number));
    }
    report.check("seccomp filters can kill a process", seccomp_actions());
    report.check("BPF device programs load", load_device_program());
}

fn present(number: c_long, arguments: [c_long; 4]) -> Result<()> {
    ensure!(
        call(number, arguments) != Err(libc::ENOSYS),
        "not in this kernel"
    );
    Ok(())
}

fn absent(number: c_long) -> Result<()> {
    match call(number, [-1, 0, 0, 0]) {
        Err(libc::ENOSYS) => Ok(()),
        other => bail!("it answers {other:?}"),
    }
}

/// Makes a system call; the error is an errno.
#[expect(
    unsafe_code,
    reason = "probing by number; no wrapper passes arguments that are wrong on purpose"
)]
fn call(number: c_long, [a, b, c, d]: [c_long; 4]) -> Result<c_long, i32> {
    // SAFETY: no argument of the tables above is the address of memory of this process, so nothing in it can change;
    // the only pointers passed are those of `load_device_program`, which outlive the call.
    let result = unsafe { libc::syscall(number, a, b, c, d, 0, 0) };
    if result >= 0 {
        Ok(result)
    } else {
        Err(nix::errno::Errno::last_raw())
    }
}

fn seccomp_actions() -> Result<()> {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail")?;
    for wanted in [
        "kill_process",
        "trap",
        "errno",
        "user_notif",
        "log",
        "allow",
    ] {
        ensure!(
            actions.split_whitespace().any(|action| action == wanted),
            "no {wanted} in {actions}"
        );
    }
    Ok(())
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, up to `expected_attach_type`'s predecessors.
#[repr(C)]
#[derive(Default)]
struct LoadProgram {
    program_type: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;

/// Loads the rule "allow all": `r0 = 1; exit`.
fn load_device_program() -> Result<()> {
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let license = c"Apache-2.0";
    let attribute = LoadProgram {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(code.len())?,
        code: code.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        ..LoadProgram::default()
    };
    let address = c_long::try_from((&raw const attribute).addr())?;
    let size = c_long::try_from(size_of_val(&attribute))?;
    match call(libc::SYS_bpf, [BPF_PROG_LOAD, address, size, 0]) {
        Ok(_) => Ok(()),
        Err(errno) => bail!("bpf: {}", nix::errno::Errno::from_raw(errno)),
    }
}
