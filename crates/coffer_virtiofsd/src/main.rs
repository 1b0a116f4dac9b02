// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `coffer-virtiofsd`: serves a pod's shared directories over vhost-user, in a process that sees nothing else.
//!
//! Started by the shim (crate `file_server`) in a PID namespace of its own, with one socket as standard input. It
//! builds its jail, and says that it is ready by sending the vhost-user connection through that socket, one byte and one
//! descriptor. The directories come later: the shim mounts them into this process's mount namespace, which it itself may
//! not change.
//!
//! The file system is the `virtiofsd` crate's, used as a library; jail, capabilities and system call filter are ours.
//!
//! It ends with code 0 when the VMM closes the connection, and at once when the shim dies. What a guest sends reaches
//! only the crate's parser; a request that it cannot parse ends the process, which is the end of that guest's pod.

mod jail;
mod serve;

use std::error::Error;
use std::io;
use std::process::exit;

use rustix::net::SocketType;

/// Not started by a shim.
const EXIT_USAGE: i32 = 2;
/// Anything that failed; standard error tells.
const EXIT_FAILED: i32 = 1;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
enum ServerError {
    /// A step of the jail.
    #[error("jail: cannot {step}: the file server does not run outside its jail")]
    Jail {
        /// Which step.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The file system or its connection.
    #[error("file server: cannot {operation}")]
    Serve {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl ServerError {
    fn serve<E: Into<Box<dyn Error + Send + Sync>>>(
        operation: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Serve {
            operation,
            source: source.into(),
        }
    }
}

fn main() {
    if rustix::net::sockopt::socket_type(io::stdin()) != Ok(SocketType::SEQPACKET) {
        eprintln!(
            "coffer-virtiofsd is started by containerd-shim-coffer-v2, with a socket as standard input"
        );
        exit(EXIT_USAGE);
    }
    if let Err(error) = jail::enter().and_then(serve::serve) {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        eprintln!("{text}");
        exit(EXIT_FAILED);
    }
}
