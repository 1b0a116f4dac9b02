// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Console device (virtio v1.3 §5.3), one port.
//!
//! What the guest prints goes to [`ConsoleLog`]: the last [`TAIL_BYTES`] in memory (they end up in
//! the error of a pod that died) and, if the VMM has one, a file with a cap. Input comes from
//! [`ConsoleInput`]; nobody writes there unless a debugging command does.
//!
//! Invariants:
//! - Memory and file are bounded, whatever the guest prints; output is never refused, so a guest
//!   never blocks on it.
//! - A log file that fails costs the file, not the console.

mod device;
mod input;
mod log;
mod metrics;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Console, ConsoleState};
pub use input::ConsoleInput;
pub use log::{ConsoleLog, LogFile};
pub use metrics::ConsoleMetrics;

/// Bytes of output kept in memory.
pub const TAIL_BYTES: usize = 64 << 10;
/// Bytes of input kept until the guest takes them.
pub const INPUT_BYTES: usize = 4 << 10;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 64;
/// Bytes of one output request; drivers send pages.
const MAX_CHAIN_BYTES: u32 = 1 << 20;
