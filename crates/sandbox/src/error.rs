// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a sandbox could not do what it was asked, in the kinds that containerd knows.

use std::error::Error;

/// What a caller decides by: each kind is one of containerd's gRPC codes, and the shim maps them one to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SandboxErrorKind {
    /// `INVALID_ARGUMENT`: the request or the bundle says something that cannot be.
    InvalidArgument,
    /// `DEADLINE_EXCEEDED`: guest or VMM did not answer in time.
    DeadlineExceeded,
    /// `NOT_FOUND`: no such task, or its process has ended.
    NotFound,
    /// `ALREADY_EXISTS`: the id is in use.
    AlreadyExists,
    /// `PERMISSION_DENIED`: the node's policy forbids it.
    PermissionDenied,
    /// `RESOURCE_EXHAUSTED`: slots, disk space or memory have run out.
    ResourceExhausted,
    /// `FAILED_PRECONDITION`: the task's state forbids it.
    FailedPrecondition,
    /// `ABORTED`: another request put an end to this one.
    Aborted,
    /// `UNIMPLEMENTED`: the spec asks for something that a VM cannot give.
    Unimplemented,
    /// `INTERNAL`: something here or in the guest is broken.
    Internal,
    /// `UNAVAILABLE`: the sandbox or its VM has ended.
    Unavailable,
}

/// A sandbox's failure: the kind for containerd, the message for the user, the source for the developer.
///
/// [`SandboxError::report`] gives the text that containerd passes to the user.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SandboxError {
    kind: SandboxErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl SandboxError {
    /// An error without a cause of its own. `message` says what was tried, on what, and what to do about it.
    pub fn new(kind: SandboxErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// The same, with its cause, which `message` does not repeat.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same, as another kind.
    pub(crate) fn of_kind(mut self, kind: SandboxErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// What a caller decides by.
    pub fn kind(&self) -> SandboxErrorKind {
        self.kind
    }

    /// The message with its causes, on one line: "what failed: why: why that".
    pub fn report(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_leaves_causes_to_the_report() {
        let error = SandboxError::new(SandboxErrorKind::Internal, "start the VM of pod p")
            .because(std::io::Error::from(std::io::ErrorKind::NotFound));
        assert_eq!(error.to_string(), "start the VM of pod p");
        assert_eq!(error.report(), "start the VM of pod p: entity not found");
    }
}
