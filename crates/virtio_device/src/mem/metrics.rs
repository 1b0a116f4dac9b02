// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the memory device counts.

use crate::metrics::counters;

counters! {
    /// Counters of one memory device.
    pub struct MemMetrics {
        /// Bytes that the driver plugged.
        plugged_bytes,
        /// Bytes that it unplugged.
        unplugged_bytes,
        /// Requests beyond what the host wants plugged.
        refused,
        /// Requests about no blocks, or about blocks in another state.
        wrong,
        /// Slots that the host could not make or take away, or memory that it did not take back.
        host_failures,
    }
}
