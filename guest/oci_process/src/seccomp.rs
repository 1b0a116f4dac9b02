// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The spec's seccomp profile as a filter of the calling process.

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use crate::Error;

/// A compiled profile, not yet in force.
pub(crate) struct Filter(ScmpFilterContext);

impl Filter {
    /// Compiles `profile`. Names of system calls that libseccomp does not know are left out, as runc does: a profile lists
    /// calls of many kernels, and a call left out gets the default action.
    ///
    /// # Errors
    /// [`Error::Seccomp`] for an architecture or action that libseccomp does not take, [`Error::Invalid`] for a bad argument.
    pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Self, Error> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let mut filter = ScmpFilterContext::new(default).map_err(failed("starting a filter"))?;
        // no_new_privs is the spec's decision alone.
        filter
            .set_ctl_nnp(false)
            .map_err(failed("leaving no_new_privs alone"))?;
        for arch in profile.architectures().iter().flatten() {
            filter
                .add_arch(architecture(*arch)?)
                .map_err(failed(&format!("adding {arch:?}")))?;
        }
        for flag in profile.flags().iter().flatten() {
            let set = match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true),
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => filter.set_ctl_tsync(true),
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true),
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                    filter.set_ctl_waitkill(true)
                }
            };
            set.map_err(failed(&format!("setting {flag:?}")))?;
        }
        for rule in profile.syscalls().iter().flatten() {
            add_rule(&mut filter, rule, default)?;
        }
        Ok(Self(filter))
    }

    /// Puts the filter in force for the calling process, for good.
    ///
    /// # Errors
    /// [`Error::Seccomp`]; without no_new_privs the process needs `CAP_SYS_ADMIN`.
    pub(crate) fn load(self) -> Result<(), Error> {
        self.0.load().map_err(failed("loading the seccomp filter"))
    }
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
        let filter = Filter::compile(&profile).unwrap();
        let mut program = tempfile::tempfile().unwrap();
        filter.0.export_bpf(&mut program).unwrap();
        assert!(program.metadata().unwrap().len() > 0);
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
