// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the threads of `coffer-virtiofsd` may call once all of them run: no new thread, process, socket or mount.

use libc::{
    SYS_capget, SYS_capset, SYS_copy_file_range, SYS_dup, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_epoll_wait, SYS_fallocate, SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchownat, SYS_fcntl,
    SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr, SYS_fremovexattr, SYS_fsetxattr, SYS_fstat,
    SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getxattr,
    SYS_linkat, SYS_listxattr, SYS_lseek, SYS_mkdirat, SYS_mknodat, SYS_newfstatat, SYS_openat,
    SYS_openat2, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev,
    SYS_pwritev2, SYS_readlinkat, SYS_readv, SYS_recvmsg, SYS_removexattr, SYS_renameat,
    SYS_renameat2, SYS_rseq, SYS_sched_getaffinity, SYS_sendmsg, SYS_set_robust_list,
    SYS_setgroups, SYS_setresgid, SYS_setresuid, SYS_setxattr, SYS_statx, SYS_symlinkat,
    SYS_syncfs, SYS_umask, SYS_unlinkat, SYS_utimensat, SYS_writev,
};

use crate::rules::{Check, Rule, allow, only};

const F_DUPFD_CLOEXEC: u32 = 1030;
const PR_SET_NAME: u32 = 15;
const PR_CAPBSET_READ: u32 = 23;
const PR_CAP_AMBIENT: u32 = 47;
const PR_CAP_AMBIENT_IS_SET: u32 = 1;

/// The file server's own.
pub(crate) const RULES: &[Rule] = &[
    allow(SYS_rseq, "a thread that has just been started"),
    allow(SYS_set_robust_list, "a thread that has just been started"),
    allow(SYS_sched_getaffinity, "a thread that has just been started"),
    only(
        SYS_prctl,
        &[Check::Is(0, PR_SET_NAME)],
        "a thread that has just been started",
    ),
    allow(SYS_epoll_wait, "the event loop"),
    allow(SYS_epoll_pwait, "the event loop"),
    allow(SYS_epoll_ctl, "watching queues"),
    allow(SYS_recvmsg, "messages of the VMM, with descriptors"),
    allow(SYS_sendmsg, "answers, and saying that it is ready"),
    allow(SYS_dup, "a flush closes a second handle"),
    only(
        SYS_fcntl,
        &[Check::Is(1, F_DUPFD_CLOEXEC)],
        "a second handle of a descriptor",
    ),
    allow(SYS_openat, "opening what the guest names"),
    allow(SYS_openat2, "opening what the guest names"),
    allow(SYS_statx, "attributes"),
    allow(SYS_newfstatat, "attributes"),
    allow(SYS_fstat, "attributes"),
    allow(SYS_fstatfs, "free space"),
    allow(SYS_lseek, "holes, directory positions"),
    allow(SYS_getdents64, "directories"),
    allow(SYS_readlinkat, "symbolic links"),
    allow(SYS_preadv, "reads"),
    allow(SYS_preadv2, "reads"),
    allow(SYS_pread64, "reads"),
    allow(SYS_readv, "reads"),
    allow(SYS_pwritev, "writes"),
    allow(SYS_pwritev2, "writes"),
    allow(SYS_pwrite64, "writes"),
    allow(SYS_writev, "writes"),
    allow(SYS_copy_file_range, "copies"),
    allow(SYS_fallocate, "space, holes"),
    allow(SYS_ftruncate, "sizes"),
    allow(SYS_fsync, "durability"),
    allow(SYS_fdatasync, "durability"),
    allow(SYS_syncfs, "durability"),
    allow(SYS_mkdirat, "new directories"),
    allow(
        SYS_mknodat,
        "new FIFOs and sockets; devices need a capability that is gone",
    ),
    allow(SYS_symlinkat, "new symbolic links"),
    allow(SYS_linkat, "new links"),
    allow(SYS_unlinkat, "removal"),
    allow(SYS_renameat, "renames"),
    allow(SYS_renameat2, "renames"),
    allow(SYS_fchmod, "modes"),
    allow(SYS_fchmodat, "modes"),
    allow(SYS_fchownat, "owners"),
    allow(SYS_utimensat, "times"),
    allow(SYS_umask, "modes exactly as the guest says"),
    allow(SYS_getxattr, "extended attributes"),
    allow(SYS_setxattr, "extended attributes"),
    allow(SYS_listxattr, "extended attributes"),
    allow(SYS_removexattr, "extended attributes"),
    allow(SYS_fgetxattr, "extended attributes"),
    allow(SYS_fsetxattr, "extended attributes"),
    allow(SYS_flistxattr, "extended attributes"),
    allow(SYS_fremovexattr, "extended attributes"),
    allow(SYS_fchdir, "extended attributes of what cannot be opened"),
    allow(SYS_geteuid, "who it is"),
    allow(SYS_getegid, "who it is"),
    allow(SYS_setresuid, "making a file as the guest's user"),
    allow(SYS_setresgid, "making a file as the guest's group"),
    allow(SYS_setgroups, "making a file with the guest's groups"),
    only(
        SYS_prctl,
        &[Check::Is(0, PR_CAPBSET_READ)],
        "libcap-ng reads what it has, to keep DAC_OVERRIDE in the name of a user",
    ),
    only(
        SYS_prctl,
        &[
            Check::Is(0, PR_CAP_AMBIENT),
            Check::Is(1, PR_CAP_AMBIENT_IS_SET),
        ],
        "libcap-ng reads what it has, to keep DAC_OVERRIDE in the name of a user",
    ),
    allow(SYS_capget, "dropping FSETID for a write"),
    allow(SYS_capset, "dropping FSETID for a write"),
];
