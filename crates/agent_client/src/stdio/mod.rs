// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A process's standard streams: between the guest's sockets and what containerd names.
//!
//! # Order
//! 1. [`HostStdio::open`] opens containerd's ends, before anything is asked of the guest.
//! 2. [`HostStdio::connect`] opens the guest's ends, once the process exists there, and starts a pump for each stream.
//! 3. An output stream ends when as many bytes as the guest announced were passed on ([`Streams::ended`]), or with its
//!    connection. Its FIFO is closed then, so that containerd's reader sees the end; where there is no reader, because
//!    containerd restarts, it is kept until there is one, or the streams are dropped.
//! 4. Stdin is read from the process's start on ([`Streams::begin_stdin`]). It ends when both the client's and our hold
//!    on the FIFO are gone ([`Streams::close_stdin`]); the guest is then told how many bytes there were.
//!
//! Dropping the [`Streams`] stops every pump and closes everything.

mod fifo;
mod open;
mod pump;
mod streams;
#[cfg(test)]
mod tests;

use async_trait::async_trait;
use ids::VsockPort;
use tokio::net::UnixStream;

pub use open::{HostStdio, StdioError};
pub use streams::Streams;

/// Where containerd wants a process's streams, as Create and Exec carry it: a FIFO's path, a `file://` URI, or empty for
/// none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StdioPaths {
    /// Whether the process has a terminal; stdout then carries it all, and `stderr` is not used.
    pub terminal: bool,
    /// Host to guest.
    pub stdin: String,
    /// Guest to host.
    pub stdout: String,
    /// Guest to host.
    pub stderr: String,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TerminalSize {
    /// Characters in a line.
    pub columns: u32,
    /// Lines.
    pub rows: u32,
}

/// Connects to ports of the guest. Every call has a deadline of its own.
#[async_trait]
pub trait StreamConnector: Send + Sync {
    /// A new connection to `port`.
    ///
    /// # Errors
    /// Why there is none.
    async fn connect(&self, port: VsockPort) -> std::io::Result<UnixStream>;
}
