// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What can go wrong with a file server.

use std::io;
use std::path::PathBuf;

use crate::{MAX_SHARES, ShareName};

/// An error of the file server.
#[derive(Debug, thiserror::Error)]
pub enum FileServerError {
    /// The program cannot be started.
    #[error("cannot start {}: check that it is installed", program.display())]
    Start {
        /// Which program.
        program: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It ended, or said nothing, before it was ready.
    #[error("the file server did not become ready: {reason}")]
    NotReady {
        /// Its last words, or how long it was waited for.
        reason: String,
    },
    /// A name that no folder of the root can have.
    #[error(
        "{name:?} cannot name a shared directory: 1 to 64 of a-z, A-Z, 0-9, '-', '_', and '.' but not first"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The pod has a directory of that name.
    #[error("a shared directory named {name} is there already")]
    Exists {
        /// The name.
        name: ShareName,
    },
    /// Too many directories.
    #[error("a pod can share at most {MAX_SHARES} host directories: use fewer volumes")]
    TooMany,
    /// What is to be shared is neither a directory nor a regular file.
    #[error(
        "{name} is neither a directory nor a regular file: sockets, pipes and devices of the host are not shared with a VM"
    )]
    Kind {
        /// Its name.
        name: ShareName,
    },
    /// A mount could not be made or removed.
    #[error("cannot {operation} for the shared directory {name}")]
    Mount {
        /// What was tried.
        operation: &'static str,
        /// For which one.
        name: ShareName,
        /// What the host said.
        source: io::Error,
    },
}
