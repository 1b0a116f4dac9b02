// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the network device counts.

use crate::metrics::counters;

counters! {
    /// Counters of one network device.
    pub struct NetMetrics {
        /// Frames that the guest got.
        received_frames,
        /// Their bytes, headers of the device not counted.
        received_bytes,
        /// Times that frames waited because the guest had no buffer for them.
        starved,
        /// Frames that the tap took from the guest.
        sent_frames,
        /// Their bytes, headers of the device not counted.
        sent_bytes,
        /// Frames of the guest dropped because their header asks for what was not negotiated, or for being too short.
        refused_frames,
        /// Frames of the guest that the tap did not take.
        dropped_frames,
        /// Times that the tap failed; after the first it is not read any more.
        host_errors,
    }
}
