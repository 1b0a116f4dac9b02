// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the balloon counts.

use crate::metrics::counters;

counters! {
    /// Counters of one balloon.
    pub struct BalloonMetrics {
        /// Pages that the guest put into the balloon.
        inflated_pages,
        /// Pages that it took back.
        deflated_pages,
        /// Bytes of free pages that it reported.
        reported_bytes,
        /// Bytes given back to the host, by either way.
        released_bytes,
        /// Ranges that are not guest memory, or that the host did not take.
        refused_ranges,
    }
}
