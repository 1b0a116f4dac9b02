// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the file system device counts; requests are the server's business.

use crate::metrics::counters;

counters! {
    /// Counters of one file system device.
    pub struct FsMetrics {
        /// Interrupts that the server asked for.
        interrupts,
        /// Messages that the server confirmed or answered.
        answers,
        /// Times that the server was lost.
        losses,
    }
}
