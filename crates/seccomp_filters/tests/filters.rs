// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Each call that no rule allows kills, each that a rule allows passes: tried one by one in processes of their own.
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that forks, and makes raw system calls with harmless arguments"
)]

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use seccomp_filters::ThreadRole;
use seccomp_filters::rules::{self, Check, KVM_RUN};

const ROLES: [ThreadRole; 5] = [
    ThreadRole::Vcpu,
    ThreadRole::SpareVcpu,
    ThreadRole::Io,
    ThreadRole::Control,
    ThreadRole::FileServer,
];
/// All system calls of x86-64 this test knows of. Between the two ranges are none but uprobe and uretprobe, with which
/// seccomp has nothing to do: they raise SIGILL when not called from a probe's trampoline.
fn all_syscalls() -> impl Iterator<Item = i64> {
    (0..335).chain(424..470)
}

/// Makes one call under the filter of `role`; whether it was killed for it.
fn is_killed(role: ThreadRole, syscall: i64, arguments: [i64; 6]) -> bool {
    // SAFETY: the child makes no allocation that another thread's lock could block but the filter's, and then
    // only raw system calls.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            if seccomp_filters::install(role).is_err() {
                // SAFETY: ends this process, nothing else.
                unsafe { libc::_exit(1) };
            }
            let [a, b, c, d, e, f] = arguments;
            // SAFETY: the arguments are no valid pointers or descriptors, so the kernel does nothing.
            unsafe {
                libc::syscall(syscall, a, b, c, d, e, f);
                libc::_exit(0)
            }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, code) => {
                assert_ne!(
                    (code, syscall == libc::SYS_exit),
                    (1, false),
                    "not installed"
                );
                false
            }
            WaitStatus::Signaled(_, signal, _) => {
                assert_eq!(signal, Signal::SIGSYS, "system call {syscall}");
                true
            }
            other => panic!("{other:?}"),
        },
    }
}

/// Arguments that do nothing, but satisfy `checks`. The process id is the child's, which only it knows.
fn arguments_for(checks: &[Check]) -> Option<[i64; 6]> {
    let mut arguments = [-1; 6];
    for check in checks {
        match *check {
            Check::Is(argument, value) => arguments[usize::from(argument)] = i64::from(value),
            Check::Without(argument, _) => arguments[usize::from(argument)] = 0,
            Check::IsProcess(_) => return None,
        }
    }
    Some(arguments)
}

#[test]
fn every_allowed_call_passes() {
    for role in ROLES {
        for rule in rules::of(role) {
            // It would load the registers from whatever is on the stack.
            if rule.syscall == libc::SYS_rt_sigreturn {
                continue;
            }
            if let Some(arguments) = arguments_for(rule.checks) {
                let killed = is_killed(role, rule.syscall, arguments);
                assert!(!killed, "{role:?} {} ({})", rule.syscall, rule.why);
            }
        }
    }
}

#[test]
fn every_other_call_kills() {
    for role in ROLES {
        let allowed: BTreeSet<i64> = rules::of(role).map(|rule| rule.syscall).collect();
        for syscall in all_syscalls().filter(|syscall| !allowed.contains(syscall)) {
            assert!(is_killed(role, syscall, [-1; 6]), "{role:?} {syscall}");
        }
    }
}

#[test]
fn wrong_arguments_of_allowed_calls_kill() {
    let executable = [0, 4096, 5, 0x22, -1, 0];
    let socket = [i64::from(libc::AF_INET), 1, 0, 0, 0, 0];
    for role in ROLES {
        assert!(is_killed(role, libc::SYS_mmap, executable));
        assert!(is_killed(role, libc::SYS_mprotect, [0, 4096, 4, 0, 0, 0]));
        assert!(is_killed(role, libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]));
        assert!(is_killed(role, libc::SYS_ioctl, [-1, 0x5401, 0, 0, 0, 0]));
        assert!(is_killed(role, libc::SYS_fcntl, [-1, 0, 0, 0, 0, 0])); // F_DUPFD
        assert!(is_killed(role, libc::SYS_socketpair, socket));
    }
    let run = [-1, i64::from(KVM_RUN), 0, 0, 0, 0];
    assert!(is_killed(ThreadRole::Io, libc::SYS_ioctl, run));
    assert!(is_killed(ThreadRole::Control, libc::SYS_ioctl, run));
}

#[test]
fn every_rule_has_a_reason_and_none_is_there_twice() {
    for role in ROLES {
        let mut seen = BTreeSet::new();
        for rule in rules::of(role) {
            assert!(rule.why.len() > 3);
            assert!(
                seen.insert((rule.syscall, format!("{:?}", rule.checks))),
                "{role:?} {rule:?}"
            );
        }
    }
}
