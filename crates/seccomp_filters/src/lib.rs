// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Seccomp filters for each kind of VMM thread, and for the file server.
//!
//! The rules are data, each with its reason ([`rules`]). A call that no rule allows kills the process with SIGSYS, which
//! the driver reports. A filter is installed by the thread it is for, as the last thing before the guest may run; it cannot
//! be taken off. There is no less strict mode.
#![forbid(unsafe_code)]

mod file_server;
pub mod rules;

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use rules::{Check, Rule};

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadRole {
    /// Runs one vCPU and answers its register accesses.
    Vcpu,
    /// Makes one vCPU when it is wanted, and then runs it.
    SpareVcpu,
    /// Serves the queues of all devices.
    Io,
    /// Speaks with the shim.
    Control,
    /// Any thread of the file server, a process of its own.
    FileServer,
}

/// Why a filter could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The rules do not compile.
    #[error("cannot compile the seccomp filter")]
    Compile(#[source] seccompiler::BackendError),
    /// The kernel refuses.
    #[error("cannot install the seccomp filter: the kernel needs CONFIG_SECCOMP_FILTER")]
    Install(#[source] seccompiler::Error),
}

/// Compiles the filter of `role` for the process `pid`, which is the calling one.
///
/// # Errors
/// [`FilterError::Compile`] if a rule contradicts itself; a test excludes it.
pub fn compile(role: ThreadRole, pid: u32) -> Result<BpfProgram, FilterError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules::of(role) {
        let alternatives = calls.entry(rule.syscall).or_default();
        // A call without conditions has no alternatives: an empty list means that it is always allowed.
        if !rule.checks.is_empty() {
            alternatives.push(compile_rule(rule, pid).map_err(FilterError::Compile)?);
        }
    }
    SeccompFilter::new(
        calls,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(BpfProgram::try_from)
    .map_err(FilterError::Compile)
}

fn compile_rule(rule: &Rule, pid: u32) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions = rule.checks.iter().map(|check| {
        let (argument, operator, value) = match *check {
            Check::Is(argument, value) => (argument, SeccompCmpOp::Eq, u64::from(value)),
            Check::IsProcess(argument) => (argument, SeccompCmpOp::Eq, u64::from(pid)),
            Check::Without(argument, bits) => {
                let bits = u64::from(bits);
                (argument, SeccompCmpOp::MaskedEq(bits), 0)
            }
        };
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
    });
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

/// Confines the calling thread to what `role` needs, for ever.
///
/// # Errors
/// [`FilterError`]; the thread is then not confined and must not go on.
pub fn install(role: ThreadRole) -> Result<(), FilterError> {
    let program = compile(role, std::process::id())?;
    seccompiler::apply_filter(&program).map_err(FilterError::Install)
}

/// Confines all threads of the process to what `role` needs, for ever.
///
/// # Errors
/// [`FilterError`]; the process is then not confined and must not go on.
pub fn install_in_all_threads(role: ThreadRole) -> Result<(), FilterError> {
    let program = compile(role, std::process::id())?;
    seccompiler::apply_filter_all_threads(&program).map_err(FilterError::Install)
}
