// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block, net, fs, vsock, rng, console and balloon over guest memory; knows neither KVM nor the transport.
//!
//! # The two halves of a device
//! ```text
//!   transport (vCPU threads)              I/O thread (epoll loop)
//!   ────────────────────────              ───────────────────────
//!   VirtioDevice  ── activate ──────────> Box<dyn Worker>, one or more
//!     config space, features, save          queues, descriptors of its own
//!            └───── Arc<shared state> ──────────┘
//! ```
//! [`VirtioDevice`] answers the transport: identity, features, configuration space, state. It never
//! touches a ring. [`Worker`] is what activation makes: it owns queues and serves them on whichever
//! thread runs it. A worker is moved to that thread, is only ever called from there, and is taken
//! back to pause or reset. What both halves need (the balloon's target, the console's ring buffer,
//! counters) they share behind an `Arc`.
//!
//! # What a guest can and cannot do
//! Everything in guest memory is hostile. A queue whose rings or chains break the rules makes
//! [`Worker::handle`] fail: the transport then sets `DEVICE_NEEDS_RESET` (virtio v1.3 §2.1.2) and
//! drops the worker. One wake does at most [`MAX_CHAINS_PER_WAKE`] chains and about
//! [`MAX_BYTES_PER_WAKE`] bytes; then the worker says [`Progress::More`] and others get their turn.
//!
//! # Memory
//! Devices are generic over [`GuestSpace`], so that tests, fuzz targets and checkers bring their own.

pub mod balloon;
pub mod block;
mod buffers;
mod chain;
pub mod console;
mod device;
mod error;
pub mod fs;
mod guest_io;
mod interrupt;
mod limiter;
mod metrics;
pub mod net;
mod queue;
pub mod rng;
mod state;
#[cfg(test)]
mod testing;
pub mod vsock;
mod worker;

pub use buffers::{Buffers, Segment};
pub use chain::Chain;
pub use device::{Activation, GuestSpace, VirtioDevice};
pub use error::{ChainFault, DeviceError};
pub use guest_io::{Direction, IoSlices};
pub use interrupt::Interrupt;
pub use limiter::{Bucket, Limiter};
pub use metrics::Counter;
pub use queue::{MAX_BYTES_PER_WAKE, MAX_CHAINS_PER_WAKE, MAX_QUEUE_SIZE, Queue, QueueState};
pub use state::DeviceState;
pub use worker::{Event, Progress, Worker};
