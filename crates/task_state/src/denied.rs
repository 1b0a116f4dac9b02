// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why the state of things forbids a request.

use ids::ContainerId;

use crate::process::ProcessId;

/// A refusal. [`Denied::code`] says which of containerd's codes it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Nothing has that name.
    #[error("{0} does not exist")]
    NotFound(ProcessId),
    /// Nothing to signal any more.
    #[error("{0}: process already finished")]
    Finished(ProcessId),
    /// The name is in use.
    #[error("{0} exists already")]
    AlreadyExists(ProcessId),
    /// Only once.
    #[error("{0} was started before")]
    AlreadyStarted(ProcessId),
    /// Not yet.
    #[error("{0} was not started yet")]
    NotStarted(ProcessId),
    /// Too early.
    #[error("{0} still runs: stop it first")]
    StillRuns(ProcessId),
    /// An exec needs a living init.
    #[error("container {0} does not run")]
    InitNotRunning(ContainerId),
    /// What is frozen does nothing.
    #[error("container {0} is paused: resume it first")]
    Paused(ContainerId),
    /// There is nothing to resume.
    #[error("container {0} is not paused")]
    NotPaused(ContainerId),
    /// The pod's VM is no process in itself.
    #[error(
        "container {0} is the pod's sandbox and has no process of its own: ask for the pod's containers one by one"
    )]
    NoProcess(ContainerId),
    /// It was killed or deleted while it was being made or started.
    #[error("{0} was stopped before it could start")]
    Interrupted(ProcessId),
    /// Linux has 64 signals.
    #[error("signal {0} does not exist: signals are 1 to 64")]
    InvalidSignal(u32),
    /// No VM, no processes.
    #[error("{0}: the sandbox's VM has ended")]
    VmGone(ProcessId),
}

/// The codes of containerd that a refusal can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeniedCode {
    /// `NOT_FOUND`
    NotFound,
    /// `ALREADY_EXISTS`
    AlreadyExists,
    /// `FAILED_PRECONDITION`
    FailedPrecondition,
    /// `INVALID_ARGUMENT`
    InvalidArgument,
    /// `ABORTED`
    Aborted,
    /// `UNAVAILABLE`
    Unavailable,
}

impl Denied {
    /// containerd's code for this refusal.
    pub fn code(&self) -> DeniedCode {
        match self {
            Self::NotFound(_) | Self::Finished(_) => DeniedCode::NotFound,
            Self::AlreadyExists(_) => DeniedCode::AlreadyExists,
            Self::AlreadyStarted(_)
            | Self::NotStarted(_)
            | Self::StillRuns(_)
            | Self::InitNotRunning(_)
            | Self::Paused(_)
            | Self::NotPaused(_)
            | Self::NoProcess(_) => DeniedCode::FailedPrecondition,
            Self::Interrupted(_) => DeniedCode::Aborted,
            Self::InvalidSignal(_) => DeniedCode::InvalidArgument,
            Self::VmGone(_) => DeniedCode::Unavailable,
        }
    }
}
