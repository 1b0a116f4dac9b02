// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What can go wrong between a spec and its process.

use std::io;

/// Why a process was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec asks for something that this guest does not do. Nothing is dropped in silence.
    #[error("{field}: {hint}")]
    Unsupported {
        /// The field of the spec.
        field: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The spec contradicts itself or the OCI runtime specification.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field of the spec.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The program to run cannot be run; worded as runc does, because kubelet and people look for these words.
    #[error("exec: {name:?}: {problem}")]
    Executable {
        /// `process.args[0]`.
        name: String,
        /// runc's words for it.
        problem: String,
    },
    /// A step failed in the kernel.
    #[error("{step}")]
    Step {
        /// The operation and its object.
        step: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The seccomp profile cannot be made into a filter.
    #[error("{step}")]
    Seccomp {
        /// What was being added.
        step: String,
        /// libseccomp's answer.
        #[source]
        source: libseccomp::error::SeccompError,
    },
    /// A hook ended with an error or took too long.
    #[error("{name} hook {path}: {problem}")]
    Hook {
        /// The kind of hook.
        name: &'static str,
        /// The hook's program.
        path: String,
        /// How it ended.
        problem: String,
    },
    /// The child process said why it failed: its own error with all causes.
    #[error("{0}")]
    Child(String),
    /// The child process ended without a word.
    #[error("the process ended while {0}; the guest's console may say why")]
    Vanished(&'static str),
    /// A message between the agent and the child is not what it should be.
    #[error("the agent and its child process disagree about {0}")]
    Protocol(&'static str),
}

impl Error {
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

    pub(crate) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            problem: problem.into(),
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
