// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Traditional memory balloon (virtio v1.3 §5.5): guest memory that is not in use goes back to the host.
//!
//! Two ways: free page reporting, by which the guest names free pages on its own (§5.5.6.7), and
//! the balloon proper, whose target the host sets through [`BalloonHandle`].
//!
//! Invariants:
//! - Only whole pages within guest memory are released, whatever page numbers the guest sends.
//! - `target` and `actual` are at most the guest's pages, so that no sum or difference with them can wrap.
//! - Deflating costs the host nothing: a page comes back when the guest touches it.

mod device;
mod metrics;
mod release;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Balloon, BalloonHandle, BalloonState};
pub use metrics::BalloonMetrics;
pub use release::{Backing, BackingSwitch, MemoryRelease, ReleasePages};

/// Entries of each queue; Linux wants at least 32 for reporting (`PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZE: u16 = 64;
/// Bytes of one inflate or deflate request: 4096 page numbers, sixteen times what Linux sends.
const MAX_PFN_BYTES: u32 = 16 << 10;
/// Queues shown to the driver. Reporting is queue 4 (§5.5.2); Linux up to at least 6.12 numbers
/// only the queues it uses, which makes it 2. Both work: of the queues from 2 on, the driver
/// enables only its reporting queue.
const QUEUES: usize = 5;
