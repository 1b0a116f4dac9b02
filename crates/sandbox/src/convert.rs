// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Other crates' errors in the kinds that containerd knows.

use agent_client::{AgentCode, AgentError, StdioError};
use hypervisor::{DriverError, DriverErrorKind};
use task_state::{Denied, DeniedCode};

use crate::error::{SandboxError, SandboxErrorKind as Kind};

/// What the agent could not do. `NotFound` is kept: it says that a process has ended.
pub(crate) fn agent(what: impl Into<String>, error: AgentError) -> SandboxError {
    let kind = match &error {
        AgentError::Refused { code, .. } => match code {
            AgentCode::InvalidArgument => Kind::InvalidArgument,
            AgentCode::DeadlineExceeded => Kind::DeadlineExceeded,
            AgentCode::NotFound => Kind::NotFound,
            AgentCode::PermissionDenied => Kind::PermissionDenied,
            AgentCode::ResourceExhausted => Kind::ResourceExhausted,
            AgentCode::FailedPrecondition => Kind::FailedPrecondition,
            AgentCode::Unimplemented => Kind::Unimplemented,
            AgentCode::AlreadyExists | AgentCode::Internal => Kind::Internal,
        },
        AgentError::HelloTimeout(_) | AgentError::Timeout { .. } => Kind::DeadlineExceeded,
        AgentError::RequestTooLong { .. } => Kind::InvalidArgument,
        AgentError::HelloRead(_) | AgentError::Disconnected { .. } => Kind::Unavailable,
        AgentError::Hello(_) | AgentError::Protocol { .. } => Kind::Internal,
    };
    SandboxError::new(kind, what).because(error)
}

/// What the agent could not do to make or start a process. That a program or file is not found there must not look as if
/// the task were not there: containerd would take it for gone.
pub(crate) fn agent_start(what: impl Into<String>, error: AgentError) -> SandboxError {
    let error = agent(what, error);
    match error.kind() {
        Kind::NotFound => error.of_kind(Kind::InvalidArgument),
        _ => error,
    }
}

/// What the driver could not do.
pub(crate) fn driver(what: impl Into<String>, error: DriverError) -> SandboxError {
    let kind = match error.kind() {
        DriverErrorKind::Node | DriverErrorKind::Artifact => Kind::FailedPrecondition,
        DriverErrorKind::Unsupported => Kind::Unimplemented,
        DriverErrorKind::Exhausted => Kind::ResourceExhausted,
        DriverErrorKind::Timeout => Kind::DeadlineExceeded,
        DriverErrorKind::Refused | DriverErrorKind::Gone => Kind::Unavailable,
        DriverErrorKind::Conflict | DriverErrorKind::Failed => Kind::Internal,
    };
    SandboxError::new(kind, what).because(error)
}

/// A stream that cannot be.
pub(crate) fn stdio(what: impl Into<String>, error: StdioError) -> SandboxError {
    let kind = match &error {
        StdioError::Scheme { .. } => Kind::Unimplemented,
        StdioError::NotFifo { .. } | StdioError::Open { .. } => Kind::InvalidArgument,
        StdioError::Connect { .. } => Kind::Unavailable,
    };
    SandboxError::new(kind, what).because(error)
}

/// A refusal of the task table's.
pub(crate) fn denied(denied: &Denied) -> SandboxError {
    let kind = match denied.code() {
        DeniedCode::NotFound => Kind::NotFound,
        DeniedCode::AlreadyExists => Kind::AlreadyExists,
        DeniedCode::FailedPrecondition => Kind::FailedPrecondition,
        DeniedCode::InvalidArgument => Kind::InvalidArgument,
        DeniedCode::Aborted => Kind::Aborted,
        DeniedCode::Unavailable => Kind::Unavailable,
    };
    SandboxError::new(kind, denied.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: AgentCode) -> AgentError {
        AgentError::Refused {
            method: "StartContainer",
            code,
            message: "exec: \"nope\": not found".to_owned(),
        }
    }

    #[test]
    fn missing_program_does_not_look_like_a_missing_task() {
        let error = agent_start("start container c", refused(AgentCode::NotFound));
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert_eq!(
            error.report(),
            "start container c: exec: \"nope\": not found"
        );
        let error = agent("signal container c", refused(AgentCode::NotFound));
        assert_eq!(error.kind(), Kind::NotFound);
    }

    #[test]
    fn driver_kinds_keep_their_sense() {
        let error = driver(
            "attach a disk",
            DriverError::new(DriverErrorKind::Exhausted, "no slot is free"),
        );
        assert_eq!(error.kind(), Kind::ResourceExhausted);
    }
}
