// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a driver could not do what it was asked.

use std::error::Error;

/// What a caller decides by. Matched exhaustively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverErrorKind {
    /// The node cannot run VMs: no KVM, or one that cannot run a guest.
    Node,
    /// The kernel or the initramfs is missing or not one.
    Artifact,
    /// The spec asks for something that no VM of this driver has.
    Unsupported,
    /// A slot, descriptor or memory has run out.
    Exhausted,
    /// The thing is there already.
    Conflict,
    /// Nobody listens on the port.
    Refused,
    /// No answer within the call's deadline.
    Timeout,
    /// The VM has ended.
    Gone,
    /// Anything else: the message tells.
    Failed,
}

/// A driver's failure: the kind for the caller, the message for the operator, the source for the developer.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct DriverError {
    kind: DriverErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl DriverError {
    /// An error without a cause of its own. `message` says what was tried, on what, and what to do about it.
    pub fn new(kind: DriverErrorKind, message: impl Into<String>) -> Self {
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

    /// What a caller decides by.
    pub fn kind(&self) -> DriverErrorKind {
        self.kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_leaves_the_cause_to_the_chain() {
        let error = DriverError::new(DriverErrorKind::Node, "open /dev/kvm: load the kvm module")
            .because(std::io::Error::from(std::io::ErrorKind::NotFound));
        assert_eq!(error.to_string(), "open /dev/kvm: load the kvm module");
        assert_eq!(error.source().unwrap().to_string(), "entity not found");
        assert_eq!(error.kind(), DriverErrorKind::Node);
    }
}
