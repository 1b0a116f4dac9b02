// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the block device counts.

use crate::metrics::counters;

counters! {
    /// Counters of one block device, over all its queues.
    pub struct BlockMetrics {
        /// Reads done.
        reads,
        /// Writes done.
        writes,
        /// Bytes read.
        read_bytes,
        /// Bytes written.
        written_bytes,
        /// Flushes done.
        flushes,
        /// Discard requests done.
        discards,
        /// Write-zeroes requests done.
        write_zeroes,
        /// Requests that the driver got wrong: out of range, misaligned, or writes to a read-only disk.
        refused,
        /// Requests of a type that is unknown or was not negotiated.
        unsupported,
        /// Requests that failed on the host's side.
        host_errors,
    }
}
