// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! File system device (virtio v1.3 §5.11), whose queues another process serves over vhost-user.
//!
//! ```text
//!   guest ── kick (ioeventfd) ────────────────────> file server ── reads and writes guest memory
//!     ^                                                  │ call (eventfd)
//!     └── InterruptStatus, irqfd <── FsWorker <──────────┘
//! ```
//! Nothing of FUSE is parsed here. The worker passes interrupts on, because virtio-mmio has a register for them, and
//! notices when the server goes.
//!
//! The server is another process, jailed and not trusted with anything but this guest's memory, which it has: every wait
//! for it has a deadline, every answer is checked, and whatever it does wrong ends in DEVICE_NEEDS_RESET and in a report to
//! [`FsOptions::on_loss`]. Linux does not recover a file system whose device needs a reset, so whoever hears of it
//! ends the VM.
//!
//! One request queue and the high-priority queue; no DAX window, no notification queue.

mod device;
mod front_end;
mod metrics;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Fs, FsOptions, FsState};
pub use metrics::FsMetrics;
