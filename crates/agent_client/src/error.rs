// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a call to the agent failed. The agent's own code survives.

use std::time::Duration;

use agent_proto::hello::HelloError;

/// The longest text of the guest's that goes into an error, in bytes.
const MAX_GUEST_TEXT: usize = 2048;

/// The codes with which the agent refuses; the numbers of gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AgentCode {
    /// 3
    InvalidArgument,
    /// 4
    DeadlineExceeded,
    /// 5
    NotFound,
    /// 6
    AlreadyExists,
    /// 7
    PermissionDenied,
    /// 8
    ResourceExhausted,
    /// 9
    FailedPrecondition,
    /// 12
    Unimplemented,
    /// 13, and every other.
    Internal,
}

impl From<ttrpc::Code> for AgentCode {
    fn from(code: ttrpc::Code) -> Self {
        match code {
            ttrpc::Code::INVALID_ARGUMENT => Self::InvalidArgument,
            ttrpc::Code::DEADLINE_EXCEEDED => Self::DeadlineExceeded,
            ttrpc::Code::NOT_FOUND => Self::NotFound,
            ttrpc::Code::ALREADY_EXISTS => Self::AlreadyExists,
            ttrpc::Code::PERMISSION_DENIED => Self::PermissionDenied,
            ttrpc::Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted,
            ttrpc::Code::FAILED_PRECONDITION => Self::FailedPrecondition,
            ttrpc::Code::UNIMPLEMENTED => Self::Unimplemented,
            _ => Self::Internal,
        }
    }
}

/// A call to the agent that failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The control connection broke before or during the hello.
    #[error("read the guest agent's hello")]
    HelloRead(#[source] std::io::Error),
    /// What the guest sent is no hello of this release.
    #[error("the guest agent's hello was refused")]
    Hello(#[source] HelloError),
    /// The guest connected and then said nothing.
    #[error("the guest agent connected and sent no hello within {0:?}")]
    HelloTimeout(Duration),
    /// The agent refused or failed. The text is the guest's, made printable and cut.
    #[error("{message}")]
    Refused {
        /// The call.
        method: &'static str,
        /// The agent's code.
        code: AgentCode,
        /// What the agent said.
        message: String,
    },
    /// No answer in time.
    #[error("the guest agent did not answer {method} within {after:?}")]
    Timeout {
        /// The call.
        method: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The connection to the agent is gone.
    #[error("the connection to the guest agent was lost during {method}")]
    Disconnected {
        /// The call.
        method: &'static str,
        /// What ttrpc says.
        #[source]
        source: ttrpc::Error,
    },
    /// The request cannot be sent, because it is too long.
    #[error("{method} is {len} bytes long, which is more than one message to the guest can hold")]
    RequestTooLong {
        /// The call.
        method: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// The guest breaks the protocol.
    #[error("the guest agent broke the protocol in its answer to {method}: {what}")]
    Protocol {
        /// The call.
        method: &'static str,
        /// How.
        what: String,
    },
}

impl AgentError {
    pub(crate) fn from_ttrpc(method: &'static str, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused {
                method,
                code: AgentCode::from(status.code()),
                message: printable(&status.message),
            },
            source => Self::Disconnected { method, source },
        }
    }

    pub(crate) fn protocol(method: &'static str, what: impl std::fmt::Display) -> Self {
        Self::Protocol {
            method,
            what: printable(&what.to_string()),
        }
    }

    /// The agent's code, if it was the agent that refused.
    pub fn code(&self) -> Option<AgentCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// A guest's text for an error or a log: cut, and without control characters.
fn printable(text: &str) -> String {
    let mut end = text.len().min(MAX_GUEST_TEXT);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    let cut = text.get(..end).unwrap_or_default();
    cut.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_text_is_cut_and_made_printable() {
        assert_eq!(printable("a\u{1b}[31m\nb"), "a [31m b");
        let long = "ä".repeat(MAX_GUEST_TEXT);
        assert_eq!(printable(&long).len(), MAX_GUEST_TEXT);
        assert_eq!(
            printable(&format!("x{long}")).len(),
            MAX_GUEST_TEXT - 1,
            "no half character"
        );
    }

    #[test]
    fn agent_code_survives() {
        let status = ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no such container");
        let error = AgentError::from_ttrpc("Signal", ttrpc::Error::RpcStatus(status));
        assert_eq!(error.code(), Some(AgentCode::NotFound));
        assert_eq!(error.to_string(), "no such container");
    }

    #[test]
    fn lost_connection_has_no_code() {
        let error = AgentError::from_ttrpc("Signal", ttrpc::Error::RemoteClosed);
        assert_eq!(error.code(), None);
        assert_eq!(
            error.to_string(),
            "the connection to the guest agent was lost during Signal"
        );
    }
}
