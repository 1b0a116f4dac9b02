// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block device (virtio v1.3 §5.2): a disk behind a descriptor, raw format.
//!
//! A request goes from its chain to the disk in one thread, one at a time per queue; several queues
//! are several workers, which the VMM may run on threads of their own. Data moves by
//! `preadv`/`pwritev` between the disk and guest memory, without a copy.
//!
//! Invariants:
//! - No byte outside `0..capacity` is ever read or written; addresses are checked before the disk sees them.
//! - A read-only device changes nothing, whatever the driver negotiated or sends.
//! - A request with a status byte gets a status; only one without (or with broken buffers) retires
//!   the device.
//! - With `writeback` 0, or without FLUSH negotiated, data is durable before a write completes (§5.2.6.2).

mod device;
mod disk;
mod metrics;
mod request;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Access, Block, BlockOptions, BlockState};
pub use disk::{DiskIo, FileDisk};
pub use metrics::BlockMetrics;

use crate::MAX_QUEUE_SIZE;

/// Entries of a request queue.
const QUEUE_SIZE: u16 = 256;
/// Segments of one request: the queue less header and status (§5.2.4, `seg_max`).
const SEG_MAX: u32 = 254;
/// Bytes of one segment (§5.2.4, `size_max`); with [`SEG_MAX`] it keeps honest drivers below
/// [`MAX_REQUEST_BYTES`].
const SIZE_MAX: u32 = 128 << 10;
/// Bytes of all buffers of one request: bounds how long one request holds its thread.
const MAX_REQUEST_BYTES: u32 = 32 << 20;
/// Most queues: more than the vCPUs of any pod gain nothing.
const MAX_QUEUES: u16 = 64;
/// Ranges of one discard or write-zeroes request.
const MAX_RANGES: u32 = 32;
/// Sectors of one discard range: 1 GiB, as giving back extents is cheap.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Sectors of one write-zeroes range: 4 MiB, because the fallback writes them and 32 of them are one request.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 13;

const _: () = assert!(QUEUE_SIZE <= MAX_QUEUE_SIZE);
const _: () = assert!(SEG_MAX * SIZE_MAX + 17 <= MAX_REQUEST_BYTES);
