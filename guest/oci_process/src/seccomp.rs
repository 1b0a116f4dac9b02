// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The spec's seccomp profile as a filter of the calling process.
//!
//! A profile cannot name system calls that are newer than itself, and programs take only `ENOSYS` for a kernel that does not
//! have a call yet. So, as with runc, calls above the highest number that the profile names are answered so, unless its
//! default allows them.

use std::io::{Read as _, Seek as _};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::Error;
use crate::error::Context as _;
use crate::sys;

/// `BPF_MAXINSNS` of the kernel.
const MAX_INSTRUCTIONS: usize = 4096;

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// `__X32_SYSCALL_BIT`: the numbers of x32 begin here.
const X32_NUMBERS: u32 = 0x4000_0000;

/// A compiled profile, not yet in force.
pub(crate) struct Filter {
    program: Vec<libc::sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles `profile`. Names of system calls that libseccomp does not know are left out, as runc does: a profile lists
    /// calls of many kernels, and a call left out gets the default action.
    ///
    /// # Errors
    /// [`Error::Seccomp`] for an architecture or action that libseccomp does not take, [`Error::Invalid`] for a bad argument
    /// or a profile that is too long for the kernel.
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, Error> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let mut filter = ScmpFilterContext::new(default).map_err(failed("starting a filter"))?;
        for arch in profile.architectures().iter().flatten() {
            filter
                .add_arch(architecture(*arch)?)
                .map_err(failed(&format!("adding {arch:?}")))?;
        }
        let rules = profile.syscalls().as_deref().unwrap_or_default();
        for rule in rules {
            add_rule(&mut filter, rule, default)?;
        }
        let mut program = match newest(rules) {
            Some(newest) if !is_permissive(default) => answer_newer(newest),
            _ => Vec::new(),
        };
        program.extend(export(&filter)?);
        if program.len() > MAX_INSTRUCTIONS {
            return Err(Error::invalid(
                "linux.seccomp",
                format!(
                    "is a filter of {} instructions, the kernel takes {MAX_INSTRUCTIONS}",
                    program.len()
                ),
            ));
        }
        let flags = profile.flags().iter().flatten();
        Ok(Self {
            program,
            flags: flags.fold(0, |all, flag| all | flag_bit(*flag)),
        })
    }

    /// Puts the filter in force for the calling process, for good.
    ///
    /// # Errors
    /// [`Error::Step`]; without no_new_privs the process needs `CAP_SYS_ADMIN`.
    pub(crate) fn load(self) -> Result<(), Error> {
        sys::load_seccomp(&self.program, self.flags)
            .step(|| "loading the seccomp filter".to_owned())
    }
}

/// A process has one thread when its filter is loaded, and nobody is notified: two of the flags have nothing to do.
fn flag_bit(flag: LinuxSeccompFilterFlag) -> libc::c_ulong {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync
        | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

/// Whether calls that no rule is about get through, to the kernel or to a tracer.
fn is_permissive(action: ScmpAction) -> bool {
    matches!(
        action,
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_)
    )
}

/// The highest number of the calls that the rules name.
fn newest(rules: &[LinuxSyscall]) -> Option<u32> {
    let names = rules.iter().flat_map(|rule| rule.names());
    names
        .filter_map(|name| ScmpSyscall::from_name(name).ok())
        // libseccomp has negative numbers for calls of other architectures.
        .filter_map(|call| u32::try_from(call.as_raw_syscall()).ok())
        .max()
}

/// Instructions in front of a filter: a call of the native architecture with a number above `newest` is not implemented.
fn answer_newer(newest: u32) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const NUMBER_OFFSET: u32 = 0;
    const ARCH_OFFSET: u32 = 4;
    let jump = |condition: u32| libc::BPF_JMP | condition | libc::BPF_K;
    let not_implemented = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    // The operands of a jump are how many instructions are left out if it holds, and if not.
    [
        (LOAD, 0, 0, ARCH_OFFSET),
        (jump(libc::BPF_JEQ), 0, 4, AUDIT_ARCH_X86_64),
        (LOAD, 0, 0, NUMBER_OFFSET),
        (jump(libc::BPF_JGE), 2, 0, X32_NUMBERS),
        (jump(libc::BPF_JGT), 0, 1, newest),
        (RETURN, 0, 0, not_implemented),
    ]
    .into_iter()
    .map(|(code, jt, jf, k)| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt,
        jf,
        k,
    })
    .collect()
}

/// The filter as the kernel takes it: `struct sock_filter` after `struct sock_filter`.
fn export(filter: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, Error> {
    let step = || "writing the seccomp filter".to_owned();
    let file = memfd_create("seccomp", MemfdFlags::CLOEXEC).step(step)?;
    filter
        .export_bpf(&file)
        .map_err(failed("writing the seccomp filter"))?;
    let mut file = std::fs::File::from(file);
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .step(step)?;
    let (instructions, _) = bytes.as_chunks::<8>();
    Ok(instructions
        .iter()
        .map(|[code0, code1, jt, jf, k @ ..]| libc::sock_filter {
            code: u16::from_ne_bytes([*code0, *code1]),
            jt: *jt,
            jf: *jf,
            k: u32::from_ne_bytes(*k),
        })
        .collect())
}

fn failed(step: &str) -> impl FnOnce(libseccomp::error::SeccompError) -> Error {
    let step = step.to_owned();
    move |source| Error::Seccomp { step, source }
}

fn add_rule(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), Error> {
    let action = action(rule.action(), rule.errno_ret())?;
    if action == default {
        // libseccomp refuses a rule that says what the default does.
        return Ok(());
    }
    let arguments = rule.args().as_deref().unwrap_or_default();
    for name in rule.names() {
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        for comparators in comparisons(arguments)? {
            filter
                .add_rule_conditional(action, syscall, &comparators)
                .map_err(failed(&format!("adding a rule for {name}")))?;
        }
    }
    Ok(())
}

/// The argument lists of the rules that `arguments` stand for. All must match at once, except that two conditions on one
/// argument mean "either", as runc reads them: libseccomp takes one condition for each argument of a rule.
fn comparisons(arguments: &[LinuxSeccompArg]) -> Result<Vec<Vec<ScmpArgCompare>>, Error> {
    let all: Vec<ScmpArgCompare> = arguments.iter().map(comparison).collect::<Result<_, _>>()?;
    let doubled = arguments.iter().enumerate().any(|(at, argument)| {
        arguments
            .iter()
            .take(at)
            .any(|other| other.index() == argument.index())
    });
    Ok(if doubled {
        all.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![all]
    })
}

fn comparison(argument: &LinuxSeccompArg) -> Result<ScmpArgCompare, Error> {
    let index = u32::try_from(argument.index())
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| {
            Error::invalid(
                "linux.seccomp.syscalls.args.index",
                format!(
                    "is {}, a system call has arguments 0 to 5",
                    argument.index()
                ),
            )
        })?;
    let (operator, datum) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, argument.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, argument.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, argument.value()),
        // The spec's value is the mask, its valueTwo what the masked argument must be.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(argument.value()),
            argument.value_two().unwrap_or(0),
        ),
    };
    Ok(ScmpArgCompare::new(index, operator, datum))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, Error> {
    let data = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let errno = || {
        u16::try_from(data).map_err(|_| {
            Error::invalid(
                "linux.seccomp errnoRet",
                format!("is {data}, at most 65535 is allowed"),
            )
        })
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(i32::from(errno()?)),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno()?),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::Unsupported {
                field: "linux.seccomp action SCMP_ACT_NOTIFY".to_owned(),
                hint: "a seccomp agent on the node cannot see into the guest",
            });
        }
    })
}

fn architecture(arch: Arch) -> Result<ScmpArch, Error> {
    // Both sides use the specification's names.
    let name = serde_json::to_value(arch).ok();
    name.as_ref()
        .and_then(serde_json::Value::as_str)
        .and_then(|name| name.parse().ok())
        .ok_or_else(|| {
            Error::invalid(
                "linux.seccomp.architectures",
                format!("{arch:?} is not known"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> LinuxSeccomp {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn profile_of_the_usual_shape_compiles() {
        let profile = profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                  {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                  {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                   "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                  {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                  {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                   "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
                ]}"#,
        );
        assert!(Filter::compile(&profile).unwrap().program.len() > 20);
    }

    /// Loads a filter that knows no call newer than `newest`, for a thread, and makes two calls.
    fn answers(default: &str) -> [Option<i32>; 2] {
        let profile = profile(&format!(
            r#"{{"defaultAction": "{default}", "syscalls": [
                {{"names": ["write", "read", "close", "futex", "exit", "munmap", "mmap", "madvise", "mprotect", "brk",
                           "rt_sigprocmask", "rt_sigaction", "sigaltstack", "set_robust_list", "rseq", "prctl", "getrandom",
                           "gettid", "sched_yield", "sched_getaffinity", "close_range"], "action": "SCMP_ACT_ALLOW"}},
                {{"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}}]}}"#
        ));
        let calls = || {
            rustix::thread::set_no_new_privs(true).unwrap();
            Filter::compile(&profile).unwrap().load().unwrap();
            [1000, libc::SYS_getpid].map(|number| sys::call(number).unwrap_err().raw_os_error())
        };
        std::thread::scope(|scope| scope.spawn(calls).join().unwrap())
    }

    #[test]
    fn call_newer_than_the_profile_is_not_implemented() {
        assert_eq!(answers("SCMP_ACT_ERRNO"), [Some(libc::ENOSYS), Some(5)]);
    }

    #[test]
    fn default_that_allows_leaves_newer_calls_to_the_kernel() {
        let rule = |default: &str| {
            let text = format!(
                r#"{{"defaultAction": "{default}", "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_KILL"}}]}}"#
            );
            let program = Filter::compile(&profile(&text)).unwrap().program;
            program
                .iter()
                .any(|one| one.k == libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs())
        };
        assert!(!rule("SCMP_ACT_ALLOW") && !rule("SCMP_ACT_LOG"));
        assert!(rule("SCMP_ACT_ERRNO") && rule("SCMP_ACT_KILL_PROCESS"));
    }

    #[test]
    fn seventh_argument_is_refused() {
        let profile = profile(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
        );
        assert!(matches!(
            Filter::compile(&profile),
            Err(Error::Invalid { .. })
        ));
    }
}
