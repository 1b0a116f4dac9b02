// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Host end of the guest agent: handshake, calls, events and stdio streams.
//!
//! ```text
//! guest dials ──AgentClient::handshake──> AgentClient ── calls, each with a deadline
//!                                          └ EventReader ── long polls, ordered and without gaps
//! HostStdio::open (containerd's FIFOs) ──connect──> pumps; seen and steered through Streams
//! ForwardedPorts::serve ── each TCP connection to the pod's loopback becomes a connection to the guest
//! ```
//!
//! The guest is hostile: every answer has a cap before it is decoded, every text of the guest's is cut and made printable,
//! and no call waits longer than its deadline. One slow reader of one FIFO stops one stream: streams are connections of
//! their own, moved by splice(2) without a thread or a buffer of their own.

mod client;
mod error;
mod events;
mod forward;
mod stdio;
#[cfg(test)]
mod tests;

pub use client::{AgentClient, CallDeadlines, WaitingCall, wall_clock_ns};
pub use error::{AgentCode, AgentError};
pub use events::{AgentEvent, EventReader, parse_events};
pub use forward::ForwardedPorts;
pub use stdio::{HostStdio, StdioError, StdioPaths, StreamConnector, Streams, TerminalSize};
