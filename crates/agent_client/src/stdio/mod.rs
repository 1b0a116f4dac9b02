// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A process's standard streams: between the guest's sockets and what containerd names.

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
