// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A sandbox's failures as containerd reads them: a gRPC code, and a text that goes to the user unchanged.

use sandbox::{SandboxError, SandboxErrorKind};
use ttrpc::{Code, Error, get_status};

/// The answer to a call that failed with `error`. containerd decides by the code: `NOT_FOUND` is "gone", and so on
/// (containerd's errdefs).
pub fn to_status(error: &SandboxError) -> Error {
    status(code(error.kind()), error.report())
}

/// An answer that says why a call was refused.
pub(crate) fn status(code: Code, text: impl Into<String>) -> Error {
    Error::RpcStatus(get_status(code, text.into()))
}

fn code(kind: SandboxErrorKind) -> Code {
    match kind {
        SandboxErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        SandboxErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        SandboxErrorKind::NotFound => Code::NOT_FOUND,
        SandboxErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        SandboxErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        SandboxErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        SandboxErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        SandboxErrorKind::Aborted => Code::ABORTED,
        SandboxErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        SandboxErrorKind::Internal => Code::INTERNAL,
        SandboxErrorKind::Unavailable => Code::UNAVAILABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// gRPC's numbers, which containerd's errdefs maps back.
    #[test]
    fn every_kind_has_its_grpc_code_and_the_whole_text() {
        let cases = [
            (SandboxErrorKind::InvalidArgument, 3),
            (SandboxErrorKind::DeadlineExceeded, 4),
            (SandboxErrorKind::NotFound, 5),
            (SandboxErrorKind::AlreadyExists, 6),
            (SandboxErrorKind::PermissionDenied, 7),
            (SandboxErrorKind::ResourceExhausted, 8),
            (SandboxErrorKind::FailedPrecondition, 9),
            (SandboxErrorKind::Aborted, 10),
            (SandboxErrorKind::Unimplemented, 12),
            (SandboxErrorKind::Internal, 13),
            (SandboxErrorKind::Unavailable, 14),
        ];
        for (kind, number) in cases {
            let error = SandboxError::new(kind, "what failed").because("why");
            let Error::RpcStatus(status) = to_status(&error) else {
                panic!("{kind:?}")
            };
            assert_eq!(status.code.value(), number, "{kind:?}");
            assert_eq!(status.message, "what failed: why");
        }
    }
}
