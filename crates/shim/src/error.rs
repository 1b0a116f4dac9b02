// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a verb failed. containerd shows the text to the user.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use ids::SandboxId;

use crate::bootstrap::{NotARequest, OptionsError};
use crate::host_cgroup::CgroupError;

/// What a verb of the shim could not do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    /// Standard input could not be read.
    #[error("read standard input")]
    Input(#[source] io::Error),
    /// Standard input is not what containerd says.
    #[error(transparent)]
    Request(#[from] NotARequest),
    /// The runtime options are not Coffer's.
    #[error("runtime options")]
    Options(#[from] OptionsError),
    /// The node's config cannot be used.
    #[error("config file {path}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The bundle cannot be used.
    #[error("bundle {path}")]
    Bundle {
        /// The bundle.
        path: PathBuf,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A member's sandbox is not there.
    #[error(
        "sandbox {0} has no shim: its VM has ended, or container {0} was never started; start the pod anew"
    )]
    NoSandbox(SandboxId),
    /// Two containerds have given out the same id.
    #[error("sandbox {0} of another containerd runs on this node: use another id or namespace")]
    OtherContainerd(SandboxId),
    /// The pod cannot be put into its cgroup.
    #[error("host cgroup")]
    Cgroup(#[from] CgroupError),
    /// Something is left in the pod's network namespace.
    #[error("release the pod's network")]
    Network(#[source] pod_network::NetError),
    /// A file operation failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The program could not be run as the shim.
    #[error("start the shim process")]
    Spawn(#[source] io::Error),
    /// Somebody called `serve` by hand.
    #[error("standard input is no socket of start: serve is called by start, never by hand")]
    NotStarted,
    /// `start` was killed before the sandbox had a socket.
    #[error("start has died: nothing is served")]
    StartDied,
    /// A reply could not be written.
    #[error("write the reply")]
    Output(#[source] io::Error),
    /// The runtime of the server could not be set up.
    #[error("set up the server")]
    Server(#[source] Box<dyn Error + Send + Sync>),
    /// The node cannot run pods as it is set up.
    #[error("prepare the node")]
    Node(#[source] Box<dyn Error + Send + Sync>),
}

impl ShimError {
    pub(crate) fn file(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            operation,
            path,
            source,
        }
    }
}

/// An error with its causes on one line: "what failed: why: why that".
pub(crate) fn report(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_names_operation_object_and_cause_once() {
        let error =
            ShimError::file("write", "/b/address")(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(report(&error), "write /b/address: no storage space");
        let error = ShimError::from(OptionsError::Body);
        assert!(
            report(&error).starts_with("runtime options: the runtime options hold a config body")
        );
    }
}
