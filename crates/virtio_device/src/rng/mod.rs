// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Entropy device (virtio v1.3 §5.4): the host kernel's random numbers.
//!
//! Invariants:
//! - One request gets at most [`MAX_REQUEST_BYTES`], however large its buffers are (§5.4.6.2 lets
//!   the device give fewer).
//! - The device keeps no random bytes: each come from the host's kernel when asked for, so two pods
//!   started from one snapshot differ.

mod device;
mod metrics;
mod source;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Rng, RngState};
pub use metrics::RngMetrics;
pub use source::{EntropySource, HostEntropy};

/// Bytes given to one request: what a driver asks for is far below.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// Entries of the request queue.
const QUEUE_SIZE: u16 = 64;
