// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Versioned messages between the shim and the guest agent, and the stdio stream header.
//!
//! Three kinds of connections cross the border between host and guest:
//!
//! | what | port | opened by | form |
//! |---|---|---|---|
//! | control | [`CONTROL_PORT`] | the guest, when it is ready | one [`api::Hello`] frame ([`hello`]), then ttrpc with the guest as server |
//! | stdio | [`STDIO_PORT`] | the host, one connection a stream | one [`StreamHeader`], then raw bytes |
//! | forwarded ports | [`FORWARD_PORT`] | the host, one connection a TCP connection | the crate `port_forward` |
//!
//! Raw bytes carry no frames, so that each end can splice. How many there are is said on the control connection:
//! [`api::StreamEnded`] for output, [`api::CloseStdinRequest`] for input. Nobody has to trust a half-close.
//!
//! The host opens the streams of a process once `CreateContainer` or `StartExec` has answered; until then, output stays
//! in the agent's pipes, and a process that has ended keeps its output until the host has it or removes the container.
#![forbid(unsafe_code)]

use ids::VsockPort;

pub mod hello;
pub mod layout;
pub mod stats;
mod stream_header;

pub use stream_header::{HeaderError, MAX_HEADER_LEN, ProcessKey, StreamHeader, StreamKind};

/// The version of everything in this crate. Host and guest come from one release, so a difference is refused.
pub const PROTOCOL_VERSION: u32 = 1;

/// The host port that the agent dials when it is ready.
pub const CONTROL_PORT: VsockPort = VsockPort(1024);

/// The guest port on which the agent accepts stdio streams.
pub const STDIO_PORT: VsockPort = VsockPort(1025);

/// The guest port on which the agent accepts TCP connections for the pod's loopback.
pub const FORWARD_PORT: VsockPort = VsockPort(1026);

/// How long [`api::NextEventsRequest`] waits for an event before it is answered with none.
pub const NEXT_EVENTS_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

/// The most events in one answer to `NextEvents`; the agent keeps the rest for the next.
pub const MAX_EVENTS: usize = 512;

/// The longest answer to any call, in bytes: the host refuses a longer one before it decodes it. [`MAX_EVENTS`] events
/// with the longest ids take less than 100 KiB.
pub const MAX_ANSWER_LEN: usize = 128 << 10;

/// The most bytes of a file in one answer to `ReadCopiedFile`.
pub const MAX_FILE_END_LEN: usize = 64 << 10;

pub use agent as api;

/// Messages of `proto/agent.proto`; the service's code wants this name for them.
#[expect(
    missing_docs,
    nonstandard_style,
    unused_mut,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The ttrpc service of `proto/agent.proto`.
#[expect(
    missing_docs,
    unused_imports,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod service {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}
