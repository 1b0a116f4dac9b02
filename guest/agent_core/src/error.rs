// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why the agent did not do what it was asked.

use std::io;

/// An error of the agent. [`Self::code`] says what the caller can make of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing here has this name.
    #[error("{what} {id} is not known to the guest")]
    NotFound {
        /// "container", "exec" or "process".
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// The name is taken.
    #[error("{what} {id} exists already in the guest")]
    AlreadyExists {
        /// "container" or "exec".
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// The state does not allow it.
    #[error("{what} {id} {state}")]
    WrongState {
        /// "container" or "sandbox".
        what: &'static str,
        /// Its name.
        id: String,
        /// What it is instead.
        state: &'static str,
    },
    /// A request that no host of this release sends.
    #[error("{field}: {problem}")]
    BadRequest {
        /// The field of the request.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The container's process could not be made.
    #[error("{text}")]
    Process {
        /// The whole chain of causes, for people.
        text: String,
        /// Whether the spec is at fault.
        spec: bool,
    },
    /// A resource of the spec cannot be applied.
    #[error("linux.resources.{field} cannot be applied in the guest: {problem}")]
    Resource {
        /// The field below `linux.resources`.
        field: String,
        /// Why.
        problem: String,
    },
    /// No disk with this serial number showed up.
    #[error("the disk {serial} has not appeared in the guest within {seconds} s: is it attached?")]
    NoDisk {
        /// The serial number.
        serial: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// There is no such network card.
    #[error(
        "the guest has no network card for the pod's interface {0}: its MAC address is not there"
    )]
    NoCard(String),
    /// A step failed in the kernel.
    #[error("{step}")]
    Step {
        /// The operation and its object.
        step: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A worker of the agent has gone.
    #[error("the agent gave up while {0}")]
    Internal(&'static str),
}

/// What a caller can make of an error; these become ttrpc codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// There is no such thing.
    NotFound,
    /// There is one already.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// The request or spec is wrong.
    InvalidArgument,
    /// The guest failed.
    Internal,
}

impl Error {
    /// The error's kind.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::AlreadyExists { .. } => Code::AlreadyExists,
            Self::WrongState { .. } => Code::FailedPrecondition,
            Self::BadRequest { .. } | Self::Resource { .. } | Self::Process { spec: true, .. } => {
                Code::InvalidArgument
            }
            Self::Process { .. }
            | Self::NoDisk { .. }
            | Self::NoCard(_)
            | Self::Step { .. }
            | Self::Internal(_) => Code::Internal,
        }
    }

    /// The error and its causes on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }

    pub(crate) fn bad(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::BadRequest {
            field: field.into(),
            problem: problem.into(),
        }
    }

    pub(crate) fn resource(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Resource {
            field: field.into(),
            problem: problem.into(),
        }
    }
}

impl From<oci_process::Error> for Error {
    fn from(error: oci_process::Error) -> Self {
        let spec = matches!(
            error,
            oci_process::Error::Unsupported { .. } | oci_process::Error::Invalid { .. }
        );
        Self::Process {
            text: error.chain(),
            spec,
        }
    }
}

/// Names the step that a result belongs to.
pub(crate) trait Context<T> {
    /// The operation and its object, for people.
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Step {
            step: step(),
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_each_cause_once() {
        let error = Error::Step {
            step: "mounting the disk c1".to_owned(),
            source: io::Error::from_raw_os_error(libc::EIO),
        };
        assert_eq!(error.to_string(), "mounting the disk c1");
        assert_eq!(
            error.chain(),
            "mounting the disk c1: Input/output error (os error 5)"
        );
        assert_eq!(error.code(), Code::Internal);
    }
}
