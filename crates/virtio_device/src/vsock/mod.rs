// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Socket device (virtio v1.3 §5.10): stream connections between the guest and processes on the host.
//!
//! # Hybrid vsock
//! The host needs no vsock of its own: its end of each connection is a unix stream socket.
//! - Host to guest: a process connects to the listening socket and writes `CONNECT <port>\n`. It gets `OK <port>\n` once
//!   the guest has accepted, with the port that stands for it, or its socket is closed. It may write data behind the
//!   line at once.
//! - Guest to host: only ports on the allow-list; [`HostPorts`] gives a connected socket for each request.
//!
//! # Parts
//! ```text
//!  wire header      virtio_wire::vsock    bytes -> Packet or Rejection                pure
//!  credit.rs        flow control          both ways, modulo 2^32                      pure
//!  connection.rs    one connection        step(input) -> effects                      pure
//!  table.rs         ids with a generation                                             pure
//!  stream.rs        one connection and its socket: effects -> system calls
//!  muxer.rs         all of them: routing and bounds
//!    callers.rs       what host processes do to it
//!    turns.rs         who speaks to the guest next
//!  host.rs          epoll, listener, opening line
//!  worker.rs        the three queues          device.rs: registers, save and restore
//! ```
//!
//! # Bounds
//! [`MAX_CONNECTIONS`] connections; [`LARGE_WINDOW`] bytes wait for the host in each of [`LARGE_WINDOWS`] of them and
//! [`SMALL_WINDOW`] in each other; nothing waits for the guest but one packet's worth of flags per connection and
//! [`MAX_PENDING_RESETS`] resets. A connection needs one descriptor.
//!
//! # Pause, save, restore
//! Connections live through a pause, whose time does not count for their deadlines. They do not live through a
//! restore: the restored guest gets a TRANSPORT_RESET event (§5.10.6.7), and no packet before it has
//! taken the event in, since the reset would take a new connection down too.
//!
//! # Not offered
//! SEQPACKET: nothing here uses it. No feature bit for streams: none negotiated means streams (§5.10.3).

mod callers;
mod connection;
mod credit;
mod device;
mod dump;
mod host;
mod metrics;
mod muxer;
mod stream;
mod table;
mod turns;
mod worker;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use connection::{Abort, CLOSE_TIMEOUT, CONNECT_TIMEOUT, Connection, Effects, Input, Phase};
pub use credit::{CreditViolation, ReceiveWindow, SendCredit};
pub use device::{Clock, Vsock, VsockHandle, VsockOptions, VsockState};
pub use dump::{ConnectionDump, VsockDump};
pub use host::HostPorts;
pub use metrics::VsockMetrics;

/// Most connections at a time, those that have only begun or only drain included. Others of this kind allow 1,023; a
/// container uses four (three streams and its exit), so this is room for some 250 containers and execs.
pub const MAX_CONNECTIONS: usize = 1024;

/// Receive buffer of a connection while fewer than [`LARGE_WINDOWS`] have one, in bytes: four packets of the largest
/// size, and Linux' own default.
pub const LARGE_WINDOW: u32 = 256 * 1024;

/// How many connections have a large window at a time: together 16 MiB if the host reads none of them.
pub const LARGE_WINDOWS: usize = 64;

/// Receive buffer of every further connection, in bytes: together 30 MiB.
pub const SMALL_WINDOW: u32 = 32 * 1024;

/// Most resets that wait for the guest to make room; only a guest that does not read loses any.
pub const MAX_PENDING_RESETS: usize = 1024;

/// Most buffers of the guest that one stream fills in its turn: 64 KiB in buffers of the size that Linux posts. Reading
/// into all of them at once was measured to be twice as fast as one at a time.
const MAX_TURN_PACKETS: usize = 16;

/// How long a host process may take to say what it wants.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(20);

/// Entries of the receive and transmit queues. Linux fills the receive queue with buffers of 4 KiB plus header, 8 KiB of
/// memory each, so that 256 (the usual size) would cost an idle guest another MiB.
const DATA_QUEUE_SIZE: u16 = 128;

/// Entries of the event queue; Linux keeps 8 buffers there.
const EVENT_QUEUE_SIZE: u16 = 16;

/// Largest chain: a header and the largest payload, with room to spare for drivers that post larger buffers.
const MAX_CHAIN_BYTES: u32 = 1 << 20;

/// Index of the queue for packets to the guest (virtio v1.3 §5.10.2).
const QUEUE_TO_GUEST: u16 = 0;
/// Index of the queue for packets to the host.
const QUEUE_TO_HOST: u16 = 1;
/// Index of the event queue.
const QUEUE_EVENTS: u16 = 2;
