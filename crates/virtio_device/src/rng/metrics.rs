// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the entropy device counts.

use crate::metrics::counters;

counters! {
    /// Counters of one entropy device.
    pub struct RngMetrics {
        /// Requests served.
        requests,
        /// Random bytes given.
        bytes,
    }
}
