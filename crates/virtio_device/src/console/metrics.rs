// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the console counts.

use crate::metrics::counters;

counters! {
    /// Counters of one console.
    pub struct ConsoleMetrics {
        /// Bytes that the guest printed.
        output_bytes,
        /// Bytes of these that the log file did not take, being full or broken.
        file_dropped_bytes,
        /// Bytes given to the guest as input.
        input_bytes,
    }
}
